/// Sparse graph attention with AVX512-BF16: bfloat16 rows stay as they are, half the bytes to gather, and are
/// multiplied in pairs of elements (scores) or pairs of edges (weighted sums, whose weights are rounded too).
#include "attention/simd_avx512.hpp"

// The loops below are written against the vocabulary above.
#include "attention/graph_loops.hpp"

namespace scfm {
namespace {

constexpr int kPairWidth = 32;  // elements of a register
static_assert(kMaxGraphHeadDim <= kMaxVecs * kPairWidth);

inline __m512i load_pairs(const uint16_t* p) { return _mm512_loadu_si512(p); }
/// Those at p + from that lie before `size`, zeros behind.
inline __m512i load_pairs(const uint16_t* p, int from, int size) {
  const int left = size - from;
  const __mmask32 inside = left < kPairWidth ? (1u << left) - 1u : ~0u;
  return _mm512_maskz_loadu_epi16(inside, p + from);
}
inline __m512 add_products(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

template <int kVecs>
struct PairDots {
  static void run(const RowBlock& block, const GraphRows& left, int head_dim, const Packed<uint16_t>& packed,
                  float* scores) {
    block.for_rows([&](int64_t row, const int32_t* positions, int64_t count, int64_t at) {
      const uint16_t* from = static_cast<const uint16_t*>(left.data) + row * left.row_stride;
      __m512i a[kVecs];
      for (int v = 0; v < kVecs; ++v) a[v] = load_pairs(from, v * kPairWidth, head_dim);
      for (int64_t e = 0; e < count; e += 4) {
        const uint16_t* b[4];
        next_four(packed, positions, e, count, b);
        __m512 sum[4];
        for (int i = 0; i < 4; ++i) sum[i] = _mm512_setzero_ps();
        for (int v = 0; v < kVecs; ++v) {
          for (int i = 0; i < 4; ++i) sum[i] = add_products(sum[i], a[v], load_pairs(b[i] + v * kPairWidth));
        }
        store_sums4(scores + at + e, {sum[0]}, {sum[1]}, {sum[2]}, {sum[3]});
      }
    });
  }
};

/// Elements of two rows interleaved by the unpack instructions come in lanes of four; this puts 32 back in
/// order.
inline void reorder(__m512& low, __m512& high) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  const __m512 front = _mm512_permutex2var_ps(low, first, high);
  high = _mm512_permutex2var_ps(low, second, high);
  low = front;
}

inline void store_scaled(const GraphRows& out, int64_t row, int at, int head_dim, __m512 sum, Vec factor) {
  if (at < head_dim) store_stored(out, row, at, lanes_at(at, head_dim), mul({sum}, factor));
}

template <int kVecs>
struct PairMix {
  /// weights: bfloat16, two to the place of a float; a zero after the last.
  static void run(const RowBlock& block, const float* weights, const Packed<uint16_t>& packed, int head_dim,
                  const float* factors, const GraphRows& out) {
    block.for_rows([&](int64_t row, const int32_t* positions, int64_t count, int64_t at) {
      __m512 low[kVecs];
      __m512 high[kVecs];
      for (int v = 0; v < kVecs; ++v) low[v] = high[v] = _mm512_setzero_ps();
      for (int64_t e = 0; e < count; e += 2) {
        const uint16_t* first = packed.at(positions[e]);
        const uint16_t* second = packed.at(positions[e + 1 < count ? e + 1 : e]);
        const __m512i pair = _mm512_castps_si512(_mm512_set1_ps(weights[at + e / 2]));
        for (int v = 0; v < kVecs; ++v) {
          const __m512i a = load_pairs(first + v * kPairWidth);
          const __m512i b = load_pairs(second + v * kPairWidth);
          low[v] = add_products(low[v], _mm512_unpacklo_epi16(a, b), pair);
          high[v] = add_products(high[v], _mm512_unpackhi_epi16(a, b), pair);
        }
      }
      const Vec factor = broadcast(factors[row - block.begin]);
      for (int v = 0; v < kVecs; ++v) {
        reorder(low[v], high[v]);
        store_scaled(out, row, v * kPairWidth, head_dim, low[v], factor);
        store_scaled(out, row, v * kPairWidth + Vec::width, head_dim, high[v], factor);
      }
    });
  }
};

/// A row's weights as bfloat16, in place: half of it, then a zero where their number is odd.
inline void round_weights(float* weights, int64_t count) {
  auto* rounded = reinterpret_cast<uint16_t*>(weights);
  for (int64_t e = 0; e < count; e += Vec::width) {
    store_bf16(rounded + e, first_lanes(lanes_at(e, count), load(weights + e), zero_vec()));
  }
}

/// Packed rows of bfloat16.
struct PairRows {
  using Element = uint16_t;

  static int width(int head_dim) { return (head_dim + kPairWidth - 1) / kPairWidth * kPairWidth; }

  static void pack(const GraphRows& rows, int64_t num_rows, int head_dim, uint16_t* packed) {
    const int wide = width(head_dim);
    for (int64_t row = 0; row < num_rows; ++row) {
      const uint16_t* from = static_cast<const uint16_t*>(rows.data) + row * rows.row_stride;
      for (int at = 0; at < head_dim; at += kPairWidth) {
        _mm512_storeu_si512(packed + row * wide + at, load_pairs(from, at, head_dim));
      }
    }
  }

  static void dots(const RowBlock& block, const GraphRows& left, int head_dim, const Packed<uint16_t>& packed,
                   float* scores) {
    for_vecs<PairDots>(width(head_dim) / kPairWidth, block, left, head_dim, packed, scores);
  }

  /// Rounds the weights in place: they are not needed again.
  static void mix(const RowBlock& block, float* weights, const Packed<uint16_t>& packed, int head_dim,
                  const float* factors, const GraphRows& out) {
    block.for_rows(
        [&](int64_t, const int32_t*, int64_t count, int64_t at) { round_weights(weights + at, count); });
    for_vecs<PairMix>(width(head_dim) / kPairWidth, block, weights, packed, head_dim, factors, out);
  }
};

}  // namespace

const GraphKernels graph_avx512_bf16 = GraphTable<PairRows>::kKernels;

}  // namespace scfm
