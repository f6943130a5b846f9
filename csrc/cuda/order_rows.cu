/// Rows whose columns do not strictly rise: sorted by column, and what shares a column summed in the order of
/// its entries, in float64, rounded to float32 if that is the type of the data.
#include "cuda/block_sort.cuh"
#include "cuda/launch.hpp"
#include "cuda/rank_steps.cuh"
#include "cuda/warp.cuh"

namespace scfm::cuda {
namespace {

constexpr int kWarps = kSortThreads / kWarpSize;

/// How many threads before this one have it set; `total` becomes how many in the block do.
__device__ std::int32_t rank_of(bool set, std::int32_t (&warp_counts)[kWarps], std::int32_t& total) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const unsigned votes = __ballot_sync(kWholeWarp, set);
  if (lane == 0) warp_counts[warp] = __popc(votes);
  __syncthreads();
  std::int32_t rank = __popc(votes & ((1u << lane) - 1u));
  total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) rank += total;
    total += warp_counts[w];
  }
  __syncthreads();
  return rank;
}

template <class Id>
__device__ void order_row(const DeviceCsr& csr, std::int64_t row, const OrderedRows& ordered,
                          std::uint64_t* keys, Id* ids, std::int32_t (&warp_counts)[kWarps]) {
  const std::int64_t start = csr.indptr[row];
  const auto count = static_cast<std::int32_t>(csr.indptr[row + 1] - start);
  for (std::int64_t i = threadIdx.x; i < count; i += kSortThreads) {
    keys[i] = ~static_cast<std::uint64_t>(column_at(csr.columns, csr.column_type, start + i));
    ids[i] = static_cast<Id>(i);
  }
  sort_in_block(keys, ids, static_cast<std::uint32_t>(count));
  std::int32_t num_columns = 0;
  for (std::int64_t base = 0; base < count; base += kSortThreads) {
    const auto i = static_cast<std::int64_t>(base + threadIdx.x);
    const bool is_first = i < count && (i == 0 || keys[i] != keys[i - 1]);
    std::int32_t found = 0;
    const std::int64_t place = start + num_columns + rank_of(is_first, warp_counts, found);
    num_columns += found;
    if (!is_first) continue;
    double sum = value_at(csr.data, csr.data_type, start + ids[i]);
    for (std::int64_t next = i + 1; next < count && keys[next] == keys[i]; ++next) {
      sum += value_at(csr.data, csr.data_type, start + ids[next]);
    }
    ordered.columns[place] = static_cast<std::int32_t>(~keys[i]);
    ordered.values[place] =
        csr.data_type == DataType::f32 ? static_cast<double>(static_cast<float>(sum)) : sum;
  }
  if (threadIdx.x == 0) ordered.counts[row] = num_columns;
  __syncthreads();
}

__global__ void __launch_bounds__(kSortThreads, 2)
    order_rows_kernel(const DeviceCsr csr, const std::uint8_t* out_of_order, const OrderedRows ordered,
                      const LongRows long_rows) {
  __shared__ std::uint64_t keys[kSharedEntries];
  __shared__ std::uint16_t ids[kSharedEntries];
  __shared__ std::int32_t warp_counts[kWarps];
  for (std::int64_t row = blockIdx.x; row < csr.num_rows; row += gridDim.x) {
    if (out_of_order[row] == 0) continue;
    if (csr.indptr[row + 1] - csr.indptr[row] <= kSharedEntries) {
      order_row(csr, row, ordered, keys, ids, warp_counts);
    } else {
      const std::int64_t place = blockIdx.x * long_rows.longest_row;
      order_row(csr, row, ordered, long_rows.keys + place, long_rows.ids + place, warp_counts);
    }
  }
}

}  // namespace

cudaError_t put_rows_in_order(const DeviceCsr& csr, const std::uint8_t* out_of_order,
                              const OrderedRows& ordered, const LongRows& long_rows, cudaStream_t stream) {
  const std::int64_t blocks = long_rows.num_blocks > 0 ? long_rows.num_blocks : csr.num_rows;
  return launch(order_rows_kernel, blocks, 1, kSortThreads, stream, csr, out_of_order, ordered, long_rows);
}

}  // namespace scfm::cuda
