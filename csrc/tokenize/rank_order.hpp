/// Sorts one cell's keys in descending order, equal ones by index, exactly, in linear time for real cells.
///
/// 1. Each key becomes one 64-bit word: its distance from the highest key, above its index. Sorting plain
/// words
///    ascending then sorts the cell stably, and no payload moves along. Where distance and index do not fit,
///    the distance loses its lowest bits, and step 4 puts that right.
/// 2. One stable counting pass over the leading bits of the distance, with about as many buckets as keys. The
/// bits of a
///    float64 are nearly its logarithm, along which expression values spread evenly, so most buckets hold a
///    few keys.
/// 3. Crowded buckets that are out of order are sorted by std::sort, so no input takes quadratic time; the
/// small ones
///    by a few vectorised rounds of odd-even transposition over the whole cell, without unpredictable
///    branches.
/// 4. Where neighbours tie in what is left of the distance, the exact keys decide.
#pragma once

#include <cstdint>

#include "base/aligned_buffer.hpp"
#include "tokenize/rank_kernels.hpp"

namespace scfm {

class RankOrder {
 public:
  /// keys: `count` of them, between lowest and highest, all below 2^63. Afterwards index(rank) is the index
  /// of the key of that rank, valid until the next call.
  void sort(const RankKernels& kernels, const std::uint64_t* keys, std::int64_t count, std::uint64_t lowest,
            std::uint64_t highest);

  std::int64_t index(std::int64_t rank) const noexcept {
    return static_cast<std::int64_t>(sorted_[rank] & index_mask_);
  }

 private:
  std::int64_t distribute(const RankKernels& kernels, std::int64_t count, int bucket_shift,
                          std::int64_t num_buckets);
  void break_ties(const std::uint64_t* keys, std::int64_t count, int index_bits);

  AlignedBuffer<std::uint64_t> composed_;
  AlignedBuffer<std::uint64_t> placed_;
  AlignedBuffer<std::uint32_t> bucket_ends_;
  std::uint64_t* sorted_ = nullptr;
  std::uint64_t index_mask_ = 0;
};

}  // namespace scfm
