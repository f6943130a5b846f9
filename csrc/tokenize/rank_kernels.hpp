/// The vectorised inner loops of rank_value, one table per instruction set. All tables give the same bits.
///
/// A gene's value v orders the tokens of a cell. The bits of positive float64 rise with the number, so they
/// serve as integer keys; values that are not above zero (stored zeros, or a library size that makes them so)
/// take no part in the sorting: they follow at the end in the order of the columns.
#pragma once

#include <cstdint>

namespace scfm {

/// How a count x becomes its value, to the bit as the authors' numpy and scipy calls do (x a count, n the
/// library size, m the gene's median):
enum class RankArithmetic : int {
  multiply64,  // ((x * (1 / n)) * 10000) * (1 / m), all float64
  multiply32,  // x * (1 / n) * 10000 in float32, then * (1 / m) in float64
  divide64,    // x / n * 10000 / m, all float64
  divide32,    // x / n * 10000 in float32, then / m in float64
};

struct ColumnScan {
  std::uint32_t highest;  // as unsigned: a negative column shows as a huge one
  bool ascending;         // strictly: sorted, and no column twice
};

struct KeyArguments {
  const std::int32_t* columns;  // count columns, in range
  const void* values;           // count float32 or float64
  bool values_are_f64;
  std::int64_t count;
  const double*
      factors;  // per column: 1 / m or m as the arithmetic wants it; 0 for a column that is no token
  double library_size;
  RankArithmetic arithmetic;
  bool keep_zeros;
  // Written; each has room for count entries and one vector more.
  std::uint64_t* keys;       // of values above zero, in column order
  std::int32_t* genes;       // their columns
  double* counts;            // their x / n * 10000; null if not wanted
  std::int32_t* tail_genes;  // columns of the other tokens
  double* tail_counts;       // null if not wanted
};

struct KeySummary {
  std::int64_t num_keys;
  std::int64_t num_tail;
  std::uint64_t lowest;  // of the keys; meaningless without any
  std::uint64_t highest;
  double mapped_counts;  // sum of the values whose factor is not 0
  double total_counts;   // sum of all values
};

/// Above every word that is sorted; words stay below the sign bit so that signed comparison serves.
inline constexpr std::uint64_t kBeyondValues = 0x7FFFFFFFFFFFFFFFu;

struct RankKernels {
  ColumnScan (*scan_columns)(const std::int32_t* columns, std::int64_t count) noexcept;
  KeySummary (*make_keys)(const KeyArguments& arguments) noexcept;
  /// out[i] = ((highest - keys[i]) >> shift) << index_bits | i: sorted ascending, these list the keys
  /// descending, and equal ones by index.
  void (*compose)(const std::uint64_t* keys, std::int64_t count, std::uint64_t highest, int shift,
                  int index_bits, std::uint64_t* out) noexcept;
  /// sizes[i] becomes the sum of those before it; returns the largest. count is a multiple of 16.
  std::uint32_t (*make_offsets)(std::uint32_t* sizes, std::int64_t count) noexcept;
  /// Sorts values that stand in sorted groups, no group larger than `largest`, by rounds of odd-even
  /// transposition. The 8 places before the values must hold 0 and the 16 after them kBeyondValues; both may
  /// be written.
  void (*settle)(std::uint64_t* values, std::int64_t count, std::int64_t largest) noexcept;
  /// Whether two neighbours agree above the lowest index_bits bits.
  bool (*any_tie)(const std::uint64_t* values, std::int64_t count, int index_bits) noexcept;
};

extern const RankKernels rank_kernels_generic;
extern const RankKernels rank_kernels_avx2;
extern const RankKernels rank_kernels_avx512;

}  // namespace scfm
