/// Gradients of sparse graph attention, from q, k, v and the log-sum-exp.
///
/// Two sets of tasks that share nothing: dq goes by the plan's rows, dk and dv by its columns. The weights
/// are made again in both; in exchange every sum has one owner and one order, and nothing of the size of the
/// edges is kept.
#pragma once

#include "attention/graph_tasks.hpp"

namespace scfm {

struct GraphInputs {
  GraphTensor grad_out, q, k, v;
  const float* lse;  // contiguous (tokens, heads)
};

/// rows and columns: the plan and its transpose. Throws InvalidArgument where either is none, before anything
/// is written.
void graph_backward(const GraphShape& shape, const GraphInputs& inputs, const GraphTensor& dq,
                    const GraphTensor& dk, const GraphTensor& dv, const GraphPairs& rows,
                    const GraphPairs& columns, float scale);

}  // namespace scfm
