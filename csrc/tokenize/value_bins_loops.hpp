/// The loops behind ValueBinsKernels in plain C++, written so that the compiler vectorises what it can for
/// whatever instruction set the including file is compiled for. Included by value_bins_<isa>.cpp only;
/// everything lies in an unnamed namespace, so no two copies can be mistaken for one another by the linker.
#pragma once

#include <cstdint>

#include "tokenize/value_bins_kernels.hpp"

namespace scfm {
namespace {

/// Where a row stands between entries. Sums run in eight lanes (entry i in lane i % 8), which is what a
/// vector of eight does, so that every instruction set rounds alike.
struct MatchState {
  std::int64_t num_kept = 0;
  double mapped[8] = {};
  double total[8] = {};
  std::uint32_t highest = 0;  // bits of the float: those of positive floats rise with them
  bool whole = true;
  bool possible = true;
  std::uint64_t fingerprint = 0;

  MatchSummary summary() const noexcept {
    const auto sum = [](const double* lane) {
      return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
    };
    return {num_kept, sum(mapped), sum(total), __builtin_bit_cast(float, highest),
            whole,    possible,    fingerprint};
  }
};

/// From 2^23 all floats are whole; below it, adding and taking away this much rounds to a whole number.
constexpr float kAllWholeFrom = 8388608.0f;
constexpr float kInfinity = __builtin_inff();

/// Entries [first, count) of a row.
template <class Value>
void match_scalar(const MatchArguments& row, std::int64_t first, MatchState& state) noexcept {
  const auto* values = static_cast<const Value*>(row.values);
  std::int64_t num_kept = state.num_kept;
  for (std::int64_t i = first; i < row.count; ++i) {
    const auto x = static_cast<float>(values[i]);
    const std::int32_t token = row.column_token[row.columns[i]];
    const auto as_double = static_cast<double>(values[i]);
    state.total[i & 7] += as_double;
    state.mapped[i & 7] += token >= 0 ? as_double : 0.0;
    state.possible &= values[i] >= 0 && x < kInfinity;
    const bool keep = token >= 0 && x != 0;
    row.tokens[num_kept] = token;
    row.kept[num_kept] = x;
    num_kept += keep ? 1 : 0;
    const auto bits = __builtin_bit_cast(std::uint32_t, x);
    const std::uint32_t kept_bits = keep ? bits : 0;
    state.highest = kept_bits > state.highest ? kept_bits : state.highest;
    state.whole &= !keep || x >= kAllWholeFrom || (x + kAllWholeFrom) - kAllWholeFrom == x;
    std::uint64_t mixed = (static_cast<std::uint64_t>(static_cast<std::uint32_t>(token)) << 32) | bits;
    mixed *= kFingerprintFactor;
    mixed ^= mixed >> 32;
    state.fingerprint += keep ? mixed : 0;
  }
  state.num_kept = num_kept;
}

void look_up(const float* values, std::int64_t count, const std::uint32_t* table,
             std::uint32_t* ranges) noexcept {
  for (std::int64_t i = 0; i < count; ++i) ranges[i] = table[static_cast<std::int32_t>(values[i])];
}

void draw(const std::uint32_t* ranges, const std::uint32_t* words, std::int64_t count, float* bins) noexcept {
  for (std::int64_t i = 0; i < count; ++i) {
    const std::uint32_t left = ranges[i] >> 16;
    const std::uint32_t span = left - (ranges[i] & 0xFFFFu);
    const auto below = static_cast<std::uint32_t>((std::uint64_t{words[i]} * span) >> 32);
    bins[i] = static_cast<float>(static_cast<std::int32_t>(left - below));
  }
}

}  // namespace
}  // namespace scfm
