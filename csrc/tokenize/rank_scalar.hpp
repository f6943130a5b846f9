/// One entry at a time: the plain definition of rank_value's arithmetic, and what vector kernels use for the
/// last few entries of a row. Included by rank_kernels_<isa>.cpp only; everything lies in an unnamed
/// namespace.
#pragma once

#include <cstdint>

#include "tokenize/rank_kernels.hpp"

namespace scfm {
namespace {

/// What is fixed for a row: the library size in the form that the arithmetic multiplies or divides by.
template <RankArithmetic kArithmetic>
struct RowScale {
  static constexpr bool kIs32 =
      kArithmetic == RankArithmetic::multiply32 || kArithmetic == RankArithmetic::divide32;
  static constexpr bool kDivides =
      kArithmetic == RankArithmetic::divide64 || kArithmetic == RankArithmetic::divide32;

  double scale64;
  float scale32;

  explicit RowScale(double library_size) noexcept
      : scale64(kDivides ? library_size : 1.0 / library_size),
        scale32(kDivides ? static_cast<float>(library_size) : 1.0f / static_cast<float>(library_size)) {}

  /// x / n * 10000
  template <class Value>
  double count_per_10k(Value value) const noexcept {
    if constexpr (kIs32) {
      const auto x = static_cast<float>(value);
      return static_cast<double>((kDivides ? x / scale32 : x * scale32) * 10000.0f);
    } else {
      const auto x = static_cast<double>(value);
      return (kDivides ? x / scale64 : x * scale64) * 10000.0;
    }
  }

  static double ranked_value(double count, double factor) noexcept {
    return kDivides ? count / factor : count * factor;
  }
};

/// Where a row stands between entries. Sums run in eight lanes (entry i in lane i % 8), which is what a
/// vector of eight does, so that every instruction set rounds alike.
struct RowState {
  std::int64_t num_keys = 0;
  std::int64_t num_tail = 0;
  std::uint64_t lowest = ~std::uint64_t{0};
  std::uint64_t highest = 0;
  double mapped[8] = {};
  double total[8] = {};

  KeySummary summary() const noexcept {
    const auto sum = [](const double* lane) {
      return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
    };
    return {num_keys, num_tail, lowest, highest, sum(mapped), sum(total)};
  }
};

/// Entries [first, count) of a row.
template <RankArithmetic kArithmetic, class Value>
void make_keys_scalar(const KeyArguments& row, std::int64_t first, RowState& state) noexcept {
  const RowScale<kArithmetic> scale(row.library_size);
  const auto* values = static_cast<const Value*>(row.values);
  for (std::int64_t i = first; i < row.count; ++i) {
    const Value value = values[i];
    const std::int32_t column = row.columns[i];
    const double factor = row.factors[column];
    state.total[i & 7] += static_cast<double>(value);
    if (factor == 0.0) continue;
    state.mapped[i & 7] += static_cast<double>(value);
    if (value == 0 && !row.keep_zeros) continue;
    const double count = scale.count_per_10k(value);
    const double ranked = RowScale<kArithmetic>::ranked_value(count, factor);
    if (ranked > 0.0) {
      const auto key = __builtin_bit_cast(std::uint64_t, ranked);
      state.lowest = key < state.lowest ? key : state.lowest;
      state.highest = key > state.highest ? key : state.highest;
      row.keys[state.num_keys] = key;
      row.genes[state.num_keys] = column;
      if (row.counts != nullptr) row.counts[state.num_keys] = count;
      ++state.num_keys;
    } else {
      row.tail_genes[state.num_tail] = column;
      if (row.tail_counts != nullptr) row.tail_counts[state.num_tail] = count;
      ++state.num_tail;
    }
  }
}

/// Calls Kernel::run<arithmetic, Value>(row) for the arithmetic and type that the row asks for.
template <class Kernel>
KeySummary make_keys_with(const KeyArguments& row) noexcept {
  switch (row.arithmetic) {
    case RankArithmetic::multiply64:
      return row.values_are_f64 ? Kernel::template run<RankArithmetic::multiply64, double>(row)
                                : Kernel::template run<RankArithmetic::multiply64, float>(row);
    case RankArithmetic::multiply32:
      return row.values_are_f64 ? Kernel::template run<RankArithmetic::multiply32, double>(row)
                                : Kernel::template run<RankArithmetic::multiply32, float>(row);
    case RankArithmetic::divide64:
      return row.values_are_f64 ? Kernel::template run<RankArithmetic::divide64, double>(row)
                                : Kernel::template run<RankArithmetic::divide64, float>(row);
    case RankArithmetic::divide32:
      break;
  }
  return row.values_are_f64 ? Kernel::template run<RankArithmetic::divide32, double>(row)
                            : Kernel::template run<RankArithmetic::divide32, float>(row);
}

[[maybe_unused]] ColumnScan scan_columns_scalar(const std::int32_t* columns, std::int64_t first,
                                                std::int64_t count, ColumnScan scan) noexcept {
  for (std::int64_t i = first; i < count; ++i) {
    const auto column = static_cast<std::uint32_t>(columns[i]);
    scan.highest = column > scan.highest ? column : scan.highest;
    if (i > 0 && columns[i] <= columns[i - 1]) scan.ascending = false;
  }
  return scan;
}

void compose_scalar(const std::uint64_t* keys, std::int64_t first, std::int64_t count, std::uint64_t highest,
                    int shift, int index_bits, std::uint64_t* out) noexcept {
  for (std::int64_t i = first; i < count; ++i) {
    out[i] = (((highest - keys[i]) >> shift) << index_bits) | static_cast<std::uint64_t>(i);
  }
}

bool any_tie_scalar(const std::uint64_t* values, std::int64_t first, std::int64_t count,
                    int index_bits) noexcept {
  for (std::int64_t i = first; i + 1 < count; ++i) {
    if (((values[i] ^ values[i + 1]) >> index_bits) == 0) return true;
  }
  return false;
}

}  // namespace
}  // namespace scfm
