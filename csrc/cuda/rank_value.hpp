/// Geneformer's rank-value encoding of a CSR block on a GPU: the twin of tokenize/rank_value.hpp, with the
/// same tokens to the last one and the same sums to the last bit.
///
/// Two calls. `check_rows` looks at everything that the second one must trust, and at what it needs to know
/// (how long the longest row is, which rows are out of order); its answer has to be read back, and a block
/// that fails goes no further. `rank_value` then queues five kernels: rows that are out of order are put in
/// order; every row's tokens are counted; offsets are summed; every row is sorted by a block of threads and
/// written where it belongs. Pointers are into the memory of the current device. Not run on a GPU yet: proved
/// by compiling for every architecture and by running these very kernels on the host (tests/cuda).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "base/csr_view.hpp"
#include "tokenize/rank_kernels.hpp"

namespace scfm::cuda {

struct DeviceCsr {
  const std::int64_t* indptr;  // num_rows + 1
  const void* columns;
  ColumnType column_type;
  const void* data;
  DataType data_type;
  std::int64_t num_rows;
  std::int64_t num_entries;
  std::int64_t num_genes;
};

/// What check_rows finds.
struct RowCheck {
  std::int64_t
      bad_offset;  // first place in indptr that does not start at 0, rise and end at num_entries; else -1
  std::int64_t bad_entry;     // first entry with a column out of range; else -1
  std::int64_t num_unsorted;  // rows whose columns do not strictly rise
  std::int64_t longest_row;
};

/// Fills `found` (on the device), and out_of_order[row]: whether the row's columns do not strictly rise.
cudaError_t check_rows(const DeviceCsr& csr, RowCheck* found, std::uint8_t* out_of_order,
                       cudaStream_t stream);

/// sums[row]: the row's library size where the file gives none, as counts/row_sums.hpp.
cudaError_t row_sums(const DeviceCsr& csr, double* sums, cudaStream_t stream);

/// tokenize/gene_table.hpp's GeneTable, and the columns of each summed slot.
struct DeviceGeneTable {
  const double* factors;       // per column; 0 for one that is no token or feeds a sum
  const std::int32_t* tokens;  // per column, then per summed slot
  std::int64_t num_genes;
  std::int64_t num_summed;
  const double* summed_factors;        // per summed slot
  const std::int32_t* summed_offsets;  // num_summed + 1, into summed_columns
  const std::int32_t* summed_columns;  // rising in each slot
  RankArithmetic arithmetic;
};

struct DeviceRankOptions {
  bool keep_zeros;
  std::int64_t max_tokens;  // -1 for no limit
  std::int32_t prefix_token;
  std::int32_t suffix_token;
};

/// Room for rows in order: used only where check_rows found any out of order, else null.
struct OrderedRows {
  std::int32_t* columns;  // num_entries
  double* values;         // num_entries
  std::int32_t* counts;   // num_rows: entries that the row has once equal columns are summed
};

/// Room for rows that are too long for shared memory, for num_blocks of them at once.
struct LongRows {
  std::uint64_t* keys;  // num_blocks * longest_row
  std::uint32_t* ids;   // as many
  std::int64_t longest_row;
  std::int64_t num_blocks;
};

struct RankResult {
  std::int32_t* token_ids;        // room for every row at its longest: see rank_value's capacity on the CPU
  double* counts;                 // as many, x / n * 10,000; or null
  std::int64_t* cu_seqlens;       // num_rows + 1
  std::int32_t* num_gene_tokens;  // per row
  double* mapped_counts;
  double* total_counts;
};

/// How many blocks are to have room for a long row each: 0 where all rows fit shared memory.
std::int64_t num_long_row_blocks(std::int64_t num_rows, std::int64_t longest_row, std::int64_t num_summed);

/// After a check_rows without faults, of the same block.
cudaError_t rank_value(const DeviceCsr& csr, const RowCheck& checked, const std::uint8_t* out_of_order,
                       const double* library_size, const DeviceGeneTable& table,
                       const DeviceRankOptions& options, const OrderedRows& ordered,
                       const LongRows& long_rows, const RankResult& result, cudaStream_t stream);

}  // namespace scfm::cuda
