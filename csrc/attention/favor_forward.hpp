/// FAVOR+ attention inside packed cells (see favor_kernels.hpp for the formula), forward.
#pragma once

#include <cstdint>

namespace scfm {

/// (T, H, D), the last contiguous; strides count elements.
struct FavorTensor {
  void* data;
  std::int64_t row_stride;
  std::int64_t head_stride;
};

struct FavorProblem {
  FavorTensor q;
  FavorTensor k;
  FavorTensor v;
  bool is_bf16;  // all tensors, else float32
  std::int64_t num_heads;
  std::int64_t head_dim;
  const float* projection;  // (F, D)
  std::int64_t num_features;
  const std::int32_t* cu_seqlens;  // (C + 1)
  std::int64_t num_cells;
  bool given_max;  // whether M is an argument rather than the cell's largest a_k
  float eps;
};

/// Writes out, and unless it is given key_max (C): the largest a_k over a cell's heads, tokens and features;
/// -infinity for a cell without tokens. Throws InvalidArgument for a head_dim above 256.
void favor_forward(const FavorProblem& problem, const FavorTensor& out, float* key_max);

}  // namespace scfm
