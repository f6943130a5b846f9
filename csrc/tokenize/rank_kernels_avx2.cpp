/// rank_value's loops with AVX2: four float64 a step, the last entries of a row one by one.
#include <immintrin.h>

#include "tokenize/rank_scalar.hpp"

namespace scfm {
namespace {

/// For each set of four lanes, the 32-bit lanes that move its members to the front.
struct CompressTable {
  alignas(32) std::uint32_t lanes64[16][8];  // pairs, for four 64-bit values
  alignas(16) std::uint8_t bytes32[16][16];  // bytes, for four 32-bit values
};

constexpr CompressTable make_compress_table() {
  CompressTable table{};
  for (unsigned set = 0; set < 16; ++set) {
    unsigned place = 0;
    for (unsigned lane = 0; lane < 4; ++lane) {
      if ((set >> lane & 1u) == 0) continue;
      table.lanes64[set][2 * place] = 2 * lane;
      table.lanes64[set][2 * place + 1] = 2 * lane + 1;
      for (unsigned byte = 0; byte < 4; ++byte) {
        table.bytes32[set][4 * place + byte] = static_cast<std::uint8_t>(4 * lane + byte);
      }
      ++place;
    }
  }
  return table;
}

constexpr CompressTable kCompress = make_compress_table();

void store_compressed(void* out, unsigned set, __m256i values) noexcept {
  const __m256i lanes = _mm256_load_si256(reinterpret_cast<const __m256i*>(kCompress.lanes64[set]));
  _mm256_storeu_si256(static_cast<__m256i*>(out), _mm256_permutevar8x32_epi32(values, lanes));
}

void store_compressed(void* out, unsigned set, __m128i values) noexcept {
  const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(kCompress.bytes32[set]));
  _mm_storeu_si128(static_cast<__m128i*>(out), _mm_shuffle_epi8(values, bytes));
}

__m256d load_as_f64(const float* values) noexcept { return _mm256_cvtps_pd(_mm_loadu_ps(values)); }
__m256d load_as_f64(const double* values) noexcept { return _mm256_loadu_pd(values); }

template <RankArithmetic kArithmetic>
__m256d count_per_10k(__m256d values, const RowScale<kArithmetic>& scale) noexcept {
  using Scale = RowScale<kArithmetic>;
  if constexpr (Scale::kIs32) {
    const __m128 x = _mm256_cvtpd_ps(values);
    const __m128 by = _mm_set1_ps(scale.scale32);
    const __m128 share = Scale::kDivides ? _mm_div_ps(x, by) : _mm_mul_ps(x, by);
    return _mm256_cvtps_pd(_mm_mul_ps(share, _mm_set1_ps(10000.0f)));
  } else {
    const __m256d by = _mm256_set1_pd(scale.scale64);
    const __m256d share = Scale::kDivides ? _mm256_div_pd(values, by) : _mm256_mul_pd(values, by);
    return _mm256_mul_pd(share, _mm256_set1_pd(10000.0));
  }
}

/// Keys are below 2^63, so signed comparison serves.
__m256i smaller(__m256i a, __m256i b) noexcept { return _mm256_blendv_epi8(a, b, _mm256_cmpgt_epi64(a, b)); }
__m256i larger(__m256i a, __m256i b) noexcept { return _mm256_blendv_epi8(b, a, _mm256_cmpgt_epi64(a, b)); }

struct Extremes {
  __m256i lowest = _mm256_set1_epi64x(INT64_MAX);
  __m256i highest = _mm256_setzero_si256();

