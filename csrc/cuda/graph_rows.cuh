/// How a warp walks the edges of a token, and how eight warps share a token with very many.
///
/// A lane holds 16 bytes of a row of one head (32 where rows are longest), so that 8 lanes hold a row of 64
/// bfloat16 numbers, and a warp works on four edges at once: every load is a full 128-byte line, and a dot
/// product takes three shuffles instead of five. The kernel then lives on the bandwidth of the second-level
/// cache, which holds the keys and values of the cells in flight.
///
/// A block is eight consecutive tokens of one head, a warp each. A token with more than kHubEdges edges (a
/// <cls> sees its whole cell) is left to all eight warps together, 32 edges each in turn; which way a token
/// goes, and every order of summing, depends on its own edges only.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/graph_attention.hpp"
#include "cuda/launch.hpp"
#include "cuda/stored_vectors.cuh"
#include "cuda/warp.cuh"

namespace scfm::cuda {

inline constexpr int kWarps = 8;
inline constexpr int kThreads = kWarps * kWarpSize;
inline constexpr std::int64_t kHubEdges = 512;
inline constexpr float kLog2E = 1.44269504088896340736f;
inline constexpr float kLn2 = 0.69314718055994530942f;

static_assert(kMaxHeadDim <= kThreads, "a thread writes one number of a hub's row");

/// kLanes lanes hold a row, with kVecs vectors each.
template <class ElementOf, int kLanesOf, int kVecsOf>
struct RowShape {
  using Element = ElementOf;
  static constexpr int kLanes = kLanesOf;
  static constexpr int kVecs = kVecsOf;
  static constexpr int kPerVector = Stored<Element>::kPerVector;
  static constexpr int kSize = kVecs * kPerVector;  // numbers that a lane holds
  static constexpr int kEdgesAtOnce = kWarpSize / kLanes;

  /// Where in the row this lane's vector number `vec` begins.
  static __device__ int place(int vec) {
    return (vec * kLanes + static_cast<int>(threadIdx.x) % kLanes) * kPerVector;
  }
};

/// One head of a tensor, as the kernels see it.
template <class Element>
struct HeadRows {
  Element* data;
  std::int64_t row_stride;

  __device__ Element* row(std::int64_t token) const { return data + token * row_stride; }
};

template <class Element>
__device__ HeadRows<Element> head_of(const GraphTensor& tensor, std::int64_t head) {
  return {static_cast<Element*>(tensor.data) + head * tensor.head_stride, tensor.row_stride};
}

/// This lane's part of a row; zeros past head_dim, and everywhere unless `there`.
template <class Shape>
__device__ void load_row(const typename Shape::Element* row, int head_dim, bool there, float* to) {
#pragma unroll
  for (int vec = 0; vec < Shape::kVecs; ++vec) {
    float* part = to + vec * Shape::kPerVector;
    if (there && Shape::place(vec) < head_dim) {
      Stored<typename Shape::Element>::load(row + Shape::place(vec), part);
    } else {
#pragma unroll
      for (int i = 0; i < Shape::kPerVector; ++i) part[i] = 0.0f;
    }
  }
}

/// The first kLanes lanes write their parts of a row.
template <class Shape>
__device__ void store_row(typename Shape::Element* row, int head_dim, const float* from) {
  if (threadIdx.x % kWarpSize >= Shape::kLanes) return;
#pragma unroll
  for (int vec = 0; vec < Shape::kVecs; ++vec) {
    if (Shape::place(vec) < head_dim) {
      Stored<typename Shape::Element>::store(row + Shape::place(vec), from + vec * Shape::kPerVector);
    }
  }
}

/// The dot product of two rows, in all lanes that hold them.
template <class Shape>
__device__ float dot(const float* a, const float* b) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < Shape::kSize; ++i) sum += a[i] * b[i];
#pragma unroll
  for (int offset = Shape::kLanes / 2; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(kWholeWarp, sum, offset);
  }
  return sum;
}

/// The sum of x over the rows that the warp holds at once, in all lanes.
template <class Shape>
__device__ float sum_of_edges(float x) {
#pragma unroll
  for (int offset = Shape::kLanes; offset < kWarpSize; offset *= 2) {
    x += __shfl_xor_sync(kWholeWarp, x, offset);
  }
  return x;
}

