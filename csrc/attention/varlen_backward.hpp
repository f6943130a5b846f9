/// Attention inside each packed cell, backward: the work of all cells and heads, on all threads.
#pragma once

#include "attention/varlen_forward.hpp"

namespace scfm {

struct VarlenForwardResult {
  VarlenTensor out;
  const float* lse;  // (rows of q, heads)
};

struct VarlenGradients {
  VarlenTensor dq;
  VarlenTensor dk;
  VarlenTensor dv;
};

/// Writes every row of the gradients. Throws InvalidArgument as varlen_forward does, std::bad_alloc.
void varlen_backward(const VarlenProblem& problem, const VarlenTensor& grad_out,
                     const VarlenForwardResult& result, const VarlenGradients& gradients);

}  // namespace scfm