  void store_into(RowState& state) const noexcept {
    alignas(32) std::uint64_t low[4];
    alignas(32) std::uint64_t high[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(low), lowest);
    _mm256_store_si256(reinterpret_cast<__m256i*>(high), highest);
    for (int lane = 0; lane < 4; ++lane) {
      state.lowest = low[lane] < state.lowest ? low[lane] : state.lowest;
      state.highest = high[lane] > state.highest ? high[lane] : state.highest;
    }
  }
};

struct MakeKeys {
  template <RankArithmetic kArithmetic, class Value>
  static KeySummary run(const KeyArguments& row) noexcept {
    const RowScale<kArithmetic> scale(row.library_size);
    const auto* values = static_cast<const Value*>(row.values);
    const __m256d zero = _mm256_setzero_pd();
    const __m256d every_lane = _mm256_castsi256_pd(_mm256_set1_epi64x(-1));
    const __m256d keep_zeros = _mm256_castsi256_pd(_mm256_set1_epi64x(row.keep_zeros ? -1 : 0));
    RowState state;
    Extremes extremes;
    __m256d mapped_sum[2] = {zero, zero};
    __m256d total_sum[2] = {zero, zero};
    const std::int64_t whole = row.count & ~std::int64_t{7};
    for (std::int64_t i = 0; i < whole; i += 8) {
      for (int half = 0; half < 2; ++half) {
        const std::int64_t at = i + 4 * half;
        const __m128i columns = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row.columns + at));
        const __m256d x = load_as_f64(values + at);
        const __m256d factors = _mm256_mask_i32gather_pd(zero, row.factors, columns, every_lane, 8);
        const __m256d mapped = _mm256_cmp_pd(factors, zero, _CMP_NEQ_UQ);
        total_sum[half] = _mm256_add_pd(total_sum[half], x);
        mapped_sum[half] = _mm256_add_pd(mapped_sum[half], _mm256_and_pd(mapped, x));
        const __m256d token =
            _mm256_and_pd(mapped, _mm256_or_pd(_mm256_cmp_pd(x, zero, _CMP_NEQ_UQ), keep_zeros));
        const __m256d counts = count_per_10k(x, scale);
        const __m256d ranked =
            RowScale<kArithmetic>::kDivides ? _mm256_div_pd(counts, factors) : _mm256_mul_pd(counts, factors);
        const __m256d sorted = _mm256_and_pd(token, _mm256_cmp_pd(ranked, zero, _CMP_GT_OQ));
        const __m256i keys = _mm256_castpd_si256(ranked);
        const __m256i sorted_bits = _mm256_castpd_si256(sorted);
        extremes.lowest =
            smaller(extremes.lowest, _mm256_blendv_epi8(_mm256_set1_epi64x(INT64_MAX), keys, sorted_bits));
        extremes.highest = larger(extremes.highest, _mm256_and_si256(keys, sorted_bits));
        const auto set = static_cast<unsigned>(_mm256_movemask_pd(sorted));
        store_compressed(row.keys + state.num_keys, set, keys);
        store_compressed(row.genes + state.num_keys, set, columns);
        if (row.counts != nullptr)
          store_compressed(row.counts + state.num_keys, set, _mm256_castpd_si256(counts));
        state.num_keys += __builtin_popcount(set);
        const auto tail = static_cast<unsigned>(_mm256_movemask_pd(_mm256_andnot_pd(sorted, token)));
        if (tail != 0) {
          store_compressed(row.tail_genes + state.num_tail, tail, columns);
          if (row.tail_counts != nullptr) {
            store_compressed(row.tail_counts + state.num_tail, tail, _mm256_castpd_si256(counts));
          }
          state.num_tail += __builtin_popcount(tail);
        }
      }
    }
    extremes.store_into(state);
    for (int half = 0; half < 2; ++half) {
      _mm256_storeu_pd(state.mapped + 4 * half, mapped_sum[half]);
      _mm256_storeu_pd(state.total + 4 * half, total_sum[half]);
    }
    make_keys_scalar<kArithmetic, Value>(row, whole, state);
    return state.summary();
  }
};

ColumnScan scan_columns(const std::int32_t* columns, std::int64_t count) noexcept {
  if (count == 0) return {0, true};
  __m256i highest = _mm256_set1_epi32(columns[0]);
  __m256i rises = _mm256_set1_epi32(-1);
  std::int64_t i = 1;
  for (; i + 8 <= count; i += 8) {
    const __m256i here = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns + i));
    const __m256i before = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns + i - 1));
    highest = _mm256_max_epu32(highest, here);
    rises = _mm256_and_si256(rises, _mm256_cmpgt_epi32(here, before));
  }
  alignas(32) std::uint32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), highest);
  ColumnScan scan{lanes[0], _mm256_movemask_epi8(rises) == -1};
  for (const std::uint32_t lane : lanes) scan.highest = lane > scan.highest ? lane : scan.highest;
  return scan_columns_scalar(columns, i, count, scan);
}