template <class Shape>
__device__ void sum_rows_of_edges(float* row) {
#pragma unroll
  for (int i = 0; i < Shape::kSize; ++i) row[i] = sum_of_edges<Shape>(row[i]);
}

/// Calls visit(position, there) in the whole warp, kEdgesAtOnce edges at a time. The positions of 32 edges
/// are one coalesced load; of a hub's, every warp takes each eighth such load.
template <class Shape, class Visit>
__device__ void for_edges(const std::int32_t* positions, std::int64_t count, bool is_hub, Visit&& visit) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int step = is_hub ? kThreads : kWarpSize;
  for (std::int64_t begin = is_hub ? threadIdx.x - lane : 0; begin < count; begin += step) {
    const int n = count - begin < kWarpSize ? static_cast<int>(count - begin) : kWarpSize;
    const int own = lane < n ? __ldg(positions + begin + lane) : 0;
#pragma unroll 2
    for (int at = 0; at < n; at += Shape::kEdgesAtOnce) {
      const int edge = at + lane / Shape::kLanes;
      visit(__shfl_sync(kWholeWarp, own, edge), edge < n);
    }
  }
}

/// What the warps of a block leave for one another about a hub: two rows and two numbers each.
struct HubSums {
  float rows[2][kWarps][kMaxHeadDim];
  float numbers[2][kWarps];
};

/// The first kLanes lanes of each warp put down their parts of a row.
template <class Shape>
__device__ void put_row(float (&rows)[kWarps][kMaxHeadDim], const float* from) {
  if (threadIdx.x % kWarpSize >= Shape::kLanes) return;
#pragma unroll
  for (int i = 0; i < Shape::kSize; ++i) {
    rows[threadIdx.x / kWarpSize][Shape::place(i / Shape::kPerVector) + i % Shape::kPerVector] = from[i];
  }
}

/// Calls work(row, is_hub) with whole warps: for a warp's own row, then in all warps for each hub. For a hub
/// the work synchronises the block; what it leaves in shared memory is free once it returns.
template <class Work>
__device__ void for_rows(const std::int64_t* offsets, std::int64_t num_tokens, Work&& work) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kWarps;
  const bool is_hub = lane < kWarps && first + lane < num_tokens &&
                      offsets[first + lane + 1] - offsets[first + lane] > kHubEdges;
  unsigned hubs = __ballot_sync(kWholeWarp, is_hub);
  bool own = first + warp < num_tokens && (hubs >> warp & 1u) == 0;
  while (own || hubs != 0) {  // one call, so that the walk over the edges is compiled once
    const bool hub = !own;
    work(own ? first + warp : first + __ffs(static_cast<int>(hubs)) - 1, hub);
    own = false;
    if (!hub) continue;
    __syncthreads();
    hubs &= hubs - 1;
  }
}

/// Launches Kernel<RowShape> for the storage type and head_dim at hand.
template <template <class> class Kernel, class Arguments>
cudaError_t launch_rows(const GraphShape& shape, const Arguments& arguments, cudaStream_t stream) {
  const auto start = [&](auto row_shape) {
    return launch(Kernel<decltype(row_shape)>::kernel(), (shape.num_tokens + kWarps - 1) / kWarps,
                  shape.num_heads, kThreads, stream, arguments);
  };
  if (shape.storage == Storage::f32) {
    if (shape.head_dim <= 32) return start(RowShape<float, 8, 1>{});
    if (shape.head_dim <= 64) return start(RowShape<float, 16, 1>{});
    if (shape.head_dim <= 128) return start(RowShape<float, 32, 1>{});
    return start(RowShape<float, 32, 2>{});
  }
  const auto start_half = [&](auto element) {
    using Element = decltype(element);
    if (shape.head_dim <= 32) return start(RowShape<Element, 4, 1>{});
    if (shape.head_dim <= 64) return start(RowShape<Element, 8, 1>{});
    if (shape.head_dim <= 128) return start(RowShape<Element, 16, 1>{});
    return start(RowShape<Element, 32, 1>{});
  };
  return shape.storage == Storage::f16 ? start_half(__half{}) : start_half(__nv_bfloat16{});
}

}  // namespace scfm::cuda
