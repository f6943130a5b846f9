/// What rank_value needs to know of each column, laid out for one look-up per entry.
///
/// Genes live in slots. The first num_single slots are fed by one column each, in the order of the columns; a
/// later slot sums several columns (several symbols of one gene). Equal values rank in the order of slots.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "tokenize/rank_kernels.hpp"

namespace scfm {

struct GeneSlots {
  std::span<const std::int32_t> column_slot;  // per column: its slot, or -1 if it is no token
  std::span<const std::int32_t> slot_token;
  std::span<const double> slot_median;
  std::int64_t num_single = 0;
};

struct GeneTable {
  std::int64_t num_genes = 0;
  std::int64_t num_single = 0;
  std::int64_t num_summed = 0;
  RankArithmetic arithmetic = RankArithmetic::multiply64;
  std::span<const std::int32_t> column_slot;
  std::vector<double> factors;         // per column; 0 for one that is no token or feeds a sum
  std::vector<double> summed_factors;  // per summed slot
  std::vector<std::int32_t> tokens;    // per column, then per summed slot at num_genes + its number
};

/// Throws InvalidArgument where slots, columns and medians do not fit together. Sums are float64 in the
/// authors' code and draw the whole matrix along: with summed slots the arithmetic becomes 64-bit.
GeneTable make_gene_table(const GeneSlots& slots, RankArithmetic arithmetic);

}  // namespace scfm