void compose(const std::uint64_t* keys, std::int64_t count, std::uint64_t highest, int shift, int index_bits,
             std::uint64_t* out) noexcept {
  const __m256i top = _mm256_set1_epi64x(static_cast<long long>(highest));
  const __m128i right = _mm_cvtsi32_si128(shift);
  const __m128i left = _mm_cvtsi32_si128(index_bits);
  __m256i index = _mm256_setr_epi64x(0, 1, 2, 3);
  std::int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const __m256i key = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + i));
    const __m256i below = _mm256_srl_epi64(_mm256_sub_epi64(top, key), right);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                        _mm256_or_si256(_mm256_sll_epi64(below, left), index));
    index = _mm256_add_epi64(index, _mm256_set1_epi64x(4));
  }
  compose_scalar(keys, i, count, highest, shift, index_bits, out);
}

/// Inclusive sums of 8 lanes.
__m256i running_sums(__m256i sizes) noexcept {
  sizes = _mm256_add_epi32(sizes, _mm256_slli_si256(sizes, 4));
  sizes = _mm256_add_epi32(sizes, _mm256_slli_si256(sizes, 8));
  const __m256i low_total = _mm256_shuffle_epi32(_mm256_permute2x128_si256(sizes, sizes, 0x08), 0xFF);
  return _mm256_add_epi32(sizes, low_total);
}

std::uint32_t make_offsets(std::uint32_t* sizes, std::int64_t count) noexcept {
  const __m256i last = _mm256_set1_epi32(7);
  __m256i before = _mm256_setzero_si256();
  __m256i largest = _mm256_setzero_si256();
  for (std::int64_t i = 0; i < count; i += 8) {
    auto* place = reinterpret_cast<__m256i*>(sizes + i);
    const __m256i here = _mm256_loadu_si256(place);
    const __m256i sums = running_sums(here);
    largest = _mm256_max_epu32(largest, here);
    _mm256_storeu_si256(place, _mm256_add_epi32(before, _mm256_sub_epi32(sums, here)));
    before = _mm256_add_epi32(before, _mm256_permutevar8x32_epi32(sums, last));
  }
  alignas(32) std::uint32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), largest);
  std::uint32_t result = 0;
  for (const std::uint32_t lane : lanes) result = lane > result ? lane : result;
  return result;
}

/// Puts each pair of neighbours, lanes (0, 1) and (2, 3), in order.
__m256i exchange_pairs(__m256i values) noexcept {
  const __m256i partner = _mm256_shuffle_epi32(values, 0x4E);
  // The left of a pair takes its partner if that is smaller, the right if it is larger.
  const __m256i take =
      _mm256_xor_si256(_mm256_cmpgt_epi64(values, partner), _mm256_setr_epi64x(0, -1, 0, -1));
  return _mm256_blendv_epi8(values, partner, take);
}

/// The last lane of `before`, then the first three of `here`.
__m256i step_back(__m256i here, __m256i before) noexcept {
  return _mm256_alignr_epi8(here, _mm256_permute2x128_si256(before, here, 0x21), 8);
}

/// Four passes in one sweep: each stage lags one lane behind the stage that feeds it, which also turns its
/// pairs from even to odd and back.
void settle(std::uint64_t* values, std::int64_t count, std::int64_t largest) noexcept {
  for (std::int64_t passes = 0; passes <= largest; passes += 4) {
    __m256i first = _mm256_setzero_si256();
    __m256i second = first;
    __m256i third = first;
    for (std::int64_t i = 0; i < count + 3; i += 4) {
      const __m256i here = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + i));
      const __m256i even = exchange_pairs(here);
      const __m256i odd = exchange_pairs(step_back(even, first));
      const __m256i even_again = exchange_pairs(step_back(odd, second));
      const __m256i odd_again = exchange_pairs(step_back(even_again, third));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + i - 3), odd_again);
      first = even;
      second = odd;
      third = even_again;
    }
  }
}

bool any_tie(const std::uint64_t* values, std::int64_t count, int index_bits) noexcept {
  const __m128i right = _mm_cvtsi32_si128(index_bits);
  const __m256i zero = _mm256_setzero_si256();
  __m256i ties = zero;
  std::int64_t i = 0;
  for (; i + 5 <= count; i += 4) {
    const __m256i here = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + i));
    const __m256i next = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + i + 1));
    ties = _mm256_or_si256(ties,
                           _mm256_cmpeq_epi64(_mm256_srl_epi64(_mm256_xor_si256(here, next), right), zero));
  }
  return _mm256_testz_si256(ties, ties) == 0 || any_tie_scalar(values, i, count, index_bits);
}

}  // namespace

const RankKernels rank_kernels_avx2 = {scan_columns, make_keys_with<MakeKeys>, compose, make_offsets, settle,
                                       any_tie};

}  // namespace scfm
