/// From counts to the values that rank them, to the bit as on the CPU (tokenize/rank_scalar.hpp): the same
/// operations in the same order. There is no sum of a product here, so the compiler has nothing to fuse, and
/// divisions are correctly rounded unless fast math is asked for, which it must not be.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/csr_rows.cuh"

namespace scfm::cuda {

/// What is fixed for a row: the library size in the form that the arithmetic multiplies or divides by.
struct RowScale {
  bool divides;
  bool is_32;
  double scale64;
  float scale32;

  __device__ RowScale(RankArithmetic arithmetic, double library_size)
      : divides(arithmetic == RankArithmetic::divide64 || arithmetic == RankArithmetic::divide32),
        is_32(arithmetic == RankArithmetic::multiply32 || arithmetic == RankArithmetic::divide32),
        scale64(divides ? library_size : 1.0 / library_size),
        scale32(divides ? static_cast<float>(library_size) : 1.0f / static_cast<float>(library_size)) {}

  /// x / n * 10000
  __device__ double count_per_10k(double x) const {
    if (!is_32) return (divides ? x / scale64 : x * scale64) * 10000.0;
    const auto narrow = static_cast<float>(x);
    return static_cast<double>((divides ? narrow / scale32 : narrow * scale32) * 10000.0f);
  }

  __device__ double ranked_value(double x, double factor) const {
    const double count = count_per_10k(x);
    return divides ? count / factor : count * factor;
  }
};

/// Sorted descending, keys list the tokens of a cell: values above zero by their bits, which rise with them;
/// then what is not above zero; then what is no token.
inline constexpr std::uint64_t kNoToken = 0;
inline constexpr std::uint64_t kLastTokens = 1;

__device__ inline std::uint64_t key_of(double ranked) {
  if (!(ranked > 0.0)) return kLastTokens;
  return static_cast<std::uint64_t>(__double_as_longlong(ranked)) + kLastTokens;
}

/// The sum of a slot that several columns feed, in the order of its columns; `first` becomes the first entry
/// that feeds it, or -1.
__device__ inline double slot_sum(const DeviceRow& row, const DeviceGeneTable& table, std::int64_t slot,
                                  std::int32_t& first) {
  double sum = 0.0;
  first = -1;
  for (std::int32_t i = table.summed_offsets[slot]; i < table.summed_offsets[slot + 1]; ++i) {
    const std::int32_t entry = row.find(table.summed_columns[i]);
    if (entry < 0) continue;
    if (first < 0) first = entry;
    sum += row.value(entry);
  }
  return sum;
}

__device__ inline std::int64_t num_specials(const DeviceRankOptions& options) {
  return (options.prefix_token >= 0 ? 1 : 0) + (options.suffix_token >= 0 ? 1 : 0);
}

}  // namespace scfm::cuda
