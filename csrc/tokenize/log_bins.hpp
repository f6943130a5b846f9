/// scBERT's tokens: from a block of CSR values straight to panel positions and the bins of their expression.
///
///     v = log2(1 + 10,000 c / N);   bin = min(floor(v), 5)
///
/// with c a gene's count and N the cell's total over the panel. For counts the bin is the number of k in 1..5
/// with 10,000 c >= (2^k - 1) N: five exact comparisons, no logarithm and no rounding. Values that are not
/// whole go through float32, as the authors' preprocessing does. Only bins above 0 are written; every
/// position that is not written has bin 0.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/csr_view.hpp"
#include "tokenize/packed_writer.hpp"

namespace scfm {

inline constexpr int kHighestLogBin = 5;

struct LogBinsOptions {
  std::span<const std::int32_t> column_position;  // of each column on the panel, or -1; no position twice
  std::int32_t panel_size = 0;
  bool already_logged = false;  // values are v: they are only cut and truncated
};

struct LogBinsResult {
  MallocArray<std::int32_t> token_ids;        // panel positions, ascending in each cell
  MallocArray<float> values;                  // bins, 1 to 5
  std::vector<std::int64_t> cu_seqlens;       // num_cells + 1 offsets
  std::vector<std::int32_t> num_panel_genes;  // with a value above 0, whatever their bin
  std::vector<double> mapped_counts;          // N
  std::vector<double> total_counts;           // sum of all values
};

/// Throws InvalidArgument for arrays that do not fit together and for a value that is negative or not finite,
/// naming its row.
LogBinsResult log_bins(const CsrView& csr, const LogBinsOptions& options);

}  // namespace scfm
