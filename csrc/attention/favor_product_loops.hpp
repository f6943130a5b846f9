/// The three products of FAVOR+ attention for a block of tokens, tiled so that the sums stay in registers.
/// Written against the vocabulary of simd_*.hpp; the including file defines the tile: kTokenTile,
/// kVectorTile.
///
/// Each sum runs over its terms in one fixed order whatever tile it falls into, so a token's features have
/// the same bits in every pass and in every batch.
#pragma once

#include "attention/favor_kernels.hpp"

namespace scfm {
namespace {

constexpr int kBlockTokens = 48;
static_assert(kBlockTokens % kTokenTile == 0);
constexpr int kPanelStride = kBlockTokens * Vec::width;  // floats between the panels of a block's features
constexpr int kFeatureTile = 4;                          // divides the vector width
constexpr int kPanelsAtOnce = 4;  // whose rows of the right-hand side stay in the first-level cache

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

inline int smaller(int a, int b) { return a < b ? a : b; }
inline int tokens_in_tiles(int count) { return (count + kTokenTile - 1) / kTokenTile * kTokenTile; }

/// One tile of `features_of`.
template <int kVectors>
inline void features_tile(const float* x, int row_length, int depth, const float* panels, const float* bias,
                          float* out) {
  Vec sums[kTokenTile][kVectors];
  for (int r = 0; r < kTokenTile; ++r) {
    for (int c = 0; c < kVectors; ++c)
      sums[r][c] = bias == nullptr ? zero_vec() : load(bias + c * Vec::width);
  }
  for (int d = 0; d < depth; ++d) {
    Vec right[kVectors];
    for (int c = 0; c < kVectors; ++c) right[c] = load(panels + (c * depth + d) * Vec::width);
    for (int r = 0; r < kTokenTile; ++r) {
      const Vec left = broadcast(x[r * row_length + d]);
      for (int c = 0; c < kVectors; ++c) sums[r][c] = fmadd(left, right[c], sums[r][c]);
    }
  }
  for (int r = 0; r < kTokenTile; ++r) {
    for (int c = 0; c < kVectors; ++c) store(out + c * kPanelStride + r * Vec::width, sums[r][c]);
  }
}

/// out = x panels (+ bias): (tokens, D) times (D, F), as panels.
inline void features_of(const float* x, int count, const FavorShape& shape, const float* panels,
                        const float* bias, float* out) {
  const int tokens = tokens_in_tiles(count);
  for (int p = 0; p < shape.num_panels; p += kVectorTile) {
    with_count<kVectorTile>(smaller(kVectorTile, shape.num_panels - p), [&](auto vectors) {
      const float* right = panels + static_cast<int64_t>(p) * shape.head_dim * Vec::width;
      for (int t = 0; t < tokens; t += kTokenTile) {
        features_tile<decltype(vectors)::value>(x + t * shape.dim_padded, shape.dim_padded, shape.head_dim,
                                                right, bias == nullptr ? bias : bias + p * Vec::width,
                                                out + p * kPanelStride + t * Vec::width);
      }
    });
  }
}

/// One tile of `rows_of`: adds num_panels panels' terms.
template <int kVectors>
inline void rows_tile(const float* features, int num_panels, const float* right, int row_length, bool fresh,
                      float* out) {
  Vec sums[kTokenTile][kVectors];
  for (int r = 0; r < kTokenTile; ++r) {
    for (int c = 0; c < kVectors; ++c) {
      sums[r][c] = fresh ? zero_vec() : load(out + r * row_length + c * Vec::width);
    }
  }
  for (int p = 0; p < num_panels; ++p, features += kPanelStride) {
    for (int f = 0; f < Vec::width; ++f, right += row_length) {
      Vec row[kVectors];
      for (int c = 0; c < kVectors; ++c) row[c] = load(right + c * Vec::width);
      for (int r = 0; r < kTokenTile; ++r) {
        const Vec left = broadcast(features[r * Vec::width + f]);
        for (int c = 0; c < kVectors; ++c) sums[r][c] = fmadd(left, row[c], sums[r][c]);
      }
    }
  }
  for (int r = 0; r < kTokenTile; ++r) {
    for (int c = 0; c < kVectors; ++c) store(out + r * row_length + c * Vec::width, sums[r][c]);
  }
}

/// out = features right: (tokens, F) as panels times (F, D), as rows.
inline void rows_of(const float* features, int count, const FavorShape& shape, const float* right,
                    float* out) {
  const int tokens = tokens_in_tiles(count);
  for (int p = 0; p < shape.num_panels; p += kPanelsAtOnce) {
    const int num_panels = smaller(kPanelsAtOnce, shape.num_panels - p);
    const float* part = right + static_cast<int64_t>(p) * Vec::width * shape.dim_padded;
    for (int d = 0; d < shape.dim_padded; d += kVectorTile * Vec::width) {
      with_count<kVectorTile>(smaller(kVectorTile, (shape.dim_padded - d) / Vec::width), [&](auto vectors) {
        for (int t = 0; t < tokens; t += kTokenTile) {
          rows_tile<decltype(vectors)::value>(features + p * kPanelStride + t * Vec::width, num_panels,
                                              part + d, shape.dim_padded, p == 0,
                                              out + t * shape.dim_padded + d);
        }
      });
    }
  }
}

/// One tile of `add_products`.
template <int kVectors>
inline void products_tile(const float* features, const float* x, int count, int row_length, bool fresh,
                          float* out) {
  Vec sums[kFeatureTile][kVectors];
  for (int f = 0; f < kFeatureTile; ++f) {
    for (int c = 0; c < kVectors; ++c) sums[f][c] = zero_vec();
  }
  for (int t = 0; t < count; ++t) {
    Vec row[kVectors];
    for (int c = 0; c < kVectors; ++c) row[c] = load(x + t * row_length + c * Vec::width);
    for (int f = 0; f < kFeatureTile; ++f) {
      const Vec left = broadcast(features[t * Vec::width + f]);
      for (int c = 0; c < kVectors; ++c) sums[f][c] = fmadd(left, row[c], sums[f][c]);
    }
  }
  for (int f = 0; f < kFeatureTile; ++f) {
    for (int c = 0; c < kVectors; ++c) {
      float* place = out + f * row_length + c * Vec::width;
      store(place, fresh ? sums[f][c] : add(load(place), sums[f][c]));
    }
  }
}

/// out (+)= features^T x: (F, tokens) times (tokens, D), a row a feature; `fresh` overwrites. A block's sum
/// is formed apart before it is added, which keeps the rounding errors of long cells small.
inline void add_products(const float* features, const float* x, int count, const FavorShape& shape,
                         bool fresh, float* out) {
  for (int p = 0; p < shape.num_panels; ++p) {
    for (int d = 0; d < shape.dim_padded; d += kVectorTile * Vec::width) {
      with_count<kVectorTile>(smaller(kVectorTile, (shape.dim_padded - d) / Vec::width), [&](auto vectors) {
        for (int f = 0; f < Vec::width; f += kFeatureTile) {
          products_tile<decltype(vectors)::value>(
              features + p * kPanelStride + f, x + d, count, shape.dim_padded, fresh,
              out + (static_cast<int64_t>(p) * Vec::width + f) * shape.dim_padded + d);
        }
      });
    }
  }
}

}  // namespace
}  // namespace scfm
