/// Counts as a shallower sequencing run would have found them: each unit of a count is kept with a
/// probability that is one number a cell.
///
///     share ~ Beta(2, 2) for deep cells, half of the time;   x' ~ Binomial(x, share)
///
/// Draws are Philox's, counted by (unit, gene, cell), so they depend on the seed, the epoch, the cell and the
/// gene's column alone. Source: scFoundation's read-depth-aware pre-training, as its paper describes it.
#pragma once

#include <cstdint>
#include <span>

#include "base/csr_view.hpp"

namespace scfm {

struct ThinningKey {
  std::uint64_t seed = 0;
  std::uint32_t epoch = 0;
};

/// The share of each cell: 1 below min_total counts, else with `probability` a draw from Beta(2, 2), else 1.
/// Throws InvalidArgument where sizes differ or probability is not from 0 to 1.
void draw_shares(std::span<const double> totals, std::span<const std::int64_t> cell_ids, double min_total,
                 double probability, const ThinningKey& key, std::span<double> shares);

/// Writes Binomial(x, share of the cell) for every value x of the block. Throws InvalidArgument naming the
/// row of a value that is no whole number from 0 to 2^53, or of a share that is not from 0 to 1.
void thin_counts(const CsrView& csr, std::span<const std::int64_t> cell_ids, std::span<const double> shares,
                 const ThinningKey& key, std::span<double> thinned);

}  // namespace scfm
