/// The backward of sparse gene attention: weights are made again from the log-sum-exp.
///
///     p = exp(scale <q, k> - lse)    dp = <dO, v>    delta = sum p dp    ds = p (dp - delta)
///     dq = scale sum ds k    over whom a token sees;    dk = scale sum ds q, dv = sum p dO    over who sees
///     it
///
/// delta is also <out, dO>, but less exactly where out was rounded to 16 bits. Rows take that as a first
/// guess g and sum p (dp - g), p (dp - g) k and p k side by side: the first puts g right at the end, when the
/// other two give
///
///     sum p (dp - delta) k = sum p (dp - g) k - (delta - g) sum p k
///
/// so that keys and values are read once, and what is subtracted at last is small.
#include "cuda/graph_rows.cuh"

namespace scfm::cuda {
namespace {

struct BackwardArguments {
  GraphTensor grad_out, q, k, v, out;
  const float* lse;
  GraphTensor dq, dk, dv;
  float* delta;
  GraphPairs pairs;
  std::int64_t num_tokens;
  std::int64_t num_heads;
  int head_dim;
  float scale;
  float score_scale;  // scale * log2(e)

  __device__ std::int64_t fact(std::int64_t row, std::int64_t head) const { return row * num_heads + head; }
};

// ---- dq and delta, by the rows of the plan
// ----------------------------------------------------------------------

template <class Shape>
struct RowSums {
  float guess = 0.0f;              // <out, dO>
  float excess = 0.0f;             // p (dp - guess)
  float mixed[Shape::kSize] = {};  // p (dp - guess) k
  float plain[Shape::kSize] = {};  // p k
};

template <class Shape>
struct RowGradients {
  using Element = typename Shape::Element;
  const BackwardArguments& a;
  std::int64_t head;
  HubSums& hub;

  __device__ RowSums<Shape> over_edges(std::int64_t row, bool is_hub) const {
    float query[Shape::kSize];
    float upstream[Shape::kSize];
    load_row<Shape>(head_of<const Element>(a.q, head).row(row), a.head_dim, true, query);
    load_row<Shape>(head_of<const Element>(a.grad_out, head).row(row), a.head_dim, true, upstream);
    const float lse2 = a.lse[a.fact(row, head)] * kLog2E;
    const HeadRows<const Element> keys = head_of<const Element>(a.k, head);
    const HeadRows<const Element> values = head_of<const Element>(a.v, head);
    RowSums<Shape> sums;
    sums.guess = guess_of(row, upstream);
    const std::int64_t begin = a.pairs.offsets[row];
    for_edges<Shape>(a.pairs.positions + begin, a.pairs.offsets[row + 1] - begin, is_hub,
                     [&](std::int32_t position, bool there) {
                       float key[Shape::kSize];
                       float value[Shape::kSize];
                       load_row<Shape>(keys.row(position), a.head_dim, there, key);
                       load_row<Shape>(values.row(position), a.head_dim, there, value);
                       const float score = dot<Shape>(query, key) * a.score_scale;
                       const float weight = there ? exp2f(score - lse2) : 0.0f;
                       const float slope = weight * (dot<Shape>(upstream, value) - sums.guess);
                       sums.excess += slope;
#pragma unroll
                       for (int i = 0; i < Shape::kSize; ++i) {
                         sums.mixed[i] += slope * key[i];
                         sums.plain[i] += weight * key[i];
                       }
                     });
    sums.excess = sum_of_edges<Shape>(sums.excess);
    sum_rows_of_edges<Shape>(sums.mixed);
    sum_rows_of_edges<Shape>(sums.plain);
    return sums;
  }

  __device__ float guess_of(std::int64_t row, const float* upstream) const {
    float out[Shape::kSize];
    load_row<Shape>(head_of<const Element>(a.out, head).row(row), a.head_dim, true, out);
    return dot<Shape>(upstream, out);
  }

  __device__ void operator()(std::int64_t row, bool is_hub) const {
    RowSums<Shape> sums = over_edges(row, is_hub);
    is_hub ? write_hub(row, sums) : write(row, sums);
  }

  __device__ void write(std::int64_t row, RowSums<Shape>& sums) const {
#pragma unroll
    for (int i = 0; i < Shape::kSize; ++i)
      sums.mixed[i] = gradient(sums.mixed[i], sums.excess, sums.plain[i]);
    store_row<Shape>(head_of<Element>(a.dq, head).row(row), a.head_dim, sums.mixed);
    if (threadIdx.x % kWarpSize == 0) a.delta[a.fact(row, head)] = sums.guess + sums.excess;
  }

  __device__ void write_hub(std::int64_t row, const RowSums<Shape>& own) const {
    const int thread = static_cast<int>(threadIdx.x);
    put_row<Shape>(hub.rows[0], own.mixed);
    put_row<Shape>(hub.rows[1], own.plain);
    if (thread % kWarpSize == 0) hub.numbers[0][thread / kWarpSize] = own.excess;
    __syncthreads();
    float excess = 0.0f;
    float mixed = 0.0f;
    float plain = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) {
      excess += hub.numbers[0][warp];
      if (thread >= a.head_dim) continue;
      mixed += hub.rows[0][warp][thread];
      plain += hub.rows[1][warp][thread];
    }
    if (thread < a.head_dim) {
      const float dq = gradient(mixed, excess, plain);
      head_of<Element>(a.dq, head).row(row)[thread] = Stored<Element>::narrow(dq);
    }
    if (thread == 0) a.delta[a.fact(row, head)] = own.guess + excess;
  }

