/// rank_value's loops with AVX-512: eight entries a step, the last ones of a row by masks, so nothing is read
/// past the end of the caller's arrays.
#include <immintrin.h>

#include "tokenize/rank_scalar.hpp"

namespace scfm {
namespace {

__m256 load_f32(const float* values, __mmask8 live) noexcept { return _mm256_maskz_loadu_ps(live, values); }

/// Eight values as float64, to sum them; lanes that are not live give 0.
__m512d load_as_f64(const float* values, __mmask8 live) noexcept {
  return _mm512_cvtps_pd(load_f32(values, live));
}
__m512d load_as_f64(const double* values, __mmask8 live) noexcept {
  return _mm512_maskz_loadu_pd(live, values);
}

template <RankArithmetic kArithmetic>
__m512d count_per_10k(__m512d values, const RowScale<kArithmetic>& scale) noexcept {
  using Scale = RowScale<kArithmetic>;
  if constexpr (Scale::kIs32) {
    const __m256 x = _mm512_cvtpd_ps(values);
    const __m256 by = _mm256_set1_ps(scale.scale32);
    const __m256 share = Scale::kDivides ? _mm256_div_ps(x, by) : _mm256_mul_ps(x, by);
    return _mm512_cvtps_pd(_mm256_mul_ps(share, _mm256_set1_ps(10000.0f)));
  } else {
    const __m512d by = _mm512_set1_pd(scale.scale64);
    const __m512d share = Scale::kDivides ? _mm512_div_pd(values, by) : _mm512_mul_pd(values, by);
    return _mm512_mul_pd(share, _mm512_set1_pd(10000.0));
  }
}

struct MakeKeys {
  template <RankArithmetic kArithmetic, class Value>
  static KeySummary run(const KeyArguments& row) noexcept {
    const RowScale<kArithmetic> scale(row.library_size);
    const auto* values = static_cast<const Value*>(row.values);
    const __m512d zero = _mm512_setzero_pd();
    const __mmask8 keep_zeros = row.keep_zeros ? 0xFF : 0;
    RowState state;
    __m512i lowest = _mm512_set1_epi64(-1);
    __m512i highest = _mm512_setzero_si512();
    __m512d mapped_sum = zero;
    __m512d total_sum = zero;
    std::int64_t num_keys = 0;
    for (std::int64_t i = 0; i < row.count; i += 8) {
      const std::int64_t left = row.count - i;
      const auto live = static_cast<__mmask8>(left >= 8 ? 0xFFu : (1u << left) - 1u);
      const __m256i columns = _mm256_maskz_loadu_epi32(live, row.columns + i);
      const __m512d x = load_as_f64(values + i, live);
      const __m512d factors = _mm512_mask_i32gather_pd(zero, live, columns, row.factors, 8);
      const __mmask8 mapped = _mm512_cmp_pd_mask(factors, zero, _CMP_NEQ_UQ);
      total_sum = _mm512_add_pd(total_sum, x);
      mapped_sum = _mm512_mask_add_pd(mapped_sum, mapped, mapped_sum, x);
      const __mmask8 token = mapped & (_mm512_cmp_pd_mask(x, zero, _CMP_NEQ_UQ) | keep_zeros);
      const __m512d counts = count_per_10k(x, scale);
      const __m512d ranked =
          RowScale<kArithmetic>::kDivides ? _mm512_div_pd(counts, factors) : _mm512_mul_pd(counts, factors);
      const __mmask8 sorted = token & _mm512_cmp_pd_mask(ranked, zero, _CMP_GT_OQ);
      const __m512i keys = _mm512_castpd_si512(ranked);
      lowest = _mm512_mask_min_epu64(lowest, sorted, lowest, keys);
      highest = _mm512_mask_max_epu64(highest, sorted, highest, keys);
      // Compress in the register and store all of it: a compressing store is many times slower on some
      // processors.
      _mm512_storeu_si512(row.keys + num_keys, _mm512_maskz_compress_epi64(sorted, keys));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(row.genes + num_keys),
                          _mm256_maskz_compress_epi32(sorted, columns));
      if (row.counts != nullptr) {
        _mm512_storeu_pd(row.counts + num_keys, _mm512_maskz_compress_pd(sorted, counts));
      }
      num_keys += __builtin_popcount(sorted);
      const auto tail = static_cast<__mmask8>(token & ~sorted);
      if (tail != 0) {
        _mm256_mask_compressstoreu_epi32(row.tail_genes + state.num_tail, tail, columns);
        if (row.tail_counts != nullptr)
          _mm512_mask_compressstoreu_pd(row.tail_counts + state.num_tail, tail, counts);
        state.num_tail += __builtin_popcount(tail);
      }
    }
    state.num_keys = num_keys;
    state.lowest = _mm512_reduce_min_epu64(lowest);
    state.highest = _mm512_reduce_max_epu64(highest);
    _mm512_storeu_pd(state.mapped, mapped_sum);
    _mm512_storeu_pd(state.total, total_sum);
    return state.summary();
  }
};

ColumnScan scan_columns(const std::int32_t* columns, std::int64_t count) noexcept {
  if (count == 0) return {0, true};
  __m512i highest = _mm512_set1_epi32(columns[0]);
  __mmask16 falls = 0;
  for (std::int64_t i = 1; i < count; i += 16) {
    const std::int64_t left = count - i;
    const auto live = static_cast<__mmask16>(left >= 16 ? 0xFFFFu : (1u << left) - 1u);
    const __m512i here = _mm512_maskz_loadu_epi32(live, columns + i);
    const __m512i before = _mm512_maskz_loadu_epi32(live, columns + i - 1);
    highest = _mm512_max_epu32(highest, here);
    falls |= _mm512_mask_cmple_epi32_mask(live, here, before);
  }
  return {_mm512_reduce_max_epu32(highest), falls == 0};
}

void compose(const std::uint64_t* keys, std::int64_t count, std::uint64_t highest, int shift, int index_bits,
             std::uint64_t* out) noexcept {
  const __m512i top = _mm512_set1_epi64(static_cast<long long>(highest));
  const __m128i right = _mm_cvtsi32_si128(shift);
  const __m128i left = _mm_cvtsi32_si128(index_bits);
  __m512i index = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  std::int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m512i below = _mm512_srl_epi64(_mm512_sub_epi64(top, _mm512_loadu_si512(keys + i)), right);
    _mm512_storeu_si512(out + i, _mm512_or_si512(_mm512_sll_epi64(below, left), index));
    index = _mm512_add_epi64(index, _mm512_set1_epi64(8));
  }
  compose_scalar(keys, i, count, highest, shift, index_bits, out);
}

