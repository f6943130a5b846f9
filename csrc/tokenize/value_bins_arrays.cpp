#include "tokenize/value_bins_arrays.hpp"

#include <algorithm>
#include <cmath>
#include <string>

#include "cpu/thread_pool.hpp"
#include "tokenize/rank_dispatch.hpp"
#include "tokenize/value_bins_dispatch.hpp"
#include "tokenize/value_bins_edges.hpp"

namespace scfm {
namespace {

constexpr std::int64_t kCellsPerTask = 16;

void check(const PackedValues& packed, const std::string& function) {
  const auto fail = [&](const std::string& message) { throw InvalidArgument(function + ": " + message); };
  require_indptr(packed.offsets, packed.num_values, function);
  if (packed.type != DataType::f32 && packed.type != DataType::f64) fail("values must be float32 or float64");
  if (!packed.token_ids.empty() && static_cast<std::int64_t>(packed.token_ids.size()) != packed.num_values) {
    fail("token_ids has " + std::to_string(packed.token_ids.size()) + " entries, expected " +
         std::to_string(packed.num_values) + " as in values");
  }
}

/// The non-zero values of one cell, and where they stand.
template <class Value>
struct Expressed {
  std::vector<Value> values;
  std::vector<std::int64_t> positions;
  Value highest = 0;
  bool whole = true;

