/// Looks at a CSR block before anything is read by it, and sums its rows.
#include "cuda/csr_rows.cuh"
#include "cuda/launch.hpp"

namespace scfm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsPerBlock = kThreads / kWarpSize;
constexpr std::int64_t kRowsPerSum = kThreads / kRowLanes;

/// As memory filled with ones: the largest as unsigned, -1 as signed. The lowest fault is kept.
__device__ void note_fault(std::int64_t* place, std::int64_t found) {
  atomicMin(reinterpret_cast<unsigned long long*>(place), static_cast<unsigned long long>(found));
}

/// Whether the row lies within the entries; notes the first offset that does not.
__device__ bool check_offsets(const DeviceCsr& csr, std::int64_t row, bool is_first_lane, RowCheck* found) {
  const std::int64_t start = csr.indptr[row];
  const std::int64_t stop = csr.indptr[row + 1];
  if (is_first_lane) {
    if (row == 0 && start != 0) note_fault(&found->bad_offset, 0);
    const bool ends_wrong = row + 1 == csr.num_rows && stop != csr.num_entries;
    if (stop < start || stop > csr.num_entries || ends_wrong) note_fault(&found->bad_offset, row + 1);
  }
  return start >= 0 && start <= stop && stop <= csr.num_entries;
}

/// A warp a row.
__global__ void __launch_bounds__(kThreads)
    check_rows_kernel(const DeviceCsr csr, RowCheck* found, std::uint8_t* out_of_order) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarpSize;
  if (csr.num_rows == 0 && threadIdx.x == 0 && csr.num_entries != 0) note_fault(&found->bad_offset, 0);
  if (row >= csr.num_rows || !check_offsets(csr, row, lane == 0, found)) return;
  const std::int64_t start = csr.indptr[row];
  const std::int64_t count = csr.indptr[row + 1] - start;
  bool falls = false;
  for (std::int64_t i = lane; i < count; i += kWarpSize) {
    const std::int64_t column = column_at(csr.columns, csr.column_type, start + i);
    if (column < 0 || column >= csr.num_genes) note_fault(&found->bad_entry, start + i);
    falls = falls || (i > 0 && column <= column_at(csr.columns, csr.column_type, start + i - 1));
  }
  const bool any_falls = __any_sync(kWholeWarp, falls) != 0;
  if (lane != 0) return;
  out_of_order[row] = any_falls ? 1 : 0;
  if (any_falls) atomicAdd(reinterpret_cast<unsigned long long*>(&found->num_unsorted), 1ull);
  atomicMax(reinterpret_cast<unsigned long long*>(&found->longest_row),
            static_cast<unsigned long long>(count));
}

__global__ void __launch_bounds__(kThreads) row_sums_kernel(const DeviceCsr csr, double* sums) {
  const RowLane own;
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kRowsPerSum + threadIdx.x / kRowLanes;
  if (row >= csr.num_rows) return;
  double sum = 0.0;
  for (std::int64_t i = csr.indptr[row] + own.lane; i < csr.indptr[row + 1]; i += kRowLanes) {
    sum += value_at(csr.data, csr.data_type, i);
  }
  sum = own.sum(sum);
  if (own.lane == 0) sums[row] = sum;
}

}  // namespace

cudaError_t check_rows(const DeviceCsr& csr, RowCheck* found, std::uint8_t* out_of_order,
                       cudaStream_t stream) {
  cudaError_t error = cudaMemsetAsync(found, 0xFF, 2 * sizeof(std::int64_t), stream);
  if (error == cudaSuccess) {
    error = cudaMemsetAsync(&found->num_unsorted, 0, 2 * sizeof(std::int64_t), stream);
  }
  if (error != cudaSuccess) return error;
  const std::int64_t blocks = (csr.num_rows + kRowsPerBlock - 1) / kRowsPerBlock;
  return launch(check_rows_kernel, blocks > 0 ? blocks : 1, 1, kThreads, stream, csr, found, out_of_order);
}

cudaError_t row_sums(const DeviceCsr& csr, double* sums, cudaStream_t stream) {
  return launch(row_sums_kernel, (csr.num_rows + kRowsPerSum - 1) / kRowsPerSum, 1, kThreads, stream, csr,
                sums);
}

}  // namespace scfm::cuda
