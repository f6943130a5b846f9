#include "tokenize/read_depth_thinning.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <string>

#include "base/philox.hpp"
#include "cpu/thread_pool.hpp"

namespace scfm {
namespace {

// Purposes keep the streams of one seed apart.
constexpr std::uint32_t kDrawShare = 0x73686172u;  // "shar"
constexpr std::uint32_t kDrawUnits = 0x756e6974u;  // "unit"
constexpr std::uint32_t kEpochFactor = 0x9E3779B9u;
constexpr std::int64_t kEntriesPerTask = 1 << 14;
constexpr double kTwoTo32 = 4294967296.0;
constexpr double kHighest = 9007199254740992.0;  // 2^53: whole numbers above it are not all there
// Up to this count every unit is drawn by itself; above, the number kept is found by inverting its
// distribution.
constexpr double kUnitByUnit = 64.0;

PhiloxCounter words_of(std::uint32_t purpose, std::uint32_t block, std::uint32_t column, std::int64_t cell,
                       const ThinningKey& key) noexcept {
  const auto id = static_cast<std::uint64_t>(cell);
  return philox4x32({block, column, static_cast<std::uint32_t>(id), static_cast<std::uint32_t>(id >> 32)},
                    {static_cast<std::uint32_t>(key.seed) ^ purpose,
                     static_cast<std::uint32_t>(key.seed >> 32) ^ (key.epoch * kEpochFactor)});
}

double uniform(std::uint32_t word) noexcept { return (static_cast<double>(word) + 0.5) / kTwoTo32; }

double log_choose(double n, double k) noexcept {
  return std::lgamma(n + 1.0) - std::lgamma(k + 1.0) - std::lgamma(n - k + 1.0);
}

/// Inverts Binomial(n, p) with its outcomes in the order mode, mode + 1, mode - 1, mode + 2, ...
double binomial(double n, double p, double u) noexcept {
  const double mode = std::min(std::floor((n + 1.0) * p), n);
  const double odds = p / (1.0 - p);
  const double peak = std::exp(log_choose(n, mode) + mode * std::log(p) + (n - mode) * std::log1p(-p));
  double above = mode, below = mode, at_above = peak, at_below = peak;
  u -= peak;
  while (u > 0.0 && (above < n || below > 0.0)) {
    if (above < n) {
      at_above *= (n - above) / (above + 1.0) * odds;
      above += 1.0;
      u -= at_above;
      if (u <= 0.0) return above;
    }
    if (below > 0.0) {
      at_below *= below / ((n - below + 1.0) * odds);
      below -= 1.0;
      u -= at_below;
      if (u <= 0.0) return below;
    }
    if (at_above + at_below < 1e-300) break;  // what is left of u is rounding
  }
  return mode;
}

double kept_units(double count, double share, std::uint32_t column, std::int64_t cell,
                  const ThinningKey& key) noexcept {
  if (share >= 1.0) return count;
  if (share <= 0.0) return 0.0;
  if (count > kUnitByUnit) {
    const PhiloxCounter words = words_of(kDrawUnits, 0, column, cell, key);
    return binomial(count, share, (static_cast<double>(words[0]) + uniform(words[1])) / kTwoTo32);
  }
  const auto below = static_cast<std::uint64_t>(share * kTwoTo32);
  const auto units = static_cast<std::uint32_t>(count);
  std::uint32_t kept = 0;
  PhiloxCounter words{};
  for (std::uint32_t unit = 0; unit < units; ++unit) {
    if (unit % 4 == 0) words = words_of(kDrawUnits, unit / 4, column, cell, key);
    kept += words[unit % 4] < below ? 1 : 0;
  }
  return static_cast<double>(kept);
}

[[noreturn]] void fail(const char* function, const std::string& message) {
  throw InvalidArgument(std::string(function) + ": " + message);
}

void check_cells(const CsrView& csr, std::span<const std::int64_t> cell_ids, std::span<const double> shares,
                 std::size_t num_thinned) {
  constexpr const char* kFunction = "thin_counts";
  require_indptr(csr.indptr, csr.num_data, kFunction);
  if (csr.num_columns != csr.num_data || num_thinned != static_cast<std::size_t>(csr.num_data)) {
    fail(kFunction, "indices has " + std::to_string(csr.num_columns) + " entries, expected " +
                        std::to_string(csr.num_data) + " as in data");
  }
  const auto num_rows = static_cast<std::size_t>(csr.num_rows());
  if (cell_ids.size() != num_rows || shares.size() != num_rows) {
    fail(kFunction, "cell_ids and shares have " + std::to_string(cell_ids.size()) + " and " +
                        std::to_string(shares.size()) + " entries, expected " + std::to_string(num_rows) +
                        ", one per cell");
  }
  for (std::size_t row = 0; row < num_rows; ++row) {
    if (shares[row] >= 0.0 && shares[row] <= 1.0) continue;
    fail(kFunction,
         "shares[" + std::to_string(row) + "] = " + std::to_string(shares[row]) + ", expected 0 to 1");
  }
}

}  // namespace

void draw_shares(std::span<const double> totals, std::span<const std::int64_t> cell_ids, double min_total,
                 double probability, const ThinningKey& key, std::span<double> shares) {
  constexpr const char* kFunction = "draw_shares";
  if (totals.size() != cell_ids.size() || shares.size() != cell_ids.size()) {
    fail(kFunction, "totals has " + std::to_string(totals.size()) + " entries, expected " +
                        std::to_string(cell_ids.size()) + " as in cell_ids");
  }
  if (!(probability >= 0.0 && probability <= 1.0)) {
    fail(kFunction, "probability = " + std::to_string(probability) + ", expected 0 to 1");
  }
  for (std::size_t cell = 0; cell < totals.size(); ++cell) {
    const PhiloxCounter words = words_of(kDrawShare, 0, 0, cell_ids[cell], key);
    shares[cell] = 1.0;
    if (totals[cell] < min_total || uniform(words[3]) >= probability) continue;
    // The middle one of three uniform numbers has the distribution Beta(2, 2).
    const std::uint32_t low = std::min(words[0], words[1]);
    const std::uint32_t high = std::max(words[0], words[1]);
    shares[cell] = uniform(std::clamp(words[2], low, high));
  }
}

void thin_counts(const CsrView& csr, std::span<const std::int64_t> cell_ids, std::span<const double> shares,
                 const ThinningKey& key, std::span<double> thinned) {
  check_cells(csr, cell_ids, shares, thinned.size());
  const std::int64_t rows = rows_per_task(csr, kEntriesPerTask);
  parallel_for((csr.num_rows() + rows - 1) / rows, num_threads(), [&](std::int64_t task, int) {
    for (std::int64_t row = task * rows; row < std::min((task + 1) * rows, csr.num_rows()); ++row) {
      const auto r = static_cast<std::size_t>(row);
      with_data(csr.data_type, csr.data, [&](const auto* values) {
        with_columns(csr.column_type, csr.columns, [&](const auto* columns) {
          for (std::int64_t i = csr.indptr[r]; i < csr.indptr[r + 1]; ++i) {
            const auto count = static_cast<double>(values[i]);
            if (!(count >= 0.0 && count <= kHighest && std::trunc(count) == count)) {
              fail("thin_counts", "row " + std::to_string(row) + " has " + std::to_string(count) +
                                      ", expected a whole number from 0 to 2^53");
            }
            thinned[static_cast<std::size_t>(i)] =
                kept_units(count, shares[r], static_cast<std::uint32_t>(columns[i]), cell_ids[r], key);
          }
        });
      });
    }
  });
}

}  // namespace scfm
