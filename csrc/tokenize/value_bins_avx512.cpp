/// value_bins' loops for AVX-512: sixteen entries or counters a step, the last entries by masks, so nothing
/// is read past the end of the caller's arrays; the others as the compiler vectorises them.
#include <immintrin.h>

#include "tokenize/value_bins_loops.hpp"

namespace scfm {
namespace {

/// Sixteen values as float32; adds them, as float64 in eight lanes, to the sums of all and of those mapped.
__m512 load_and_sum(const float* values, __mmask16 live, __mmask16 mapped, __m512d& total,
                    __m512d& mapped_sum) noexcept {
  const __m512 x = _mm512_maskz_loadu_ps(live, values);
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
  total = _mm512_add_pd(_mm512_add_pd(total, low), high);
  mapped_sum = _mm512_mask_add_pd(mapped_sum, static_cast<__mmask8>(mapped), mapped_sum, low);
  mapped_sum = _mm512_mask_add_pd(mapped_sum, static_cast<__mmask8>(mapped >> 8), mapped_sum, high);
  return x;
}

__m512 load_and_sum(const double* values, __mmask16 live, __mmask16 mapped, __m512d& total,
                    __m512d& mapped_sum) noexcept {
  const __m512d low = _mm512_maskz_loadu_pd(static_cast<__mmask8>(live), values);
  const __m512d high = _mm512_maskz_loadu_pd(static_cast<__mmask8>(live >> 8), values + 8);
  total = _mm512_add_pd(_mm512_add_pd(total, low), high);
  mapped_sum = _mm512_mask_add_pd(mapped_sum, static_cast<__mmask8>(mapped), mapped_sum, low);
  mapped_sum = _mm512_mask_add_pd(mapped_sum, static_cast<__mmask8>(mapped >> 8), mapped_sum, high);
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(low)), _mm512_cvtpd_ps(high), 1);
}

/// A double may be above 0 and yet 0 or infinite as a float: only its sign is asked of the double itself.
__mmask16 not_negative(const float*, __mmask16, __m512 x) noexcept {
  return _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GE_OQ);
}
__mmask16 not_negative(const double* values, __mmask16 live, __m512) noexcept {
  const __m512d low = _mm512_maskz_loadu_pd(static_cast<__mmask8>(live), values);
  const __m512d high = _mm512_maskz_loadu_pd(static_cast<__mmask8>(live >> 8), values + 8);
  const unsigned lower = _mm512_cmp_pd_mask(low, _mm512_setzero_pd(), _CMP_GE_OQ);
  const unsigned upper = _mm512_cmp_pd_mask(high, _mm512_setzero_pd(), _CMP_GE_OQ);
  return static_cast<__mmask16>(lower | upper << 8);
}

__m512i mixed(__m256i tokens, __m256i bits) noexcept {
  const __m512i both =
      _mm512_or_si512(_mm512_slli_epi64(_mm512_cvtepu32_epi64(tokens), 32), _mm512_cvtepu32_epi64(bits));
  const auto factor = static_cast<long long>(kFingerprintFactor);
  const __m512i product = _mm512_mullo_epi64(both, _mm512_set1_epi64(factor));
  return _mm512_xor_si512(product, _mm512_srli_epi64(product, 32));
}

