/// The random numbers of one cell, and the choice of its tokens where it has too many.
///
/// A cell is known by what it holds (the fingerprint of its tokens and values), not by where it lies: its
/// bins are the same in any file, selection, order and batch. Words are Philox's, under (seed, purpose),
/// counted by (place in the cell, fingerprint, epoch).
#pragma once

#include <cstdint>

#include "base/aligned_buffer.hpp"
#include "tokenize/value_bins_kernels.hpp"

namespace scfm {

// Purposes keep the streams of one seed apart.
inline constexpr std::uint32_t kDrawBins = 0x62696e73u;  // "bins"
inline constexpr std::uint32_t kDrawKept = 0x6b657074u;  // "kept"

struct DrawKey {
  std::uint64_t seed = 0;
  std::uint32_t epoch = 0;
};

/// The same as the kernels compute, for tokens and values that lie packed already.
std::uint64_t fingerprint_of(const std::int32_t* tokens, const float* values, std::int64_t count) noexcept;

class CellWords {
 public:
  CellWords(const DrawKey& key, const ValueBinsKernels& kernels) noexcept : key_(key), kernels_(kernels) {}

  /// `count` words for what the cell is known by, valid until the next call.
  const std::uint32_t* draw(std::uint32_t purpose, std::uint64_t cell, std::int64_t count);

 private:
  DrawKey key_;
  const ValueBinsKernels& kernels_;
  AlignedBuffer<std::uint32_t> words_;
};

/// places[0 .. num_kept) become `num_kept` of 0 .. count - 1, ascending, every set of them equally likely.
/// words: count of them. Room for one more place.
void choose_any(const std::uint32_t* words, std::int64_t count, std::int64_t num_kept,
                std::int32_t* places) noexcept;

/// The places of the `num_kept` largest of `count` values, ascending; of equal values the first.
void choose_largest(const float* values, std::int64_t count, std::int64_t num_kept,
                    AlignedBuffer<float>& scratch, std::int32_t* places);

}  // namespace scfm
