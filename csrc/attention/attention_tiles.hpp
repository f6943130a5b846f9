/// Products tiled so that their sums stay in registers, and the packing of what they read: used by the
/// forward and backward loops of attention inside a cell. The including file defines the tile, kTileRows x
/// kTileVectors, and includes one of simd_*.hpp first.
///
/// A product is sums[r][c] += sum_s left[r][s] * right[s][c]. `Floats` multiplies one term a step. Where the
/// processor has products of bfloat16 pairs, `Pairs` (pair_products.hpp) multiplies two.
///
/// Each sum runs over its terms in one fixed order, whatever tile it falls into.
#pragma once

#include <stdint.h>
#include <string.h>

namespace scfm {
namespace {

constexpr int kWidth = Vec::width;
constexpr int kTileColumns = kTileVectors * kWidth;

template <int N>
struct Count {
  static constexpr int value = N;
};

/// Calls body(Count<n>{}) for 1 <= n <= kMost.
template <int kMost, class Body>
inline void with_count(int n, Body body) {
  if constexpr (kMost == 1) {
    body(Count<1>{});
  } else if (n == kMost) {
    body(Count<kMost>{});
  } else {
    with_count<kMost - 1>(n, body);
  }
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
inline int vectors_for(int64_t columns) { return static_cast<int>((columns + kWidth - 1) / kWidth); }

/// One term a step.
struct Floats {
  using Element = float;
  using Left = Vec;
  using Right = Vec;
  static constexpr int kTerms = 1;
  static Vec right(const float* p) { return load(p); }
  static Vec left(const float* p) { return broadcast(*p); }
  static Vec multiply_add(Vec left, Vec right, Vec sum) { return fmadd(left, right, sum); }
};

/// A whole or partial vector of stored numbers, as float32.
inline Vec load_stored(const float* p, int n) { return n >= kWidth ? load(p) : load_partial(p, n); }
inline Vec load_stored(const uint16_t* p, int n) {
  return n >= kWidth ? load_bf16(p) : load_bf16_partial(p, n);
}
inline void store_stored(float* p, Vec x, int n) {
  if (n >= kWidth) {
    store(p, x);
  } else {
    store_partial(p, x, n);
  }
}
inline void store_stored(uint16_t* p, Vec x, int n) {
  if (n >= kWidth) {
    store_bf16(p, x);
  } else {
    store_bf16_partial(p, x, n);
  }
}

template <class Product, int kVectors>
inline void add_tile(const typename Product::Element* left, int64_t row_stride, int64_t step_stride,
                     const typename Product::Element* right, int64_t right_stride, int64_t steps,
                     Vec (&sums)[kTileRows][kVectors]) {
  for (int64_t s = 0; s < steps; ++s) {
    typename Product::Right row[kVectors];
    for (int c = 0; c < kVectors; ++c) row[c] = Product::right(right + s * right_stride + c * kWidth);
    for (int r = 0; r < kTileRows; ++r) {
      const typename Product::Left factor = Product::left(left + r * row_stride + s * step_stride);
      for (int c = 0; c < kVectors; ++c) sums[r][c] = Product::multiply_add(factor, row[c], sums[r][c]);
    }
  }
}

/// Rows as float32, `padded` columns each, times `scale`; rows from `count` to `rows` are zeros.
template <class Stored>
inline void pack_rows(const Stored* x, int64_t stride, int64_t count, int64_t rows, int columns, int padded,
                      float scale, float* out) {
  const Vec factor = broadcast(scale);
  for (int64_t r = 0; r < rows; ++r) {
    for (int c = 0; c < padded; c += kWidth) {
      const bool real = r < count && c < columns;
      store(out + r * padded + c,
            real ? mul(load_stored(x + r * stride + c, columns - c), factor) : zero_vec());
    }
  }
}

/// Panels of kColumns rows of x side by side: out[panel][column][row]; the last panel is filled with zeros.
template <int kColumns, class Stored>
inline void pack_panels(const Stored* x, int64_t stride, int64_t count, int columns, float* out) {
  float block[kWidth][kWidth];
  for (int64_t first = 0; first < count; first += kColumns, out += int64_t{kColumns} * columns) {
    for (int part = 0; part < kColumns / kWidth; ++part) {
      const int64_t begin = first + part * kWidth;
      for (int c = 0; c < columns; c += kWidth) {
        const int width = static_cast<int>(smaller(kWidth, columns - c));
        for (int r = 0; r < kWidth; ++r) {
          const Vec row = begin + r < count ? load_stored(x + (begin + r) * stride + c, width) : zero_vec();
          store(block[r], row);
        }
        for (int d = 0; d < width; ++d) {
          float* to = out + static_cast<int64_t>(c + d) * kColumns + part * kWidth;
          for (int r = 0; r < kWidth; ++r) to[r] = block[r][d];
        }
      }
    }
  }
}

}  // namespace
}  // namespace scfm
