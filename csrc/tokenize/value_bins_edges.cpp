#include "tokenize/value_bins_edges.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace scfm {
namespace {

// Beyond this, or where values are few against their range, counting costs more than sorting.
constexpr std::int64_t kMostCounted = 4096;
constexpr std::int64_t kCountedPerValue = 16;
// The hash table is given up as soon as more values than these prove distinct.
constexpr std::size_t kMostDistinct = 512;
constexpr std::size_t kFreelyDistinct = 64;
constexpr std::size_t kValuesPerDistinct = 4;
constexpr int kBucketBits = 11;

}  // namespace

std::int32_t given_bin(BinRange range, double u) noexcept {
  const auto left = static_cast<double>(range >> 16);
  const auto right = static_cast<double>(range & 0xFFFFu);
  return static_cast<std::int32_t>(std::ceil(u * (right - left) + left));
}

template <class Value>
void CellEdges<Value>::tally_numbers(const Value* values, std::int64_t count, std::int64_t highest) {
  const auto size = static_cast<std::size_t>(highest) + 1;
  tally_.assign(4 * size, 0);
  std::uint32_t* tally = tally_.data();
  const auto place = [&](std::int64_t i) { return 4 * static_cast<std::size_t>(values[i]); };
  std::int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    ++tally[place(i)];
    ++tally[place(i + 1) + 1];
    ++tally[place(i + 2) + 2];
    ++tally[place(i + 3) + 3];
  }
  for (; i < count; ++i) ++tally[place(i)];
  distinct_.clear();
  slots_.clear();
  ends_.clear();
  std::int64_t end = 0;
  for (std::size_t number = 0; number < size; ++number) {
    const std::uint32_t* of = tally + 4 * number;
    const std::int64_t times = std::int64_t{of[0]} + of[1] + of[2] + of[3];
    if (times == 0) continue;
    end += times;
    distinct_.push_back(static_cast<Value>(number));
    slots_.push_back(static_cast<std::uint32_t>(number));
    ends_.push_back(end);
  }
}

/// False, with nothing done, where too many values are distinct.
template <class Value>
bool CellEdges<Value>::tally_distinct(const Value* values, std::int64_t count) {
  constexpr std::size_t kBuckets = std::size_t{1} << kBucketBits;
  buckets_.assign(kBuckets, 0);
  bucket_slots_.resize(kBuckets);
  std::uint16_t* value_slots = value_slots_.reserve(count);
  found_.clear();
  for (std::int64_t i = 0; i < count; ++i) {
    const auto bits = __builtin_bit_cast(Bits, values[i]);
    std::size_t bucket = (std::uint64_t{bits} * 0x9E3779B97F4A7C15u) >> (64 - kBucketBits);
    while (buckets_[bucket] != bits) {
      if (buckets_[bucket] == 0) {
        const std::size_t most =
            std::min(kMostDistinct, kFreelyDistinct + static_cast<std::size_t>(i) / kValuesPerDistinct);
        if (found_.size() >= most) return false;
        buckets_[bucket] = bits;
        bucket_slots_[bucket] = static_cast<std::uint16_t>(found_.size());
        found_.push_back(values[i]);
      } else {
        bucket = (bucket + 1) % kBuckets;
      }
    }
    value_slots[i] = bucket_slots_[bucket];
  }
  const std::size_t num_distinct = found_.size();
  tally_.assign(4 * num_distinct, 0);
  for (std::int64_t i = 0; i < count; ++i) ++tally_[4 * std::size_t{value_slots[i]} + (i & 3)];
  slots_.resize(num_distinct);
  std::iota(slots_.begin(), slots_.end(), 0u);
  std::sort(slots_.begin(), slots_.end(),
            [&](std::uint32_t a, std::uint32_t b) { return found_[a] < found_[b]; });
  distinct_.clear();
  ends_.clear();
  std::int64_t end = 0;
  for (const std::uint32_t slot : slots_) {
    const std::uint32_t* of = tally_.data() + 4 * slot;
    end += std::int64_t{of[0]} + of[1] + of[2] + of[3];
    distinct_.push_back(found_[slot]);
    ends_.push_back(end);
  }
  return true;
}

/// Every distinct value's range, into the table.
template <class Value>
void CellEdges<Value>::locate_tallied(std::int64_t count) {
  std::size_t group = 0;
  set_edges(count, [&](std::int64_t place) {
    while (ends_[group] <= place) ++group;
    const bool before = group > 0 && place < ends_[group - 1];
    return distinct_[before ? group - 1 : group];
  });
  table_.resize(static_cast<std::size_t>(*std::max_element(slots_.begin(), slots_.end())) + 1);
  std::size_t right = 0;
  for (std::size_t i = 0; i < distinct_.size(); ++i) {
    const auto value = static_cast<double>(distinct_[i]);
    while (right < edges_.size() && edges_[right] < value) ++right;
    std::size_t left = right;
    while (left < edges_.size() && edges_[left] <= value) ++left;
    table_[slots_[i]] = static_cast<BinRange>(left << 16 | right);
    right = left;
  }
}

