/// One cell's quantile edges, and where each of its values lies among them.
///
/// Edges are numpy's linear quantiles of the values, to the bit: at t = q * (m - 1), between the neighbours a
/// and b of the sorted values, a + (b - a) * g or b - (b - a) * (1 - g), the difference in the values' own
/// type and the rest in float64. For a value x, left counts the edges <= x and right those < x; many equal
/// values make several edges fall on one of them, and then right and left are far apart.
///
/// Counts have few distinct values, and so has what was computed from counts: they are tallied, by the number
/// itself or in a hash table, and all is worked out once per distinct value. Other values are sorted
/// (RankOrder: linear time).
#pragma once

#include <cstdint>
#include <span>
#include <type_traits>
#include <vector>

#include "base/aligned_buffer.hpp"
#include "tokenize/rank_order.hpp"
#include "tokenize/value_bins_kernels.hpp"

namespace scfm {

/// left << 16 | right; both fit, as there are at most kMostEdges edges.
using BinRange = std::uint32_t;
inline constexpr std::int64_t kMostEdges = 32767;

/// The authors' choice for u in [0, 1): ceil(u * (right - left) + left), any of right + 1 .. left.
std::int32_t given_bin(BinRange range, double u) noexcept;

/// Value: float or double. One for each thread, for the scratch space in it.
template <class Value>
class CellEdges {
 public:
  /// quantiles: ascending, from 0 to 1, not empty.
  CellEdges(std::span<const double> quantiles, const RankKernels& sorting, const ValueBinsKernels& kernels)
      : quantiles_(quantiles), sorting_(sorting), kernels_(kernels), edges_(quantiles.size()) {}

  /// values: `count` of them, above 0 and finite, none above `highest`; whole: all are whole numbers. Returns
  /// their ranges, valid until the next call.
  const BinRange* find(const Value* values, std::int64_t count, Value highest, bool whole);

  /// Of the values given last.
  std::span<const double> edges() const noexcept { return edges_; }

 private:
  using Bits = std::conditional_t<std::is_same_v<Value, float>, std::uint32_t, std::uint64_t>;

  void tally_numbers(const Value* values, std::int64_t count, std::int64_t highest);
  bool tally_distinct(const Value* values, std::int64_t count);
  void locate_tallied(std::int64_t count);
  void sort_values(const Value* values, std::int64_t count);
  void locate_sorted(const Value* values, std::int64_t count, BinRange* ranges);
  template <class Sorted>
  void set_edges(std::int64_t count, Sorted&& sorted);

  std::span<const double> quantiles_;
  const RankKernels& sorting_;
  const ValueBinsKernels& kernels_;
  std::vector<double> edges_;
  std::vector<std::int64_t> below_;   // per edge: how many values are < it
  std::vector<std::int64_t> up_to_;   // per edge: how many values are <= it
  std::vector<Value> distinct_;       // ascending
  std::vector<std::int64_t> ends_;    // how many values are at most distinct_[i]
  std::vector<std::uint32_t> slots_;  // where distinct_[i] stands in table_: at the number, or in order found
  std::vector<BinRange> table_;
  std::vector<std::uint32_t> tally_;  // four interleaved, so that repeats do not wait for one another
  std::vector<Bits> buckets_;         // the hash table's keys, 0 for none, and what was found there
  std::vector<std::uint16_t> bucket_slots_;
  std::vector<Value> found_;  // distinct values in the order found
  AlignedBuffer<std::uint16_t> value_slots_;
  RankOrder order_;
  AlignedBuffer<std::uint64_t> keys_;
  AlignedBuffer<BinRange> ranges_;
};

}  // namespace scfm