  void gather(const Value* all, std::int64_t first, std::int64_t last, std::size_t cell,
              const std::string& function) {
    values.clear();
    positions.clear();
    highest = 0;
    whole = true;
    for (std::int64_t i = first; i < last; ++i) {
      const Value value = all[i];
      if (!(value >= 0) || !std::isfinite(value)) {
        throw InvalidArgument(function + ": values[" + std::to_string(i) + "] = " + std::to_string(value) +
                              " in cell " + std::to_string(cell) + ", expected a finite number from 0");
      }
      if (value == 0) continue;
      values.push_back(value);
      positions.push_back(i);
      highest = std::max(highest, value);
      whole = whole && std::trunc(value) == value;
    }
  }
};

/// Calls use(cell, edges, expressed, ranges) for every cell that has a value, on any thread.
template <class Value, class Use>
void for_each_cell(const PackedValues& packed, std::span<const double> quantiles, const std::string& function,
                   Use&& use) {
  const auto num_cells = static_cast<std::int64_t>(packed.offsets.size()) - 1;
  const auto* all = static_cast<const Value*>(packed.values);
  parallel_for((num_cells + kCellsPerTask - 1) / kCellsPerTask, num_threads(), [&](std::int64_t task, int) {
    CellEdges<Value> edges(quantiles, active_rank_kernels(), active_value_bins_kernels());
    Expressed<Value> cell_values;
    const std::int64_t stop = std::min((task + 1) * kCellsPerTask, num_cells);
    for (std::int64_t cell = task * kCellsPerTask; cell < stop; ++cell) {
      const auto c = static_cast<std::size_t>(cell);
      cell_values.gather(all, packed.offsets[c], packed.offsets[c + 1], c, function);
      if (cell_values.values.empty()) continue;
      const BinRange* ranges =
          edges.find(cell_values.values.data(), static_cast<std::int64_t>(cell_values.values.size()),
                     cell_values.highest, cell_values.whole);
      use(c, edges, cell_values, ranges);
    }
  });
}

/// Where each cell's draws begin among those of all non-zero values.
template <class Value>
std::vector<std::int64_t> draw_offsets(const PackedValues& packed) {
  const auto* all = static_cast<const Value*>(packed.values);
  std::vector<std::int64_t> offsets(packed.offsets.size());
  for (std::size_t cell = 0; cell + 1 < offsets.size(); ++cell) {
    const Value* first = all + packed.offsets[cell];
    const Value* last = all + packed.offsets[cell + 1];
    offsets[cell + 1] = offsets[cell] + ((last - first) - std::count(first, last, Value{0}));
  }
  return offsets;
}

template <class Value>
std::uint64_t fingerprint_of(const PackedValues& packed, const Expressed<Value>& cell, std::size_t number) {
  std::vector<std::int32_t> tokens;
  std::vector<float> values;
  for (std::size_t i = 0; i < cell.values.size(); ++i) {
    const std::int64_t position = cell.positions[i];
    tokens.push_back(packed.token_ids.empty() ? static_cast<std::int32_t>(position - packed.offsets[number])
                                              : packed.token_ids[static_cast<std::size_t>(position)]);
    values.push_back(static_cast<float>(cell.values[i]));
  }
  return scfm::fingerprint_of(tokens.data(), values.data(), static_cast<std::int64_t>(values.size()));
}

template <class Value>
void bin_as(const PackedValues& packed, std::span<const double> quantiles, BinRule rule, const DrawKey& key,
            std::span<const double> draws, std::span<std::int32_t> bins) {
  std::vector<std::int64_t> starts;
  if (rule == BinRule::given) {
    starts = draw_offsets<Value>(packed);
    if (starts.back() != static_cast<std::int64_t>(draws.size())) {
      throw InvalidArgument("bin_values: draws has " + std::to_string(draws.size()) + " entries, expected " +
                            std::to_string(starts.back()) + ", one for each value that is not 0");
    }
  }
  std::fill(bins.begin(), bins.end(), 0);
  for_each_cell<Value>(
      packed, quantiles, "bin_values",
      [&](std::size_t c, const CellEdges<Value>&, const Expressed<Value>& cell, const BinRange* ranges) {
        const std::size_t count = cell.values.size();
        CellWords words(key, active_value_bins_kernels());
        const std::uint32_t* drawn =
            rule == BinRule::seeded
                ? words.draw(kDrawBins, fingerprint_of(packed, cell, c), static_cast<std::int64_t>(count))
                : nullptr;
        for (std::size_t i = 0; i < count; ++i) {
          const std::uint32_t left = ranges[i] >> 16;
          const std::uint32_t right = ranges[i] & 0xFFFFu;
          std::uint32_t bin = left;
          if (rule == BinRule::seeded) {
            bin -= static_cast<std::uint32_t>((std::uint64_t{drawn[i]} * (left - right)) >> 32);
          } else if (rule == BinRule::given) {
            bin = static_cast<std::uint32_t>(
                given_bin(ranges[i], draws[static_cast<std::size_t>(starts[c]) + i]));
          }
          bins[static_cast<std::size_t>(cell.positions[i])] = static_cast<std::int32_t>(bin);
        }
      });
}

template <class Value>
void edges_as(const PackedValues& packed, std::span<const double> quantiles, std::span<double> edges,
              std::span<std::int32_t> left, std::span<std::int32_t> right) {
  for_each_cell<Value>(packed, quantiles, "value_edges",
                       [&](std::size_t c, const CellEdges<Value>& found, const Expressed<Value>& cell,
                           const BinRange* ranges) {
                         std::copy(found.edges().begin(), found.edges().end(),
                                   edges.begin() + static_cast<std::ptrdiff_t>(c * quantiles.size()));
                         for (std::size_t i = 0; i < cell.values.size(); ++i) {
                           const auto position = static_cast<std::size_t>(cell.positions[i]);
                           left[position] = static_cast<std::int32_t>(ranges[i] >> 16);
                           right[position] = static_cast<std::int32_t>(ranges[i] & 0xFFFFu);
                         }
                       });
}

}  // namespace

void bin_values(const PackedValues& packed, std::span<const double> quantiles, BinRule rule,
                const DrawKey& key, std::span<const double> draws, std::span<std::int32_t> bins) {
  check(packed, "bin_values");
  require_quantiles(quantiles, "bin_values");
  if (quantiles.empty()) throw InvalidArgument("bin_values: quantiles is empty");
  require_draws(draws, "bin_values");
  packed.type == DataType::f64 ? bin_as<double>(packed, quantiles, rule, key, draws, bins)
                               : bin_as<float>(packed, quantiles, rule, key, draws, bins);
}

void value_edges(const PackedValues& packed, std::span<const double> quantiles, std::span<double> edges,
                 std::span<std::int32_t> left, std::span<std::int32_t> right) {
  check(packed, "value_edges");
  require_quantiles(quantiles, "value_edges");
  if (quantiles.empty()) throw InvalidArgument("value_edges: quantiles is empty");
  std::fill(edges.begin(), edges.end(), 0.0);
  std::fill(left.begin(), left.end(), 0);
  std::fill(right.begin(), right.end(), 0);
  packed.type == DataType::f64 ? edges_as<double>(packed, quantiles, edges, left, right)
                               : edges_as<float>(packed, quantiles, edges, left, right);
}

void choose_tokens(std::span<const std::int32_t> cu_seqlens, std::span<const std::int64_t> cell_ids,
                   std::span<const std::int32_t> num_chosen, std::int64_t num_spared, const DrawKey& key,
                   std::uint32_t purpose, std::span<std::uint8_t> chosen) {
  const auto fail = [](const std::string& message) { throw InvalidArgument("choose_tokens: " + message); };
  if (cu_seqlens.size() != cell_ids.size() + 1 || num_chosen.size() != cell_ids.size()) {
    fail("cu_seqlens, cell_ids and num_chosen have " + std::to_string(cu_seqlens.size()) + ", " +
         std::to_string(cell_ids.size()) + " and " + std::to_string(num_chosen.size()) +
         " entries, expected C + 1, C and C");
  }
  if (cu_seqlens.front() != 0) fail("cu_seqlens[0] = " + std::to_string(cu_seqlens.front()) + ", expected 0");
  if (num_spared < 0) fail("num_spared = " + std::to_string(num_spared) + ", expected at least 0");
  for (std::size_t cell = 0; cell < cell_ids.size(); ++cell) {
    const std::int64_t length = std::int64_t{cu_seqlens[cell + 1]} - cu_seqlens[cell];
    if (length < 0) fail("cu_seqlens falls at cell " + std::to_string(cell));
    if (num_chosen[cell] < 0 || num_chosen[cell] > std::max<std::int64_t>(length - num_spared, 0)) {
      fail("num_chosen[" + std::to_string(cell) + "] = " + std::to_string(num_chosen[cell]) + " of " +
           std::to_string(length) + " tokens, " + std::to_string(num_spared) + " of them spared");
    }
  }
  if (static_cast<std::size_t>(cu_seqlens.back()) != chosen.size()) {
    fail("cu_seqlens ends at " + std::to_string(cu_seqlens.back()) + ", expected " +
         std::to_string(chosen.size()) + ", the number of tokens");
  }
  std::fill(chosen.begin(), chosen.end(), std::uint8_t{0});
  const auto num_cells = static_cast<std::int64_t>(cell_ids.size());
  parallel_for((num_cells + kCellsPerTask - 1) / kCellsPerTask, num_threads(), [&](std::int64_t task, int) {
    CellWords words(key, active_value_bins_kernels());
    AlignedBuffer<std::int32_t> places;
    const std::int64_t stop = std::min((task + 1) * kCellsPerTask, num_cells);
    for (std::int64_t cell = task * kCellsPerTask; cell < stop; ++cell) {
      const auto c = static_cast<std::size_t>(cell);
      if (num_chosen[c] == 0) continue;
      const std::int64_t first = cu_seqlens[c] + num_spared;
      const std::int64_t count = cu_seqlens[c + 1] - first;
      const std::uint32_t* drawn = words.draw(purpose, static_cast<std::uint64_t>(cell_ids[c]), count);
      choose_any(drawn, count, num_chosen[c], places.reserve(count + 1));
      for (std::int32_t i = 0; i < num_chosen[c]; ++i) {
        chosen[static_cast<std::size_t>(first + places.data()[i])] = 1;
      }
    }
  });
}

}  // namespace scfm
