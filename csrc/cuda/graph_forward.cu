/// The forward of sparse gene attention: each group of lanes keeps a softmax of its own edges that is
/// rescaled whenever a higher score comes (online softmax, in base 2); groups, and for hubs warps, are put on
/// the highest score of all before they are added.
#include "cuda/graph_rows.cuh"

namespace scfm::cuda {
namespace {

struct ForwardArguments {
  GraphTensor q, k, v, out;
  float* lse;
  GraphPairs rows;
  std::int64_t num_tokens;
  std::int64_t num_heads;
  int head_dim;
  float score_scale;  // scale * log2(e)
};

/// exp2(score - top) where nothing may have been seen yet.
__device__ float rescaled(float score, float top) { return exp2f(score - (top == -INFINITY ? 0.0f : top)); }

template <class Shape>
struct Softmax {
  float top = -INFINITY;
  float total = 0.0f;
  float mixed[Shape::kSize] = {};

  __device__ void add(float score, const float* value, bool there) {
    const float highest = there ? fmaxf(top, score) : top;
    const float keep = rescaled(top, highest);
    const float weight = there ? rescaled(score, highest) : 0.0f;
    top = highest;
    total = total * keep + weight;
#pragma unroll
    for (int i = 0; i < Shape::kSize; ++i) mixed[i] = mixed[i] * keep + weight * value[i];
  }

  /// Adds up the edges that the warp works on at once.
  __device__ void gather() {
    float highest = top;
#pragma unroll
    for (int offset = Shape::kLanes; offset < kWarpSize; offset *= 2) {
      highest = fmaxf(highest, __shfl_xor_sync(kWholeWarp, highest, offset));
    }
    const float keep = rescaled(top, highest);
    top = highest;
    total = sum_of_edges<Shape>(total * keep);
#pragma unroll
    for (int i = 0; i < Shape::kSize; ++i) mixed[i] *= keep;
    sum_rows_of_edges<Shape>(mixed);
  }
};

__device__ float log_sum(float top, float total) { return (top + log2f(total)) * kLn2; }

template <class Shape>
struct Forward {
  using Element = typename Shape::Element;
  const ForwardArguments& a;
  std::int64_t head;
  HubSums& hub;

  __device__ Softmax<Shape> over_edges(std::int64_t row, bool is_hub) const {
    float query[Shape::kSize];
    load_row<Shape>(head_of<const Element>(a.q, head).row(row), a.head_dim, true, query);
    const HeadRows<const Element> keys = head_of<const Element>(a.k, head);
    const HeadRows<const Element> values = head_of<const Element>(a.v, head);
    Softmax<Shape> softmax;
    const std::int64_t begin = a.rows.offsets[row];
    for_edges<Shape>(a.rows.positions + begin, a.rows.offsets[row + 1] - begin, is_hub,
                     [&](std::int32_t position, bool there) {
                       float key[Shape::kSize];
                       float value[Shape::kSize];
                       load_row<Shape>(keys.row(position), a.head_dim, there, key);
                       load_row<Shape>(values.row(position), a.head_dim, there, value);
                       softmax.add(dot<Shape>(query, key) * a.score_scale, value, there);
                     });
    softmax.gather();
    return softmax;
  }

  __device__ void operator()(std::int64_t row, bool is_hub) const {
    Softmax<Shape> softmax = over_edges(row, is_hub);
    is_hub ? write_hub(row, softmax) : write(row, softmax);
  }

  __device__ void write(std::int64_t row, Softmax<Shape>& softmax) const {
    const bool sees = a.rows.offsets[row] < a.rows.offsets[row + 1];
    const float share = sees ? 1.0f / softmax.total : 0.0f;
#pragma unroll
    for (int i = 0; i < Shape::kSize; ++i) softmax.mixed[i] *= share;
    store_row<Shape>(head_of<Element>(a.out, head).row(row), a.head_dim, softmax.mixed);
    if (threadIdx.x % kWarpSize == 0) {
      a.lse[row * a.num_heads + head] = sees ? log_sum(softmax.top, softmax.total) : -INFINITY;
    }
  }

  __device__ void write_hub(std::int64_t row, const Softmax<Shape>& own) const {
    const int thread = static_cast<int>(threadIdx.x);
    put_row<Shape>(hub.rows[0], own.mixed);
    if (thread % kWarpSize == 0) {
      hub.numbers[0][thread / kWarpSize] = own.top;
      hub.numbers[1][thread / kWarpSize] = own.total;
    }
    __syncthreads();
    float top = -INFINITY;
    for (int warp = 0; warp < kWarps; ++warp) top = fmaxf(top, hub.numbers[0][warp]);
    float total = 0.0f;
    float mixed = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) {
      const float keep = rescaled(hub.numbers[0][warp], top);
      total += hub.numbers[1][warp] * keep;
      if (thread < a.head_dim) mixed += hub.rows[0][warp][thread] * keep;
    }
    if (thread < a.head_dim) {
      head_of<Element>(a.out, head).row(row)[thread] = Stored<Element>::narrow(mixed / total);
    }
    if (thread == 0) a.lse[row * a.num_heads + head] = log_sum(top, total);
  }
};

template <class Shape>
__global__ void __launch_bounds__(kThreads, 3) graph_forward_kernel(const ForwardArguments a) {
  __shared__ HubSums hub;
  for_rows(a.rows.offsets, a.num_tokens, Forward<Shape>{a, static_cast<std::int64_t>(blockIdx.y), hub});
}

template <class Shape>
struct ForwardKernel {
  static auto kernel() { return &graph_forward_kernel<Shape>; }
};

}  // namespace

cudaError_t graph_forward(const GraphShape& shape, const GraphTensor& q, const GraphTensor& k,
                          const GraphTensor& v, const GraphTensor& out, float* lse, const GraphPairs& rows,
                          cudaStream_t stream) {
  const ForwardArguments arguments{
      q, k, v, out, lse, rows, shape.num_tokens, shape.num_heads, shape.head_dim, shape.scale * kLog2E};
  return launch_rows<ForwardKernel>(shape, arguments, stream);
}

}  // namespace scfm::cuda