  __device__ float gradient(float mixed, float excess, float plain) const {
    return (mixed - excess * plain) * a.scale;
  }
};

// ---- dk and dv, by its columns
// ----------------------------------------------------------------------------------

template <class Shape>
struct ColumnSums {
  float dk[Shape::kSize] = {};
  float dv[Shape::kSize] = {};
};

template <class Shape>
struct ColumnGradients {
  using Element = typename Shape::Element;
  const BackwardArguments& a;
  std::int64_t head;
  HubSums& hub;

  __device__ ColumnSums<Shape> over_edges(std::int64_t column, bool is_hub) const {
    float key[Shape::kSize];
    float value[Shape::kSize];
    load_row<Shape>(head_of<const Element>(a.k, head).row(column), a.head_dim, true, key);
    load_row<Shape>(head_of<const Element>(a.v, head).row(column), a.head_dim, true, value);
    const HeadRows<const Element> queries = head_of<const Element>(a.q, head);
    const HeadRows<const Element> upstreams = head_of<const Element>(a.grad_out, head);
    ColumnSums<Shape> sums;
    const std::int64_t begin = a.pairs.offsets[column];
    for_edges<Shape>(a.pairs.positions + begin, a.pairs.offsets[column + 1] - begin, is_hub,
                     [&](std::int32_t position, bool there) {
                       float query[Shape::kSize];
                       float upstream[Shape::kSize];
                       load_row<Shape>(queries.row(position), a.head_dim, there, query);
                       load_row<Shape>(upstreams.row(position), a.head_dim, there, upstream);
                       const float lse2 = there ? __ldg(a.lse + a.fact(position, head)) * kLog2E : 0.0f;
                       const float delta = there ? a.delta[a.fact(position, head)] : 0.0f;
                       const float score = dot<Shape>(query, key) * a.score_scale;
                       const float weight = there ? exp2f(score - lse2) : 0.0f;
                       const float slope = weight * (dot<Shape>(upstream, value) - delta);
#pragma unroll
                       for (int i = 0; i < Shape::kSize; ++i) {
                         sums.dk[i] += slope * query[i];
                         sums.dv[i] += weight * upstream[i];
                       }
                     });
    sum_rows_of_edges<Shape>(sums.dk);
    sum_rows_of_edges<Shape>(sums.dv);
    return sums;
  }

  __device__ void operator()(std::int64_t column, bool is_hub) const {
    ColumnSums<Shape> sums = over_edges(column, is_hub);
    is_hub ? write_hub(column, sums) : write(column, sums);
  }

  __device__ void write(std::int64_t column, ColumnSums<Shape>& sums) const {
#pragma unroll
    for (int i = 0; i < Shape::kSize; ++i) sums.dk[i] *= a.scale;
    store_row<Shape>(head_of<Element>(a.dk, head).row(column), a.head_dim, sums.dk);
    store_row<Shape>(head_of<Element>(a.dv, head).row(column), a.head_dim, sums.dv);
  }

  __device__ void write_hub(std::int64_t column, const ColumnSums<Shape>& own) const {
    const int thread = static_cast<int>(threadIdx.x);
    put_row<Shape>(hub.rows[0], own.dk);
    put_row<Shape>(hub.rows[1], own.dv);
    __syncthreads();
    if (thread >= a.head_dim) return;
    float dk = 0.0f;
    float dv = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) {
      dk += hub.rows[0][warp][thread];
      dv += hub.rows[1][warp][thread];
    }
    head_of<Element>(a.dk, head).row(column)[thread] = Stored<Element>::narrow(dk * a.scale);
    head_of<Element>(a.dv, head).row(column)[thread] = Stored<Element>::narrow(dv);
  }
};

// ---- kernels
// ----------------------------------------------------------------------------------------------------

template <class Shape>
__global__ void __launch_bounds__(kThreads, 2) graph_row_gradients_kernel(const BackwardArguments a) {
  __shared__ HubSums hub;
  for_rows(a.pairs.offsets, a.num_tokens, RowGradients<Shape>{a, static_cast<std::int64_t>(blockIdx.y), hub});
}

template <class Shape>
__global__ void __launch_bounds__(kThreads, 2) graph_column_gradients_kernel(const BackwardArguments a) {
  __shared__ HubSums hub;
  for_rows(a.pairs.offsets, a.num_tokens,
           ColumnGradients<Shape>{a, static_cast<std::int64_t>(blockIdx.y), hub});
}

template <class Shape>
struct RowKernel {
  static auto kernel() { return &graph_row_gradients_kernel<Shape>; }
};

template <class Shape>
struct ColumnKernel {
  static auto kernel() { return &graph_column_gradients_kernel<Shape>; }
};

}  // namespace

cudaError_t graph_backward(const GraphShape& shape, const GraphBackwardInputs& inputs,
                           const GraphGradients& gradients, const GraphPairs& rows, const GraphPairs& columns,
                           cudaStream_t stream) {
  BackwardArguments arguments{inputs.grad_out, inputs.q,        inputs.k,     inputs.v,
                              inputs.out,      inputs.lse,      gradients.dq, gradients.dk,
                              gradients.dv,    gradients.delta, rows,         shape.num_tokens,
                              shape.num_heads, shape.head_dim,  shape.scale,  shape.scale * kLog2E};
  const cudaError_t error = launch_rows<RowKernel>(shape, arguments, stream);
  if (error != cudaSuccess) return error;
  arguments.pairs = columns;
  return launch_rows<ColumnKernel>(shape, arguments, stream);
}

}  // namespace scfm::cuda