template <class Value>
void CellEdges<Value>::sort_values(const Value* values, std::int64_t count) {
  std::uint64_t* keys = keys_.reserve(count);
  Bits lowest = ~Bits{0};
  Bits highest = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const auto bits = __builtin_bit_cast(Bits, values[i]);  // those of positive floats rise with them
    keys[i] = bits;
    lowest = std::min(lowest, bits);
    highest = std::max(highest, bits);
  }
  order_.sort(sorting_, keys, count, lowest, highest);
}

/// An edge lies between two neighbours of the sorted values, so only values equal to it need looking for.
template <class Value>
void CellEdges<Value>::locate_sorted(const Value* values, std::int64_t count, BinRange* ranges) {
  const auto sorted = [&](std::int64_t place) {
    return static_cast<double>(values[order_.index(count - 1 - place)]);
  };
  const std::size_t num_edges = edges_.size();
  below_.resize(num_edges);
  up_to_.resize(num_edges);
  const auto last = static_cast<double>(count - 1);
  for (std::size_t k = 0; k < num_edges; ++k) {
    if (k > 0 && edges_[k] == edges_[k - 1]) {
      below_[k] = below_[k - 1];
      up_to_[k] = up_to_[k - 1];
      continue;
    }
    const std::int64_t least = k > 0 ? up_to_[k - 1] : 0;
    std::int64_t place = static_cast<std::int64_t>(quantiles_[k] * last) + 1;
    place = std::clamp(place, least, count);
    below_[k] = place;
    while (below_[k] > least && sorted(below_[k] - 1) >= edges_[k]) --below_[k];
    up_to_[k] = place;
    while (up_to_[k] < count && sorted(up_to_[k]) <= edges_[k]) ++up_to_[k];
  }
  std::size_t left = 0;
  std::size_t right = 0;
  for (std::int64_t place = 0; place < count;) {
    while (left < num_edges && below_[left] <= place) ++left;
    while (right < num_edges && up_to_[right] <= place) ++right;
    std::int64_t next = count;
    if (left < num_edges) next = std::min(next, below_[left]);
    if (right < num_edges) next = std::min(next, up_to_[right]);
    const auto range = static_cast<BinRange>(left << 16 | right);
    for (; place < next; ++place) ranges[order_.index(count - 1 - place)] = range;
  }
}

/// sorted(place): the values in ascending order, asked for at places that never fall by more than one.
template <class Value>
template <class Sorted>
void CellEdges<Value>::set_edges(std::int64_t count, Sorted&& sorted) {
  const auto last = static_cast<double>(count - 1);
  for (std::size_t k = 0; k < quantiles_.size(); ++k) {
    const double t = quantiles_[k] * last;
    const auto place = static_cast<std::int64_t>(t);
    const Value a = sorted(place);
    const Value b = sorted(std::min(place + 1, count - 1));
    const double g = t - static_cast<double>(place);
    const auto d = static_cast<double>(static_cast<Value>(b - a));
    edges_[k] = g < 0.5 ? static_cast<double>(a) + d * g : static_cast<double>(b) - d * (1.0 - g);
  }
}

template <class Value>
const BinRange* CellEdges<Value>::find(const Value* values, std::int64_t count, Value highest, bool whole) {
  BinRange* ranges = ranges_.reserve(count);
  if (count == 0) return ranges;
  if (whole && highest <= static_cast<Value>(std::min(kMostCounted, kCountedPerValue * count))) {
    tally_numbers(values, count, static_cast<std::int64_t>(highest));
    locate_tallied(count);
    if constexpr (std::is_same_v<Value, float>) {
      kernels_.look_up(values, count, table_.data(), ranges);
    } else {
      for (std::int64_t i = 0; i < count; ++i) ranges[i] = table_[static_cast<std::size_t>(values[i])];
    }
    return ranges;
  }
  if (tally_distinct(values, count)) {
    locate_tallied(count);
    const std::uint16_t* value_slots = value_slots_.data();
    for (std::int64_t i = 0; i < count; ++i) ranges[i] = table_[value_slots[i]];
    return ranges;
  }
  sort_values(values, count);
  set_edges(count, [&](std::int64_t place) { return values[order_.index(count - 1 - place)]; });
  locate_sorted(values, count, ranges);
  return ranges;
}

template class CellEdges<float>;
template class CellEdges<double>;

}  // namespace scfm
