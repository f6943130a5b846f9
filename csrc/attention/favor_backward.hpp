/// FAVOR+ attention inside packed cells, backward: the features are formed again, block by block.
#pragma once

#include "attention/favor_forward.hpp"

namespace scfm {

struct FavorGradients {
  FavorTensor q;
  FavorTensor k;
  FavorTensor v;
};

/// key_max (C) is the M that the forward used. Writes the gradients, and key_max_grad (C): that of M, which
/// unless M was given is also passed on to the key that has the largest a_k (of equals the lowest token, then
/// head, then feature). The gradient of a query's maximum goes to the first feature that has it.
void favor_backward(const FavorProblem& problem, const FavorTensor& grad_out, const FavorGradients& gradients,
                    const float* key_max, float* key_max_grad);

}  // namespace scfm
