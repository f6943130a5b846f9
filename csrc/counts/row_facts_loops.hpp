/// The loops behind RowFactsKernels, written so that the compiler vectorises them for whatever instruction
/// set the including file is compiled for. Included by row_facts_<isa>.cpp only; everything lies in an
/// unnamed namespace, so no two copies can be mistaken for one another by the linker.
#pragma once

#include <cstdint>

#include "counts/row_facts.hpp"

namespace scfm {
namespace {

// Counters of 32 bits match the lanes of the data, and cannot overflow within one stretch of this length.
constexpr std::int64_t kStretch = std::int64_t{1} << 20;

template <class Float>
struct FloatBits;
template <>
struct FloatBits<float> {
  using Bits = std::uint32_t;
  static constexpr Bits kInfinity = 0x7F800000u;
  static constexpr float kAllIntegersFrom = 8388608.0f;  // 2^23
};
template <>
struct FloatBits<double> {
  using Bits = std::uint64_t;
  static constexpr Bits kInfinity = 0x7FF0000000000000u;
  static constexpr double kAllIntegersFrom = 4503599627370496.0;  // 2^52
};

/// Bits of non-negative floats rise with their value; a negative, an infinity or a NaN shows as bits >=
/// kInfinity.
template <class Float>
ValueFacts float_facts_exactly(const Float* values, std::int64_t count) noexcept {
  using Bits = typename FloatBits<Float>::Bits;
  constexpr Float kMagic = FloatBits<Float>::kAllIntegersFrom;
  Bits max_bits = 0;
  std::int64_t num_zeros = 0;
  std::int64_t num_nonintegers = 0;
  for (std::int64_t start = 0; start < count; start += kStretch) {
    const std::int64_t stop = count - start < kStretch ? count : start + kStretch;
    Bits zeros = 0;
    Bits nonintegers = 0;
    for (std::int64_t i = start; i < stop; ++i) {
      const Float value = values[i];
      const Bits bits = __builtin_bit_cast(Bits, value);
      max_bits = bits > max_bits ? bits : max_bits;
      zeros += static_cast<Bits>(bits == 0);
      const Float rounded = (value + kMagic) - kMagic;  // to the nearest integer, below kMagic
      nonintegers += static_cast<Bits>(rounded != value) & static_cast<Bits>(value < kMagic);
    }
    num_zeros += static_cast<std::int64_t>(zeros);
    num_nonintegers += static_cast<std::int64_t>(nonintegers);
  }
  const bool suspect = max_bits >= FloatBits<Float>::kInfinity;
  return {suspect, num_zeros, num_nonintegers, static_cast<double>(__builtin_bit_cast(Float, max_bits))};
}

/// Counts are nearly always whole numbers from 1 to some thousands, and a sweep that only asks whether all
/// are takes little more than half the time; anything else is swept again with all questions.
template <class Float>
ValueFacts float_facts(const void* data, std::int64_t count) noexcept {
  using Bits = typename FloatBits<Float>::Bits;
  constexpr Float kMagic = FloatBits<Float>::kAllIntegersFrom;
  const auto* values = static_cast<const Float*>(data);
  Bits max_bits = 0;
  Bits min_bits = static_cast<Bits>(-1);
  Bits fractions = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const Float value = values[i];
    const Bits bits = __builtin_bit_cast(Bits, value);
    max_bits = bits > max_bits ? bits : max_bits;
    min_bits = bits < min_bits ? bits : min_bits;
    fractions |= static_cast<Bits>((value + kMagic) - kMagic != value);
  }
  const bool plain = min_bits != 0 && fractions == 0 && max_bits < __builtin_bit_cast(Bits, kMagic);
  if (!plain) return float_facts_exactly(values, count);
  return {false, 0, 0, static_cast<double>(__builtin_bit_cast(Float, max_bits))};
}

template <class Integer>
ValueFacts integer_facts(const void* data, std::int64_t count) noexcept {
  const auto* values = static_cast<const Integer*>(data);
  Integer lowest = 0;
  Integer highest = 0;
  std::int64_t num_zeros = 0;
  for (std::int64_t start = 0; start < count; start += kStretch) {
    const std::int64_t stop = count - start < kStretch ? count : start + kStretch;
    std::uint32_t zeros = 0;
    for (std::int64_t i = start; i < stop; ++i) {
      const Integer value = values[i];
      lowest = value < lowest ? value : lowest;
      highest = value > highest ? value : highest;
      zeros += static_cast<std::uint32_t>(value == 0);
    }
    num_zeros += zeros;
  }
  return {lowest < 0, num_zeros, 0, static_cast<double>(highest)};
}

/// Unsigned comparison catches negative columns too. num_genes beyond the type's range puts no upper limit.
template <class Signed, class Unsigned>
ColumnFacts column_facts_exactly(const Signed* columns, std::int64_t count, std::int64_t num_genes) noexcept {
  const auto first = static_cast<Unsigned>(columns[0]);
  Unsigned highest = first;
  Unsigned falls = 0;
  Unsigned repeats = 0;
  for (std::int64_t i = 1; i < count; ++i) {
    const auto column = static_cast<Unsigned>(columns[i]);
    highest = column > highest ? column : highest;
    falls |= static_cast<Unsigned>(columns[i] < columns[i - 1]);
    repeats |= static_cast<Unsigned>(columns[i] == columns[i - 1]);
  }
  const bool out_of_range = static_cast<std::uint64_t>(highest) >= static_cast<std::uint64_t>(num_genes) ||
                            static_cast<Signed>(highest) < 0;
  return {out_of_range, falls != 0, repeats != 0};
}

/// Where columns rise all along, as they nearly always do, the first and the last say whether all are in
/// range.
template <class Signed, class Unsigned>
ColumnFacts column_facts(const void* data, std::int64_t count, std::int64_t num_genes) noexcept {
  const auto* columns = static_cast<const Signed*>(data);
  if (count == 0) return {false, false, false};
  Unsigned stalls = 0;
  for (std::int64_t i = 1; i < count; ++i) stalls |= static_cast<Unsigned>(columns[i] <= columns[i - 1]);
  if (stalls == 0 && columns[0] >= 0 && static_cast<std::int64_t>(columns[count - 1]) < num_genes) {
    return {false, false, false};
  }
  return column_facts_exactly<Signed, Unsigned>(columns, count, num_genes);
}

constexpr RowFactsKernels kRowFacts = {
    {float_facts<float>, float_facts<double>, integer_facts<std::int8_t>, integer_facts<std::int16_t>,
     integer_facts<std::int32_t>, integer_facts<std::int64_t>, integer_facts<std::uint8_t>,
     integer_facts<std::uint16_t>, integer_facts<std::uint32_t>, integer_facts<std::uint64_t>},
    {column_facts<std::int32_t, std::uint32_t>, column_facts<std::int64_t, std::uint64_t>}};

}  // namespace
}  // namespace scfm
