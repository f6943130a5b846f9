/// Attention inside each packed cell, forward: the work of all cells and heads, on all threads.
#pragma once

#include <cstdint>

namespace scfm {

/// (rows, heads, head_dim), the last contiguous; strides count elements.
struct VarlenTensor {
  void* data;
  std::int64_t row_stride;
  std::int64_t head_stride;
};

struct VarlenProblem {
  VarlenTensor q;
  VarlenTensor k;
  VarlenTensor v;
  bool is_bf16;
  std::int64_t num_heads;
  std::int64_t head_dim;
  const std::int32_t* cu_seqlens_q;
  const std::int32_t* cu_seqlens_k;
  std::int64_t num_cells;
  /// Null, or the known tokens of every cell, which come first: they are all the keys; a query behind them
  /// also sees itself. The offsets of queries and keys are then the same.
  const std::int32_t* num_known;
  float scale;
};

/// Writes out, like q, and lse (rows of q, heads), the natural log-sum-exp of every query's scores. Throws
/// InvalidArgument for a head_dim outside 1 to 256 or counts outside their cells, std::bad_alloc.
void varlen_forward(const VarlenProblem& problem, const VarlenTensor& out, float* lse);

/// Throws InvalidArgument unless head_dim and num_known fit.
void check_varlen(const VarlenProblem& problem, const char* function);

}  // namespace scfm
