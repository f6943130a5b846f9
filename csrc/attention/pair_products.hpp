/// Products of bfloat16 pairs (AVX512-BF16): two terms a step, sums in float32. An element is two
/// neighbouring terms in one 32-bit word, the first in the low half.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "attention/attention_tiles.hpp"

namespace scfm {
namespace {

struct Pairs {
  using Element = uint32_t;
  using Left = __m512bh;
  using Right = __m512bh;
  static constexpr int kTerms = 2;
  static Right right(const uint32_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Left left(const uint32_t* p) { return (__m512bh)_mm512_set1_epi32(static_cast<int>(*p)); }
  static Vec multiply_add(Left left, Right right, Vec sum) {
    return {_mm512_dpbf16_ps(sum.lane, right, left)};
  }
};

inline int pairs_for(int64_t terms) { return static_cast<int>((terms + 1) / 2); }
inline __mmask32 words_below(int64_t n) {
  return n >= 32 ? ~__mmask32{0} : static_cast<__mmask32>((uint64_t{1} << (n > 0 ? n : 0)) - 1);
}
/// Up to 32 bfloat16 numbers as 16 pairs.
inline __m512i load_pairs(const uint16_t* p, int64_t n) {
  return _mm512_maskz_loadu_epi16(words_below(n), p);
}

/// Pairs along each row: rows of `padded` / 2 words, zeros after `columns` and after `count` rows.
inline void pack_pair_rows(const uint16_t* x, int64_t stride, int64_t count, int64_t rows, int columns,
                           int padded, uint32_t* out) {
  const int words = padded / 2;
  for (int64_t r = 0; r < rows; ++r, out += words) {
    for (int w = 0; w < words; w += kWidth) {
      const __m512i row =
          r < count ? load_pairs(x + r * stride + 2 * w, columns - 2 * w) : _mm512_setzero_si512();
      _mm512_mask_storeu_epi32(out + w, lanes_below(static_cast<int>(smaller(kWidth, words - w))), row);
    }
  }
}

/// A 16 x 16 block of words, rows to columns.
inline void transpose_words(__m512i (&rows)[16]) {
  __m512i step[16];
  for (int i = 0; i < 8; ++i) {
    step[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    step[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    rows[4 * i] = _mm512_unpacklo_epi64(step[4 * i], step[4 * i + 2]);
    rows[4 * i + 1] = _mm512_unpackhi_epi64(step[4 * i], step[4 * i + 2]);
    rows[4 * i + 2] = _mm512_unpacklo_epi64(step[4 * i + 1], step[4 * i + 3]);
    rows[4 * i + 3] = _mm512_unpackhi_epi64(step[4 * i + 1], step[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    step[i] = _mm512_shuffle_i32x4(rows[i], rows[4 + i], 0x88);
    step[4 + i] = _mm512_shuffle_i32x4(rows[i], rows[4 + i], 0xdd);
    step[8 + i] = _mm512_shuffle_i32x4(rows[8 + i], rows[12 + i], 0x88);
    step[12 + i] = _mm512_shuffle_i32x4(rows[8 + i], rows[12 + i], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    rows[i] = _mm512_shuffle_i32x4(step[i], step[8 + i], 0x88);
    rows[8 + i] = _mm512_shuffle_i32x4(step[i], step[8 + i], 0xdd);
  }
}

/// Pairs along each row of x, rows side by side: out[panel][pair][row], panels of kColumns rows.
template <int kColumns>
inline void pack_pair_panels(const uint16_t* x, int64_t stride, int64_t count, int columns, uint32_t* out) {
  const int pairs = pairs_for(columns);
  for (int64_t first = 0; first < count; first += kColumns, out += int64_t{kColumns} * pairs) {
    for (int part = 0; part < kColumns / kWidth; ++part) {
      const int64_t begin = first + part * kWidth;
      for (int w = 0; w < pairs; w += kWidth) {
        __m512i block[16];
        for (int r = 0; r < 16; ++r) {
          const bool real = begin + r < count;
          block[r] =
              real ? load_pairs(x + (begin + r) * stride + 2 * w, columns - 2 * w) : _mm512_setzero_si512();
        }
        transpose_words(block);
        for (int i = 0; i < smaller(kWidth, pairs - w); ++i) {
          _mm512_storeu_si512(out + static_cast<int64_t>(w + i) * kColumns + part * kWidth, block[i]);
        }
      }
    }
  }
}

/// Pairs of two rows: out[pair of rows][column]; a last odd row is paired with zeros.
inline void pack_row_pairs(const uint16_t* x, int64_t stride, int64_t count, int columns, int padded,
                           uint32_t* out) {
  for (int64_t r = 0; r < count; r += 2, out += padded) {
    for (int c = 0; c < padded; c += kWidth) {
      const __mmask16 real = lanes_below(static_cast<int>(columns > c ? smaller(kWidth, columns - c) : 0));
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(real, x + r * stride + c));
      __m512i high = _mm512_setzero_si512();
      if (r + 1 < count)
        high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(real, x + (r + 1) * stride + c));
      _mm512_storeu_si512(out + c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
}

/// 16 pairs of two vectors' lanes, rounded.
inline void store_lane_pairs(uint32_t* out, Vec low, Vec high) {
  const __m512i first = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(low.lane));
  const __m512i second = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(high.lane));
  _mm512_storeu_si512(out, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
}

/// 32 numbers, rounded, as 16 pairs in their order.
inline void store_rounded_pairs(uint32_t* out, Vec low, Vec high) {
  _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(high.lane, low.lane));
}

/// 2^x within 2^-13 for x up to 127, for what is rounded to bfloat16: below -127 what that rounds to 0; NaN
/// stays NaN. (The instruction that scales by a power of two takes the whole part of x by itself.)
inline Vec exp2_coarse(Vec x) {
  const __m512 bounded = _mm512_max_ps(_mm512_set1_ps(-127.0f), x.lane);  // of a number and NaN, NaN
  constexpr int kFloor = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  const __m512 f = _mm512_reduce_ps(bounded, kFloor);
  __m512 p = _mm512_set1_ps(0.078023009f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.22606939f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69583285f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.99992526f));
  return {_mm512_scalef_ps(p, bounded)};
}

}  // namespace
}  // namespace scfm
