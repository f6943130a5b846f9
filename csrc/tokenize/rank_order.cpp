#include "tokenize/rank_order.hpp"

#include <algorithm>
#include <bit>

namespace scfm {
namespace {

constexpr int kWordBits = 63;          // leaves the sign bit clear, see kBeyondValues
constexpr std::int64_t kFrontPad = 8;  // what settle asks for
constexpr std::int64_t kBackPad = 16;
constexpr std::int64_t kMinBuckets = 64;
constexpr std::int64_t kMaxBuckets = 8192;  // 32 KB of counters
constexpr std::int64_t kCrowded = 16;       // more keys than this in a bucket are sorted on their own

}  // namespace

/// Counting sort of composed_ by word >> bucket_shift into placed_, which sorted_ then points into; sorts
/// crowded buckets. Returns the largest number of keys in a bucket that is still to be sorted.
std::int64_t RankOrder::distribute(const RankKernels& kernels, std::int64_t count, int bucket_shift,
                                   std::int64_t num_buckets) {
  const std::uint64_t* words = composed_.data();
  std::uint64_t* placed = placed_.reserve(kFrontPad + count + kBackPad) + kFrontPad;
  std::fill_n(placed - kFrontPad, kFrontPad, 0u);
  std::fill_n(placed + count, kBackPad, kBeyondValues);
  sorted_ = placed;
  std::uint32_t* ends = bucket_ends_.reserve(num_buckets);
  std::fill_n(ends, num_buckets, 0u);
  for (std::int64_t i = 0; i < count; ++i) ++ends[words[i] >> bucket_shift];
  const std::uint32_t largest = kernels.make_offsets(ends, num_buckets);
  for (std::int64_t i = 0; i < count; ++i) placed[ends[words[i] >> bucket_shift]++] = words[i];
  if (largest <= kCrowded) return largest;

  std::int64_t unsorted = 0;
  for (std::int64_t bucket = 0; bucket < num_buckets; ++bucket) {
    const std::int64_t first = bucket == 0 ? 0 : ends[bucket - 1];
    const std::int64_t size = ends[bucket] - first;
    if (size <= kCrowded) {
      unsorted = std::max(unsorted, size);
    } else if (!std::is_sorted(placed + first, placed + first + size)) {  // equal keys already are
      std::sort(placed + first, placed + first + size);
    }
  }
  return unsorted;
}

/// Puts runs of words that agree in their distance in the order of the exact keys.
void RankOrder::break_ties(const std::uint64_t* keys, std::int64_t count, int index_bits) {
  const auto before = [this, keys](std::uint64_t a, std::uint64_t b) {
    const std::uint64_t key_a = keys[a & index_mask_];
    const std::uint64_t key_b = keys[b & index_mask_];
    return key_a != key_b ? key_a > key_b : a < b;
  };
  for (std::int64_t first = 0; first < count;) {
    std::int64_t last = first + 1;
    while (last < count && ((sorted_[first] ^ sorted_[last]) >> index_bits) == 0) ++last;
    if (last - first > 1 && !std::is_sorted(sorted_ + first, sorted_ + last, before)) {
      std::sort(sorted_ + first, sorted_ + last, before);
    }
    first = last;
  }
}

void RankOrder::sort(const RankKernels& kernels, const std::uint64_t* keys, std::int64_t count,
                     std::uint64_t lowest, std::uint64_t highest) {
  const int index_bits = count > 1 ? std::bit_width(static_cast<std::uint64_t>(count - 1)) : 0;
  index_mask_ = (std::uint64_t{1} << index_bits) - 1;
  sorted_ = composed_.reserve(count);
  if (count == 0) return;
  const std::uint64_t range = highest - lowest;
  const int range_bits = std::bit_width(range);
  const int shift = std::max(0, range_bits + index_bits - kWordBits);
  kernels.compose(keys, count, highest, shift, index_bits, sorted_);
  if (range == 0) return;  // all equal: already in order

  const std::int64_t num_buckets =
      std::clamp(static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(2 * count))), kMinBuckets,
                 kMaxBuckets);
  const std::uint64_t distance_range = range >> shift;
  int bucket_shift = 0;
  while ((distance_range >> bucket_shift) >= static_cast<std::uint64_t>(num_buckets)) ++bucket_shift;
  const std::int64_t unsorted = distribute(kernels, count, bucket_shift + index_bits, num_buckets);
  if (unsorted > 1) kernels.settle(sorted_, count, unsorted);
  if (shift > 0 && kernels.any_tie(sorted_, count, index_bits)) break_ties(keys, count, index_bits);
}

}  // namespace scfm
