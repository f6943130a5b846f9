/// Binning of values that lie packed already, cell by cell: what training objectives, other modalities and
/// the authors' preprocessing ask for. The rules are those of value_bins; zeros stay 0 and take no part.
#pragma once

#include <cstdint>
#include <span>

#include "tokenize/value_bins.hpp"

namespace scfm {

struct PackedValues {
  DataType type = DataType::f32;  // f32 or f64
  const void* values = nullptr;
  std::int64_t num_values = 0;
  std::span<const std::int64_t> offsets;    // num_cells + 1
  std::span<const std::int32_t> token_ids;  // for BinRule::seeded: what the values belong to
};

/// bins: one a value, written. draws: for BinRule::given, uniform in [0, 1), one for each value that is not
/// zero, in order. Throws InvalidArgument for what does not fit, and for values below 0 or not finite.
void bin_values(const PackedValues& packed, std::span<const double> quantiles, BinRule rule,
                const DrawKey& key, std::span<const double> draws, std::span<std::int32_t> bins);

/// edges: num_cells x quantiles, written, 0 for a cell without values; left, right: how many edges are <= and
/// < each value, 0 for zeros.
void value_edges(const PackedValues& packed, std::span<const double> quantiles, std::span<double> edges,
                 std::span<std::int32_t> left, std::span<std::int32_t> right);

/// chosen: one a token, 1 for num_chosen[c] tokens of cell c, every set of them equally likely, else 0,
/// written. The first num_spared tokens of a cell are never chosen. Depends on key, purpose and cell id only.
/// Throws InvalidArgument where a cell has too few tokens.
void choose_tokens(std::span<const std::int32_t> cu_seqlens, std::span<const std::int64_t> cell_ids,
                   std::span<const std::int32_t> num_chosen, std::int64_t num_spared, const DrawKey& key,
                   std::uint32_t purpose, std::span<std::uint8_t> chosen);

}  // namespace scfm
