/// Sparse graph attention: out[i] = sum_j softmax_j(scale q[i].k[j]) v[j] over the tokens j that i sees by a
/// plan.
#pragma once

#include "attention/graph_tasks.hpp"

namespace scfm {

/// All tensors have `shape` and one storage type. lse: natural, contiguous (tokens, heads). A token that sees
/// nothing: out 0, lse -infinity. Throws InvalidArgument for a plan that is none, before anything is written.
void graph_forward(const GraphShape& shape, const GraphTensor& q, const GraphTensor& k, const GraphTensor& v,
                   const GraphTensor& out, float* lse, const GraphPairs& rows, float scale);

}  // namespace scfm
