/// The inner loops of value_bins, one table per instruction set. All tables give the same bits.
#pragma once

#include <cstdint>

namespace scfm {

struct MatchArguments {
  const std::int32_t* columns;  // count columns, in range
  const void* values;           // count float32 or float64
  bool values_are_f64;
  std::int64_t count;
  const std::int32_t* column_token;  // per column: its token, or -1
  // Written: the entries that have a token and are not zero, in their order. Room for count and one vector
  // more.
  std::int32_t* tokens;
  float* kept;
};

struct MatchSummary {
  std::int64_t num_kept;
  double mapped;              // sum of the values that have a token
  double total;               // sum of all values
  float highest;              // of those kept, as float32
  bool whole;                 // every value kept is a whole number
  bool possible;              // every value is a number from 0, and finite as float32
  std::uint64_t fingerprint;  // of what was kept, whatever its order
};

/// What one entry adds to the fingerprint of its cell: the upper half of a product with an odd constant,
/// folded into the lower, so that neither swapping values between genes nor their order of adding cancels.
inline constexpr std::uint64_t kFingerprintFactor = 0x9E3779B97F4A7C15u;

/// Words come in blocks of this many: word i is word (i / 16) % 4 of the Philox counter
/// (i / 64) * 16 + i % 16, an order in which vectors can be stored as they stand.
inline constexpr std::int64_t kWordBlock = 64;
inline constexpr std::uint32_t kWordLanes = 16;
inline constexpr std::uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
inline constexpr std::uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
inline constexpr std::uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
inline constexpr std::uint32_t kPhiloxWeyl1 = 0xBB67AE85u;

struct WordArguments {
  std::uint32_t key[2];
  std::uint32_t counter[3];  // the upper three words of the counter; the first one counts
  std::int64_t num_blocks;
  std::uint32_t* words;  // written: num_blocks * kWordBlock
};

struct ValueBinsKernels {
  MatchSummary (*match)(const MatchArguments& arguments) noexcept;
  void (*random_words)(const WordArguments& arguments) noexcept;
  /// ranges[i] = table[whole number values[i]]
  void (*look_up)(const float* values, std::int64_t count, const std::uint32_t* table,
                  std::uint32_t* ranges) noexcept;
  /// bins[i] = left - ((words[i] * (left - right)) >> 32) for ranges[i] = left << 16 | right: uniform over
  /// right + 1 .. left, or left where the two are equal.
  void (*draw)(const std::uint32_t* ranges, const std::uint32_t* words, std::int64_t count,
               float* bins) noexcept;
};

extern const ValueBinsKernels value_bins_generic;
extern const ValueBinsKernels value_bins_avx2;
extern const ValueBinsKernels value_bins_avx512;

}  // namespace scfm
