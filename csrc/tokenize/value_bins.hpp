/// scGPT's value binning: from a block of CSR values straight to packed token ids and bins.
///
/// A cell's non-zero values of genes with a token are cut at their own quantiles; a value that several edges
/// fall on gets one of the bins between them (at random, as the authors' code does, or the highest). What
/// exceeds max_tokens is left out at random, or the least expressed is, after binning, so the bins of a gene
/// do not depend on the length. Values are taken as float32, which is what the authors' data set makes of
/// them.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/csr_view.hpp"
#include "tokenize/packed_writer.hpp"
#include "tokenize/value_bins_random.hpp"

namespace scfm {

/// Which of a cell's tokens stay when there are too many.
enum class KeptTokens : int { any, largest };

/// Which of the possible bins a value gets.
enum class BinRule : int {
  left,    // the highest: the number of edges <= the value
  seeded,  // one of right + 1 .. left at random
  given,   // ceil(u * (right - left) + left) for the u given: the authors' arithmetic
};

/// Genes live in slots: slot_token names the token of each, column_slot the slot of each column or -1.
/// Columns of one slot are summed. Tokens of a cell come in the order of their slots.
struct TokenSlots {
  std::span<const std::int32_t> column_slot;
  std::span<const std::int32_t> slot_token;
};

struct ValueBinsOptions {
  std::span<const double> quantiles;  // of the edges, ascending, 0 to 1; empty: values stay as they are
  BinRule rule = BinRule::seeded;
  std::span<const double> draws;               // for BinRule::given: u of each value that is binned, in order
  std::span<const std::int64_t> draw_offsets;  // num_cells + 1: where each cell's begin
  KeptTokens kept = KeptTokens::any;
  std::int64_t max_tokens = -1;    // per cell, the prefix included; -1 for no limit
  std::int32_t prefix_token = -1;  // -1 for none
  float prefix_value = 0.0f;
  bool with_zeros = false;  // every slot is a token, with value 0 where the cell has nothing
  DrawKey key;
};

struct ValueBinsResult {
  MallocArray<std::int32_t> token_ids;   // packed
  MallocArray<float> values;             // bins from 1, or values; 0 for nothing
  std::vector<std::int64_t> cu_seqlens;  // num_cells + 1 offsets; a cell without gene tokens has length 0
  std::vector<std::int32_t> num_gene_tokens;  // before cutting, without the prefix
  std::vector<double> mapped_counts;          // sum of the values in columns that have a slot
  std::vector<double> total_counts;           // sum of all values
};

/// Throws InvalidArgument for arrays and options that do not fit, and for a value that is negative or not
/// finite as float32, naming its row.
ValueBinsResult value_bins(const CsrView& csr, const TokenSlots& slots, const ValueBinsOptions& options);

}  // namespace scfm
