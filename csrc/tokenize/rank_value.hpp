/// Geneformer's rank-value encoding: from a block of counts straight to packed token ids.
///
/// A cell's genes are ordered by their share of the cell's counts relative to the gene's median over many
/// cells, highest first, equal ones in the order of the slots; then cut to length and put between the special
/// tokens. Values agree bit for bit with the authors' numpy and scipy arithmetic (RankArithmetic names
/// which).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/csr_view.hpp"
#include "tokenize/gene_table.hpp"
#include "tokenize/packed_writer.hpp"

namespace scfm {

struct RankValueOptions {
  RankArithmetic arithmetic = RankArithmetic::multiply64;
  bool keep_zeros = true;          // stored zeros of single slots are tokens, ranked last
  std::int64_t max_tokens = -1;    // per cell, special tokens included; -1 for no limit
  std::int32_t prefix_token = -1;  // -1 for none
  std::int32_t suffix_token = -1;
  bool with_counts = false;
};

struct RankValueResult {
  MallocArray<std::int32_t> token_ids;  // packed
  MallocArray<double> counts;           // x / n * 10000 of each token, 0 at special ones; empty if not wanted
  std::vector<std::int64_t> cu_seqlens;  // num_cells + 1 offsets; a cell without gene tokens has length 0
  std::vector<std::int32_t> num_gene_tokens;  // before cutting, without special tokens
  std::vector<double> mapped_counts;          // counts in columns that have a slot
  std::vector<double> total_counts;           // counts in all columns
};

/// library_size: one per cell. Meant for blocks that passed check_csr; on any other it stays within the
/// arrays and throws InvalidArgument for broken indptr and columns out of range. Values that are negative or
/// not finite rank somewhere.
RankValueResult rank_value(const CsrView& csr, std::span<const double> library_size, const GeneSlots& slots,
                           const RankValueOptions& options);

}  // namespace scfm
