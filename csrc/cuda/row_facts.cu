/// How many tokens every row becomes, its sums of counts, and where its tokens begin.
#include "cuda/launch.hpp"
#include "cuda/rank_arithmetic.cuh"
#include "cuda/rank_steps.cuh"

namespace scfm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kRowsPerBlock = kThreads / kRowLanes;
constexpr int kScanThreads = 1024;

/// Adds the slots that several columns feed, in their order; each lane works one out at a time.
__device__ void add_slots(const DeviceRow& row, const DeviceGeneTable& table, const RowLane& own,
                          double& mapped, std::int32_t& num_tokens) {
  for (std::int64_t base = 0; base < table.num_summed; base += kRowLanes) {
    std::int32_t first = -1;
    const double mine =
        base + own.lane < table.num_summed ? slot_sum(row, table, base + own.lane, first) : 0.0;
    for (int i = 0; i < kRowLanes && base + i < table.num_summed; ++i) {
      const double sum = __shfl_sync(own.group, mine, i, kRowLanes);
      mapped += sum;
      if (sum != 0.0) ++num_tokens;
    }
  }
}

__global__ void __launch_bounds__(kThreads, 4)
    row_facts_kernel(const ReadableRows rows, const DeviceGeneTable table, const DeviceRankOptions options,
                     const RankResult result) {
  const RowLane own;
  const std::int64_t r = static_cast<std::int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kRowLanes;
  if (r >= rows.csr.num_rows) return;
  const DeviceRow row = rows[r];
  double total = 0.0;
  double mapped = 0.0;
  std::int32_t num_tokens = 0;
  for (std::int64_t i = own.lane; i < row.count; i += kRowLanes) {
    const auto entry = static_cast<std::int32_t>(i);
    const double x = row.value(entry);
    total += x;
    if (table.factors[row.column(entry)] == 0.0) continue;
    mapped += x;
    if (x != 0.0 || options.keep_zeros) ++num_tokens;
  }
  total = own.sum(total);
  mapped = own.sum(mapped);
  num_tokens = own.sum(num_tokens);
  add_slots(row, table, own, mapped, num_tokens);
  if (own.lane != 0) return;
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
  const std::int64_t num_rows = rows.csr.num_rows;
  const cudaError_t error = launch(row_facts_kernel, (num_rows + kRowsPerBlock - 1) / kRowsPerBlock, 1,
                                   kThreads, stream, rows, table, options, result);
  if (error != cudaSuccess) return error;
  return launch(offsets_kernel, 1, 1, kScanThreads, stream, result.cu_seqlens, num_rows);
}

}  // namespace scfm::cuda
