/// The vector vocabulary (see simd_generic.hpp) for AVX-512; with AVX512-BF16 also products of bf16 pairs.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace scfm {
namespace {

struct Vec {
  static constexpr int width = 16;
  __m512 lane;
};

inline __mmask16 lanes_below(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Vec zero_vec() { return {_mm512_setzero_ps()}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load_partial(const float* p, int n) { return {_mm512_maskz_loadu_ps(lanes_below(n), p)}; }
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x.lane); }
inline void store_partial(float* p, Vec x, int n) { _mm512_mask_storeu_ps(p, lanes_below(n), x.lane); }

inline Vec widen_bf16(__m256i bits) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
/// Round to nearest, ties to even; NaN stays NaN. (Not the instruction of AVX512-BF16, which flushes
/// subnormals.)
inline __m256i narrow_bf16(Vec x) {
  const __m512i bits = _mm512_castps_si512(x.lane);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x.lane, x.lane, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(is_nan, rounded, quiet), 16));
}
inline Vec load_bf16(const uint16_t* p) {
  return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec load_bf16_partial(const uint16_t* p, int n) {
  return widen_bf16(_mm256_maskz_loadu_epi16(lanes_below(n), p));
}
inline void store_bf16(uint16_t* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(x));
}
inline void store_bf16_partial(uint16_t* p, Vec x, int n) {
  _mm256_mask_storeu_epi16(p, lanes_below(n), narrow_bf16(x));
}

inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.lane, b.lane)}; }
inline Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.lane, b.lane)}; }
inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.lane, b.lane)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.lane, b.lane)}; }
/// a * b + c
inline Vec fmadd(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.lane, b.lane, c.lane)}; }
/// Lanes below n from a, the rest from b.
inline Vec first_lanes(int n, Vec a, Vec b) { return {_mm512_mask_blend_ps(lanes_below(n), b.lane, a.lane)}; }
inline float reduce_add(Vec x) { return _mm512_reduce_add_ps(x.lane); }
inline float reduce_max(Vec x) { return _mm512_reduce_max_ps(x.lane); }
/// Lane i = base[index[i] - origin] for the first n lanes; the others are zero.
inline Vec gather(const float* base, const int32_t* index, int32_t origin, int n) {
  const __mmask16 inside = lanes_below(n);
  const __m512i places = _mm512_sub_epi32(_mm512_maskz_loadu_epi32(inside, index), _mm512_set1_epi32(origin));
  return {_mm512_mask_i32gather_ps(_mm512_setzero_ps(), inside, places, base, 4)};
}
/// p[0 .. 3] = the sums of the lanes of a, b, c, d.
inline void store_sums4(float* p, Vec a, Vec b, Vec c, Vec d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.lane, b.lane), _mm512_unpackhi_ps(a.lane, b.lane));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.lane, d.lane), _mm512_unpackhi_ps(c.lane, d.lane));
  const __m512d x = _mm512_castps_pd(ab);
  const __m512d y = _mm512_castps_pd(cd);
  const __m512 sums =
      _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps(sums, 1));
  _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
/// 2^x within 2^-22 for x <= 0 down to -126; 0 below and for -infinity; NaN stays NaN.
inline Vec exp2_vec(Vec x) {
  const __m512 low = _mm512_set1_ps(-126.0f);
  const __mmask16 in_range = _mm512_cmp_ps_mask(x.lane, low, _CMP_NLT_UQ);
  const __m512 whole =
      _mm512_maskz_roundscale_ps(in_range, x.lane, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_maskz_sub_ps(in_range, x.lane, whole);
  __m512 p = _mm512_set1_ps(1.5403530e-4f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3333558e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return {_mm512_maskz_scalef_ps(in_range, p, whole)};
}

/// 2^x within 2^-22 for every x: 0 below -126, infinity from 128, NaN stays NaN.
inline Vec exp2_any(Vec x) {
  const __mmask16 in_range = _mm512_cmp_ps_mask(x.lane, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  const __m512 bounded =
      _mm512_maskz_min_ps(in_range, _mm512_set1_ps(128.0f), x.lane);  // of NaN and 128, NaN
  const __m512 whole = _mm512_roundscale_ps(bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(bounded, whole);
  __m512 p = _mm512_set1_ps(1.5403530e-4f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3333558e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return {_mm512_maskz_scalef_ps(in_range, p, whole)};
}

}  // namespace
}  // namespace scfm