/// Inclusive sums of 16 lanes.
__m512i running_sums(__m512i sizes) noexcept {
  const __m512i zero = _mm512_setzero_si512();
  sizes = _mm512_add_epi32(sizes, _mm512_alignr_epi32(sizes, zero, 15));
  sizes = _mm512_add_epi32(sizes, _mm512_alignr_epi32(sizes, zero, 14));
  sizes = _mm512_add_epi32(sizes, _mm512_alignr_epi32(sizes, zero, 12));
  return _mm512_add_epi32(sizes, _mm512_alignr_epi32(sizes, zero, 8));
}

std::uint32_t make_offsets(std::uint32_t* sizes, std::int64_t count) noexcept {
  const __m512i last = _mm512_set1_epi32(15);
  __m512i before = _mm512_setzero_si512();
  __m512i largest = _mm512_setzero_si512();
  for (std::int64_t i = 0; i < count; i += 16) {
    const __m512i here = _mm512_loadu_si512(sizes + i);
    const __m512i sums = running_sums(here);
    largest = _mm512_max_epu32(largest, here);
    _mm512_storeu_si512(sizes + i, _mm512_add_epi32(before, _mm512_sub_epi32(sums, here)));
    before = _mm512_add_epi32(before, _mm512_permutexvar_epi32(last, sums));
  }
  return _mm512_reduce_max_epu32(largest);
}

/// Puts each pair of neighbours, lanes (0, 1), (2, 3), ..., in order.
__m512i exchange_pairs(__m512i values) noexcept {
  const __m512i partner = _mm512_shuffle_epi32(values, _MM_PERM_BADC);
  return _mm512_mask_max_epu64(_mm512_min_epu64(values, partner), 0xAA, values, partner);
}

/// The last lane of `before`, then the first seven of `here`.
__m512i step_back(__m512i here, __m512i before) noexcept { return _mm512_alignr_epi64(here, before, 7); }

/// Four passes in one sweep: each stage lags one lane behind the stage that feeds it, which also turns its
/// pairs from even to odd and back. Twice the speed of sweeping memory for every pass.
void settle(std::uint64_t* values, std::int64_t count, std::int64_t largest) noexcept {
  for (std::int64_t passes = 0; passes <= largest; passes += 4) {
    __m512i first = _mm512_setzero_si512();
    __m512i second = first;
    __m512i third = first;
    for (std::int64_t i = 0; i < count + 3; i += 8) {
      const __m512i even = exchange_pairs(_mm512_loadu_si512(values + i));
      const __m512i odd = exchange_pairs(step_back(even, first));
      const __m512i even_again = exchange_pairs(step_back(odd, second));
      const __m512i odd_again = exchange_pairs(step_back(even_again, third));
      _mm512_storeu_si512(values + i - 3, odd_again);
      first = even;
      second = odd;
      third = even_again;
    }
  }
}

bool any_tie(const std::uint64_t* values, std::int64_t count, int index_bits) noexcept {
  const __m128i right = _mm_cvtsi32_si128(index_bits);
  std::int64_t i = 0;
  for (; i + 9 <= count; i += 8) {
    const __m512i differ =
        _mm512_xor_si512(_mm512_loadu_si512(values + i), _mm512_loadu_si512(values + i + 1));
    const __m512i above = _mm512_srl_epi64(differ, right);
    if (_mm512_testn_epi64_mask(above, above) != 0) return true;
  }
  return any_tie_scalar(values, i, count, index_bits);
}

}  // namespace

const RankKernels rank_kernels_avx512 = {
    scan_columns, make_keys_with<MakeKeys>, compose, make_offsets, settle, any_tie};

}  // namespace scfm