template <class Value>
MatchSummary match_as(const MatchArguments& row) noexcept {
  const auto* values = static_cast<const Value*>(row.values);
  const __m512 zero = _mm512_setzero_ps();
  const __m512 all_whole_from = _mm512_set1_ps(kAllWholeFrom);
  __m512d total = _mm512_setzero_pd();
  __m512d mapped_sum = _mm512_setzero_pd();
  __m512i highest = _mm512_setzero_si512();
  __m512i fingerprint = _mm512_setzero_si512();
  unsigned impossible = 0;
  unsigned fractions = 0;
  MatchState state;
  for (std::int64_t i = 0; i < row.count; i += 16) {
    const std::int64_t left = row.count - i;
    const auto live = static_cast<__mmask16>(left >= 16 ? 0xFFFFu : (1u << left) - 1u);
    const __m512i columns = _mm512_maskz_loadu_epi32(live, row.columns + i);
    const __m512i tokens =
        _mm512_mask_i32gather_epi32(_mm512_set1_epi32(-1), live, columns, row.column_token, 4);
    const auto mapped = static_cast<__mmask16>(~_mm512_movepi32_mask(tokens));
    const __m512 x = load_and_sum(values + i, live, mapped, total, mapped_sum);
    const __mmask16 finite = _mm512_cmp_ps_mask(x, _mm512_set1_ps(kInfinity), _CMP_LT_OQ);
    impossible |= static_cast<unsigned>(live & ~(finite & not_negative(values + i, live, x)));
    const __mmask16 keep = _mm512_mask_cmp_ps_mask(mapped, x, zero, _CMP_NEQ_UQ);
    const __m512i bits = _mm512_maskz_mov_epi32(keep, _mm512_castps_si512(x));
    highest = _mm512_max_epu32(highest, bits);
    const __m512 rounded = _mm512_sub_ps(_mm512_add_ps(x, all_whole_from), all_whole_from);
    fractions |= _mm512_mask_cmp_ps_mask(keep, rounded, x, _CMP_NEQ_UQ) &
                 static_cast<unsigned>(_mm512_cmp_ps_mask(x, all_whole_from, _CMP_NGE_UQ));
    fingerprint = _mm512_mask_add_epi64(fingerprint, static_cast<__mmask8>(keep), fingerprint,
                                        mixed(_mm512_castsi512_si256(tokens), _mm512_castsi512_si256(bits)));
    fingerprint = _mm512_mask_add_epi64(
        fingerprint, static_cast<__mmask8>(keep >> 8), fingerprint,
        mixed(_mm512_extracti64x4_epi64(tokens, 1), _mm512_extracti64x4_epi64(bits, 1)));
    // Compress in the register and store all of it: a compressing store is many times slower on some
    // processors.
    _mm512_storeu_si512(row.tokens + state.num_kept, _mm512_maskz_compress_epi32(keep, tokens));
    _mm512_storeu_ps(row.kept + state.num_kept, _mm512_maskz_compress_ps(keep, x));
    state.num_kept += __builtin_popcount(keep);
  }
  _mm512_storeu_pd(state.total, total);
  _mm512_storeu_pd(state.mapped, mapped_sum);
  state.highest = _mm512_reduce_max_epu32(highest);
  std::uint64_t lanes[8];
  _mm512_storeu_si512(lanes, fingerprint);
  for (const std::uint64_t lane : lanes) state.fingerprint += lane;  // unsigned: meant to wrap around
  state.whole = fractions == 0;
  state.possible = impossible == 0;
  return state.summary();
}

/// Eight 64-bit lanes of which the lower halves count, twice: their lower halves, stored.
void store_lower(const __m512i (&lanes)[2], std::uint32_t* words) noexcept {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(words), _mm512_cvtepi64_epi32(lanes[0]));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + 8), _mm512_cvtepi64_epi32(lanes[1]));
}

/// A product of the lower halves fills a 64-bit lane: its upper half is what the next round mixes in, and
/// what is left above a lower half is never looked at.
void random_words(const WordArguments& arguments) noexcept {
  constexpr int kXorOfThree = 0x96;
  const __m512i multiplier0 = _mm512_set1_epi64(kPhiloxMultiplier0);
  const __m512i multiplier1 = _mm512_set1_epi64(kPhiloxMultiplier1);
  const __m512i lane = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  for (std::int64_t block = 0; block < arguments.num_blocks; ++block) {
    __m512i c0[2];
    __m512i c1[2];
    __m512i c2[2];
    __m512i c3[2];
    for (int part = 0; part < 2; ++part) {
      c0[part] = _mm512_add_epi64(_mm512_set1_epi64(block * kWordLanes + 8 * part), lane);
      c1[part] = _mm512_set1_epi64(arguments.counter[0]);
      c2[part] = _mm512_set1_epi64(arguments.counter[1]);
      c3[part] = _mm512_set1_epi64(arguments.counter[2]);
    }
    std::uint32_t key0 = arguments.key[0];
    std::uint32_t key1 = arguments.key[1];
    for (int round = 0; round < 10; ++round) {
      const __m512i k0 = _mm512_set1_epi64(key0);
      const __m512i k1 = _mm512_set1_epi64(key1);
      for (int part = 0; part < 2; ++part) {
        const __m512i product0 = _mm512_mul_epu32(c0[part], multiplier0);
        const __m512i product1 = _mm512_mul_epu32(c2[part], multiplier1);
        c0[part] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product1, 32), c1[part], k0, kXorOfThree);
        c1[part] = product1;
        c2[part] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product0, 32), c3[part], k1, kXorOfThree);
        c3[part] = product0;
      }
      key0 += kPhiloxWeyl0;
      key1 += kPhiloxWeyl1;
    }
    std::uint32_t* words = arguments.words + block * kWordBlock;
    store_lower(c0, words);
    store_lower(c1, words + kWordLanes);
    store_lower(c2, words + 2 * kWordLanes);
    store_lower(c3, words + 3 * kWordLanes);
  }
}

MatchSummary match(const MatchArguments& row) noexcept {
  return row.values_are_f64 ? match_as<double>(row) : match_as<float>(row);
}

}  // namespace

const ValueBinsKernels value_bins_avx512 = {match, random_words, look_up, draw};

}  // namespace scfm
