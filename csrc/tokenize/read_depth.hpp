/// scFoundation's rows: from a block of CSR values straight to packed positions with normalised expression,
/// and behind them the two tokens that tell the read depth: the target T and the source's own, S.
///
///     value = ln(1 + x / total * 10^4);   S = log10(total);   T = a number, log10(total * a), or
///     log10(total) + a
///
/// Positions ascend whatever the order of the columns, and sums are taken in that order, so a cell is the
/// same in any file. Only what is above zero as float32 becomes a token, depth tokens included: that is the
/// authors' rule, and depths_found says where it cost a cell one of them.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/csr_view.hpp"
#include "tokenize/packed_writer.hpp"

namespace scfm {

/// What becomes of a value x.
enum class DepthValues : int {
  per_total,   // ln(1 + x / total * 10^4)
  per_median,  // ln(1 + x / (total / target_sum)): bulk samples at the median depth of their file
  given,       // x itself
};

/// What the depth is the total of.
enum class DepthTotal : int { inputs, outputs, listed };

/// How the target follows from the total.
enum class DepthTarget : int {
  fixed,  // the number
  times,  // log10(total * number)
  plus,   // log10(total) + number
  same,   // the source's
};

struct ReadDepthOptions {
  DepthValues values = DepthValues::per_total;
  DepthTotal total = DepthTotal::inputs;
  std::span<const double> totals;  // for DepthTotal::listed, one a cell
  double target_sum = 1e4;         // for DepthValues::per_median
  bool total_is_logged = true;     // S is log10(total); false: the total itself
  DepthTarget target = DepthTarget::fixed;
  double target_number = 4.0;
  bool single = false;  // quotients and products rounded to float32, as of a float32 matrix
};

struct ReadDepthResult {
  MallocArray<std::int32_t> token_ids;  // positions; num_positions is T, num_positions + 1 is S
  MallocArray<float> values;
  std::vector<std::int64_t> cu_seqlens;  // num_cells + 1 offsets
  // Per cell; 0, and no tokens at all, where no gene stands in front of the last two tokens.
  std::vector<std::int32_t> num_gene_tokens;
  std::vector<double> mapped_counts;  // sum of the values in columns that have a position
  std::vector<double> total_counts;   // sum of all values
  std::vector<float> target_depth;    // T and S of each cell, kept as tokens or not
  std::vector<float> source_depth;
};

/// column_position: per column its position, or -1; columns of one position are summed. Throws
/// InvalidArgument for arrays and options that do not fit, and for a value that is negative or not finite as
/// float32, naming its row.
ReadDepthResult read_depth(const CsrView& csr, std::span<const std::int32_t> column_position,
                           std::int64_t num_positions, const ReadDepthOptions& options);

}  // namespace scfm
