/// The vector vocabulary (see simd_generic.hpp) for AVX2 with FMA.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace scfm {
namespace {

struct Vec {
  static constexpr int width = 8;
  __m256 lane;
};

inline __m256i lanes_below(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
inline Vec zero_vec() { return {_mm256_setzero_ps()}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load_partial(const float* p, int n) { return {_mm256_maskload_ps(p, lanes_below(n))}; }
inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x.lane); }
inline void store_partial(float* p, Vec x, int n) { _mm256_maskstore_ps(p, lanes_below(n), x.lane); }

inline Vec widen_bf16(__m128i bits) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
/// Round to nearest, ties to even; NaN stays NaN.
inline __m128i narrow_bf16(Vec x) {
  const __m256i bits = _mm256_castps_si256(x.lane);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x.lane, x.lane, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  return _mm256_castsi256_si128(packed);
}
inline Vec load_bf16(const uint16_t* p) {
  return widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Vec load_bf16_partial(const uint16_t* p, int n) {
  alignas(16) uint16_t whole[8] = {};
  for (int i = 0; i < n; ++i) whole[i] = p[i];
  return load_bf16(whole);
}
inline void store_bf16(uint16_t* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(x));
}
inline void store_bf16_partial(uint16_t* p, Vec x, int n) {
  alignas(16) uint16_t whole[8];
  store_bf16(whole, x);
  for (int i = 0; i < n; ++i) p[i] = whole[i];
}

inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.lane, b.lane)}; }
inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.lane, b.lane)}; }
inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.lane, b.lane)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.lane, b.lane)}; }
/// a * b + c
inline Vec fmadd(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.lane, b.lane, c.lane)}; }
/// Lanes below n from a, the rest from b.
inline Vec first_lanes(int n, Vec a, Vec b) {
  return {_mm256_blendv_ps(b.lane, a.lane, _mm256_castsi256_ps(lanes_below(n)))};
}
inline float reduce_add(Vec x) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x.lane), _mm256_extractf128_ps(x.lane, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
inline float reduce_max(Vec x) {
  __m128 most = _mm_max_ps(_mm256_castps256_ps128(x.lane), _mm256_extractf128_ps(x.lane, 1));
  most = _mm_max_ps(most, _mm_movehl_ps(most, most));
  return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
}
/// Lane i = base[index[i] - origin] for the first n lanes; the others are zero.
inline Vec gather(const float* base, const int32_t* index, int32_t origin, int n) {
  const __m256i inside = lanes_below(n);
  const __m256i places = _mm256_sub_epi32(_mm256_maskload_epi32(index, inside), _mm256_set1_epi32(origin));
  return {_mm256_mask_i32gather_ps(_mm256_setzero_ps(), base, places, _mm256_castsi256_ps(inside), 4)};
}
/// p[0 .. 3] = the sums of the lanes of a, b, c, d.
inline void store_sums4(float* p, Vec a, Vec b, Vec c, Vec d) {
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a.lane, b.lane), _mm256_unpackhi_ps(a.lane, b.lane));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c.lane, d.lane), _mm256_unpackhi_ps(c.lane, d.lane));
  const __m256d x = _mm256_castps_pd(ab);
  const __m256d y = _mm256_castps_pd(cd);
  const __m256 sums =
      _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)), _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
  _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
}
/// 2^x within 2^-22 for x <= 0 down to -126; 0 below and for -infinity; NaN stays NaN.
inline Vec exp2_vec(Vec x) {
  const __m256 low = _mm256_set1_ps(-126.0f);
  const __m256 in_range = _mm256_cmp_ps(x.lane, low, _CMP_NLT_UQ);
  const __m256 clamped = _mm256_max_ps(low, x.lane);  // NaN goes through
  const __m256 whole = _mm256_round_ps(clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 f = _mm256_sub_ps(clamped, whole);
  __m256 p = _mm256_set1_ps(1.5403530e-4f);
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.3333558e-3f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(9.6181291e-3f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(5.5504109e-2f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(2.4022651e-1f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(6.9314718e-1f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.0f));
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
  const __m256 scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
  return {_mm256_and_ps(scaled, in_range)};
}

/// 2^x within 2^-22 for every x: 0 below -126, infinity from 128, NaN stays NaN.
inline Vec exp2_any(Vec x) {
  const __m256 low = _mm256_set1_ps(-126.0f);
  const __m256 in_range = _mm256_cmp_ps(x.lane, low, _CMP_NLT_UQ);
  const __m256 bounded =
      _mm256_max_ps(low, _mm256_min_ps(_mm256_set1_ps(128.0f), x.lane));  // NaN goes through
  const __m256 whole = _mm256_round_ps(bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 f = _mm256_sub_ps(bounded, whole);
  __m256 p = _mm256_set1_ps(1.5403530e-4f);
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.3333558e-3f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(9.6181291e-3f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(5.5504109e-2f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(2.4022651e-1f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(6.9314718e-1f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.0f));
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
  const __m256 scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
  const __m256 is_nan = _mm256_cmp_ps(x.lane, x.lane, _CMP_UNORD_Q);
  return {_mm256_and_ps(_mm256_blendv_ps(scaled, x.lane, is_nan), in_range)};
}

}  // namespace
}  // namespace scfm
