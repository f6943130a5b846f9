/// The steps of rank_value, one file each.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/csr_rows.cuh"
#include "cuda/rank_value.hpp"

namespace scfm::cuda {

/// A row of up to this many entries is sorted in shared memory: 40 KB of pairs, what a block has without
/// asking for more. Two blocks of 512 threads, as many as the registers allow, then fit any multiprocessor.
inline constexpr std::int64_t kSharedEntries = 4096;
inline constexpr int kSortThreads = 512;

/// ordered: the rows that are out of order, in order, with equal columns summed.
cudaError_t put_rows_in_order(const DeviceCsr& csr, const std::uint8_t* out_of_order,
                              const OrderedRows& ordered, const LongRows& long_rows, cudaStream_t stream);

/// Sums, numbers of tokens, and cu_seqlens.
cudaError_t find_row_facts(const ReadableRows& rows, const DeviceGeneTable& table,
                           const DeviceRankOptions& options, const RankResult& result, cudaStream_t stream);

/// token_ids and counts, where cu_seqlens says.
cudaError_t rank_rows(const ReadableRows& rows, const double* library_size, const DeviceGeneTable& table,
                      const DeviceRankOptions& options, const LongRows& long_rows, std::int64_t longest_row,
                      const RankResult& result, cudaStream_t stream);

}  // namespace scfm::cuda
