/// Sparse gene attention on a GPU, along the edges of a plan: the twin of attention/graph_forward.hpp and
/// attention/graph_backward.hpp, for plans whose edges lie too far apart for tiles
/// (kernels/graph_attention.py is the tiled form).
///
/// Everything here is a pointer into the memory of the current device; work is queued on `stream` and these
/// functions return before it is done. What is given is trusted: the bindings check shapes, strides and
/// alignment, the operator checks the plan. Sums have one owner and one order, so results are the same in
/// every run and do not depend on what else is in the pack. Not run on a GPU yet: proved by compiling for
/// every architecture and by running these very kernels on the host (tests/cuda).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace scfm::cuda {

enum class Storage : int { f32, f16, bf16 };

inline constexpr int kMaxHeadDim = 256;
inline constexpr std::int64_t kMaxHeads = 65535;
/// Rows of q, k, v, their gradients and out begin at multiples of this many bytes, and head_dim is a whole
/// number of vectors of it.
inline constexpr int kVectorBytes = 16;

struct GraphShape {
  std::int64_t num_tokens;
  std::int64_t num_heads;
  int head_dim;
  Storage storage;  // of every tensor but lse and delta
  float scale;
};

/// A tensor (tokens, heads, head_dim), its last dimension contiguous. Strides count elements.
struct GraphTensor {
  void* data;
  std::int64_t row_stride;
  std::int64_t head_stride;
};

/// Token i and positions[offsets[i]] .. positions[offsets[i + 1]]: whom it sees, or by whom it is seen.
struct GraphPairs {
  const std::int64_t* offsets;    // num_tokens + 1
  const std::int32_t* positions;  // from 0 to num_tokens - 1
};

/// out, and the natural log-sum-exp of each token's scores, (tokens, heads), contiguous; zeros and -infinity
/// for a token that sees nothing.
cudaError_t graph_forward(const GraphShape& shape, const GraphTensor& q, const GraphTensor& k,
                          const GraphTensor& v, const GraphTensor& out, float* lse, const GraphPairs& rows,
                          cudaStream_t stream);

struct GraphBackwardInputs {
  GraphTensor grad_out, q, k, v;
  GraphTensor out;  // of the forward
  const float* lse;
};

struct GraphGradients {
  GraphTensor dq, dk, dv;
  float* delta;  // (tokens, heads), contiguous: written by rows, then read by columns
};

cudaError_t graph_backward(const GraphShape& shape, const GraphBackwardInputs& inputs,
                           const GraphGradients& gradients, const GraphPairs& rows, const GraphPairs& columns,
                           cudaStream_t stream);

}  // namespace scfm::cuda
