/// How many tokens every row becomes, its sums of counts, and where its tokens begin.
#include "cuda/launch.hpp"
#include "cuda/rank_arithmetic.cuh"
#include "cuda/rank_kernels.hpp"

namespace scfm::cuda {
namespace {

constexpr int kWarpSize = 32;
constexpr unsigned kWholeWarp = 0xFFFFFFFFu;
constexpr int kThreads = 256;
constexpr int kLanes = 8;  // of a row: entry i belongs to lane i % 8, as on the CPU, so that sums round alike
constexpr int kScanThreads = 1024;

/// ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7)), in all eight lanes.
template <class Number>
__device__ Number sum_of_lanes(unsigned group, Number x) {
  for (int offset = kLanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(group, x, offset);
  return x;
}

/// Adds the slots that several columns feed, in their order; each lane works one out at a time.
__device__ void add_slots(const DeviceRow& row, const DeviceGeneTable& table, unsigned group, int lane,
                          double& mapped, std::int32_t& num_tokens) {
  for (std::int64_t base = 0; base < table.num_summed; base += kLanes) {
    std::int32_t first = -1;
    const double own = base + lane < table.num_summed ? slot_sum(row, table, base + lane, first) : 0.0;
    for (int i = 0; i < kLanes && base + i < table.num_summed; ++i) {
      const double sum = __shfl_sync(group, own, i, kLanes);
      mapped += sum;
      if (sum != 0.0) ++num_tokens;
    }
  }
}

__global__ void __launch_bounds__(kThreads, 4)
    row_facts_kernel(const ReadableRows rows, const DeviceGeneTable table, const DeviceRankOptions options,
                     const RankResult result) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const std::int64_t r = static_cast<std::int64_t>(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
  if (r >= rows.csr.num_rows) return;
  const unsigned group = 0xFFu << (threadIdx.x % kWarpSize - lane);
  const DeviceRow row = rows[r];
  double total = 0.0;
  double mapped = 0.0;
  std::int32_t num_tokens = 0;
  for (std::int32_t i = lane; i < row.count; i += kLanes) {
    const double x = row.value(i);
    total += x;
    if (table.factors[row.column(i)] == 0.0) continue;
    mapped += x;
    if (x != 0.0 || options.keep_zeros) ++num_tokens;
  }
  total = sum_of_lanes(group, total);
  mapped = sum_of_lanes(group, mapped);
  num_tokens = sum_of_lanes(group, num_tokens);
  add_slots(row, table, group, lane, mapped, num_tokens);
  if (lane != 0) return;
  result.total_counts[r] = total;
  result.mapped_counts[r] = mapped;
  result.num_gene_tokens[r] = num_tokens;
  const std::int64_t specials = num_specials(options);
  std::int64_t kept = num_tokens;
  if (options.max_tokens >= 0 && kept > options.max_tokens - specials) kept = options.max_tokens - specials;
  result.cu_seqlens[r + 1] = num_tokens == 0 ? 0 : kept + specials;
}

/// Lengths become offsets, in one block: reading them is nothing beside the rows, and the order is one.
__global__ void __launch_bounds__(kScanThreads, 1)
    offsets_kernel(std::int64_t* offsets, std::int64_t num_rows) {
  __shared__ std::int64_t warp_sums[kScanThreads / kWarpSize];
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  std::int64_t before = 0;
  for (std::int64_t base = 1; base <= num_rows; base += kScanThreads) {
    const std::int64_t row = base + threadIdx.x;
    std::int64_t sum = row <= num_rows ? offsets[row] : 0;
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const std::int64_t other = __shfl_up_sync(kWholeWarp, sum, offset);
      if (lane >= offset) sum += other;
    }
    if (lane == kWarpSize - 1) warp_sums[warp] = sum;
    __syncthreads();
    for (int w = 0; w < warp; ++w) sum += warp_sums[w];
    if (row <= num_rows) offsets[row] = before + sum;
    for (int w = 0; w < kScanThreads / kWarpSize; ++w) before += warp_sums[w];
    __syncthreads();
  }
  if (threadIdx.x == 0) offsets[0] = 0;
}

}  // namespace

cudaError_t find_row_facts(const ReadableRows& rows, const DeviceGeneTable& table,
                           const DeviceRankOptions& options, const RankResult& result, cudaStream_t stream) {
  constexpr std::int64_t kRows = kThreads / kLanes;
  const std::int64_t num_rows = rows.csr.num_rows;
  const cudaError_t error = launch(row_facts_kernel, (num_rows + kRows - 1) / kRows, 1, kThreads, stream,
                                   rows, table, options, result);
  if (error != cudaSuccess) return error;
  return launch(offsets_kernel, 1, 1, kScanThreads, stream, result.cu_seqlens, num_rows);
}

}  // namespace scfm::cuda
