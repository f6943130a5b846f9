/// Every row sorted by one block of threads, and written where its tokens belong.
#include "cuda/block_sort.cuh"
#include "cuda/launch.hpp"
#include "cuda/rank_arithmetic.cuh"
#include "cuda/rank_steps.cuh"

namespace scfm::cuda {
namespace {

constexpr std::int64_t kMostIds16 = 65536;
constexpr std::int64_t kBlocksWithRoom = 264;               // two for each multiprocessor of an H200
constexpr std::int64_t kRoomBytes = std::int64_t{1} << 28;  // for all of them
constexpr std::int64_t kPairBytes = sizeof(std::uint64_t) + sizeof(std::uint32_t);

/// Ids reach from the entries of a row over the summed slots.
__host__ __device__ inline bool fits_shared(std::int64_t num_entries, std::int64_t num_summed) {
  return num_entries <= kSharedEntries && num_entries + num_summed <= kMostIds16;
}

struct RankArguments {
  ReadableRows rows;
  const double* library_size;
  DeviceGeneTable table;
  DeviceRankOptions options;
  RankResult result;
};

/// A key for every entry of the row, and for every summed slot in the place of its first entry, which by
/// itself is no token. Ids are places of entries, then numbers of slots: the order of ties.
template <class Id>
__device__ void find_keys(const RankArguments& a, const DeviceRow& row, const RowScale& scale,
                          std::uint64_t* keys, Id* ids) {
  const auto thread = static_cast<std::int32_t>(threadIdx.x);
  const auto num_threads = static_cast<std::int32_t>(blockDim.x);
  for (std::int64_t i = thread; i < row.count; i += num_threads) {
    const auto entry = static_cast<std::int32_t>(i);
    const double factor = a.table.factors[row.column(entry)];
    const double x = row.value(entry);
    const bool is_token = factor != 0.0 && (x != 0.0 || a.options.keep_zeros);
    keys[entry] = is_token ? key_of(scale.ranked_value(x, factor)) : kNoToken;
    ids[entry] = static_cast<Id>(entry);
  }
  if (a.table.num_summed == 0) return;
  __syncthreads();
  for (std::int64_t slot = thread; slot < a.table.num_summed; slot += num_threads) {
    std::int32_t place = -1;
    const double sum = slot_sum(row, a.table, slot, place);
    if (sum == 0.0) continue;
    keys[place] = key_of(scale.ranked_value(sum, a.table.summed_factors[slot]));
    ids[place] = static_cast<Id>(row.count + slot);
  }
}

/// The token of one rank, and its count where that is wanted.
template <class Id>
__device__ void write_token(const RankArguments& a, const DeviceRow& row, const RowScale& scale, Id id,
                            std::int64_t place) {
  const std::int64_t slot = static_cast<std::int64_t>(id) - row.count;
  const bool is_sum = slot >= 0;
  const std::int64_t gene = is_sum ? a.table.num_genes + slot : row.column(static_cast<std::int32_t>(id));
  a.result.token_ids[place] = a.table.tokens[gene];
  if (a.result.counts == nullptr) return;
  std::int32_t first = -1;
  const double x = is_sum ? slot_sum(row, a.table, slot, first) : row.value(static_cast<std::int32_t>(id));
  a.result.counts[place] = scale.count_per_10k(x);
}

__device__ void write_special(const RankArguments& a, std::int32_t token, std::int64_t place) {
  a.result.token_ids[place] = token;
  if (a.result.counts != nullptr) a.result.counts[place] = 0.0;
}

template <class Id>
__device__ void rank_row(const RankArguments& a, std::int64_t r, const DeviceRow& row, std::uint64_t* keys,
                         Id* ids) {
  const std::int64_t begin = a.result.cu_seqlens[r];
  const std::int64_t end = a.result.cu_seqlens[r + 1];
  if (begin == end) return;
  const RowScale scale(a.table.arithmetic, a.library_size[r]);
  find_keys(a, row, scale, keys, ids);
  sort_in_block(keys, ids, static_cast<std::uint32_t>(row.count));
  const std::int64_t first = begin + (a.options.prefix_token >= 0 ? 1 : 0);
  const std::int64_t num_kept = end - begin - num_specials(a.options);
  for (std::int64_t rank = threadIdx.x; rank < num_kept; rank += blockDim.x) {
    write_token(a, row, scale, ids[rank], first + rank);
  }
  if (threadIdx.x == 0) {
    if (a.options.prefix_token >= 0) write_special(a, a.options.prefix_token, begin);
    if (a.options.suffix_token >= 0) write_special(a, a.options.suffix_token, end - 1);
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kSortThreads, 2)
    rank_rows_kernel(const RankArguments a, const LongRows long_rows) {
  __shared__ std::uint64_t keys[kSharedEntries];
  __shared__ std::uint16_t ids[kSharedEntries];
  for (std::int64_t r = blockIdx.x; r < a.rows.csr.num_rows; r += gridDim.x) {
    const DeviceRow row = a.rows[r];
    if (fits_shared(row.count, a.table.num_summed)) {
      rank_row(a, r, row, keys, ids);
    } else {
      const std::int64_t place = blockIdx.x * long_rows.longest_row;
      rank_row(a, r, row, long_rows.keys + place, long_rows.ids + place);
    }
  }
}

}  // namespace

std::int64_t num_long_row_blocks(std::int64_t num_rows, std::int64_t longest_row, std::int64_t num_summed) {
  if (fits_shared(longest_row, num_summed)) return 0;
  const std::int64_t with_room = kRoomBytes / (longest_row * kPairBytes);
  const std::int64_t most = with_room < kBlocksWithRoom ? with_room : kBlocksWithRoom;
  const std::int64_t blocks = most < 1 ? 1 : most;
  return num_rows < blocks ? num_rows : blocks;
}

cudaError_t rank_rows(const ReadableRows& rows, const double* library_size, const DeviceGeneTable& table,
                      const DeviceRankOptions& options, const LongRows& long_rows, std::int64_t longest_row,
                      const RankResult& result, cudaStream_t stream) {
  const std::int64_t blocks = long_rows.num_blocks > 0 ? long_rows.num_blocks : rows.csr.num_rows;
  const int threads = longest_row <= 256 ? 128 : longest_row <= 1024 ? 256 : kSortThreads;
  const RankArguments arguments{rows, library_size, table, options, result};
  return launch(rank_rows_kernel, blocks, 1, threads, stream, arguments, long_rows);
}

cudaError_t rank_value(const DeviceCsr& csr, const RowCheck& checked, const std::uint8_t* out_of_order,
                       const double* library_size, const DeviceGeneTable& table,
                       const DeviceRankOptions& options, const OrderedRows& ordered,
                       const LongRows& long_rows, const RankResult& result, cudaStream_t stream) {
  const ReadableRows rows{csr, out_of_order, checked.num_unsorted > 0 ? ordered : OrderedRows{}};
  cudaError_t error = cudaSuccess;
  if (checked.num_unsorted > 0) error = put_rows_in_order(csr, out_of_order, ordered, long_rows, stream);
  if (error == cudaSuccess) error = find_row_facts(rows, table, options, result, stream);
  if (error == cudaSuccess) {
    error = rank_rows(rows, library_size, table, options, long_rows, checked.longest_row, result, stream);
  }
  return error;
}

}  // namespace scfm::cuda
