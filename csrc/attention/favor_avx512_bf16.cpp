/// FAVOR+ attention's forward in products of bfloat16 pairs (see favor_pair_spans.hpp).
///
/// A tile of tokens has all its features at once, 6 x 272 floats in the first-level cache: their maximum is
/// known before any exponential is taken. The keys' features then lie as pairs of tokens, for the product
/// with the values; the queries' as pairs of features, for the product with the context.
#include <math.h>

#include "attention/favor_pair_spans.hpp"
#include "attention/simd_avx512.hpp"

namespace scfm {
namespace {
constexpr int kTileRows = 6;
constexpr int kTileVectors = 4;
}  // namespace
}  // namespace scfm

#include "attention/attention_rows.hpp"
#include "attention/pair_products.hpp"

namespace scfm {
namespace {

constexpr int kBlockTokens =
    48;  // whose keys' sum is formed apart: it keeps rounding errors of long cells small
constexpr float kHeadroom = 32.0f;  // in base 2: how far features may exceed the reference before it moves

struct PairScratch {
  PairScratch(const FavorShape& shape, float* memory) {
    const auto take = [&](int64_t count) {
      float* taken = memory + size;
      size += round_up(count, kWidth);
      return taken;
    };
    num_features = int64_t{shape.num_panels} * kWidth;
    weights_row = round_up(num_features, int64_t{kTileRows} * kWidth);
    projection = reinterpret_cast<uint32_t*>(take(num_features * pairs_for(shape.head_dim)));
    tokens = reinterpret_cast<uint32_t*>(take(int64_t{kBlockTokens} * shape.dim_padded / 2));
    right = reinterpret_cast<uint32_t*>(take((num_features + kBlockTokens) / 2 * shape.dim_padded));
    weights = reinterpret_cast<uint32_t*>(take(int64_t{kBlockTokens} / 2 * weights_row));
    features = take(kTileRows * num_features);
    exponents = take(kBlockTokens);
    centre = take(shape.dim_padded);
  }
  uint32_t* projection;  // [up to 4 panels][pair of dimensions][feature]
  uint32_t* tokens;      // a block's rows as pairs of dimensions
  uint32_t* right;       // values as pairs of tokens, or the context as pairs of features
  uint32_t* weights;     // e or q', as pairs
  float* features;       // of a tile: a row a token
  float* exponents;      // n(x) of a block's tokens
  float* centre;         // of the context (see pack_context)
  int64_t num_features;  // with padding
  int64_t weights_row;   // words between the pairs of tokens of the keys' weights
  int64_t size = 0;
};

inline void pack_projection(const FavorProjection& projection, const FavorShape& shape, uint32_t* out) {
  const int pairs = pairs_for(shape.head_dim);
  for (int p = 0; p < shape.num_panels; p += kTileVectors) {
    const int panels = static_cast<int>(smaller(kTileVectors, shape.num_panels - p));
    for (int i = 0; i < pairs; ++i) {
      for (int c = 0; c < panels; ++c, out += kWidth) {
        const float* from = projection.panels + (int64_t{p + c} * shape.head_dim + 2 * i) * kWidth;
        store_lane_pairs(out, load(from), 2 * i + 1 < shape.head_dim ? load(from + kWidth) : zero_vec());
      }
    }
  }
}

/// A block's tokens as pairs, with zeros to whole tiles, and n(x) of each in base 2; infinite behind the
/// last.
inline void load_tokens(const FavorRows& rows, int64_t first, int count, const FavorShape& shape,
                        const PairScratch& scratch) {
  const auto* x = static_cast<const uint16_t*>(rows.data) + first * rows.stride;
  const int64_t padded = round_up(count, kTileRows);
  pack_pair_rows(x, rows.stride, count, padded, shape.head_dim, shape.dim_padded, scratch.tokens);
  for (int t = 0; t < padded; ++t) {
    Vec sum = zero_vec();
    for (int c = 0; t < count && c < shape.head_dim; c += kWidth) {
      const Vec part = load_stored(x + t * rows.stride + c, shape.head_dim - c);
      sum = fmadd(part, part, sum);
    }
    scratch.exponents[t] = t < count ? shape.norm_scale * reduce_add(sum) : INFINITY;
  }
}

/// All features of a tile's tokens, in base 2, -infinity in the padding; the maximum of the first num_rows
/// tokens' in each lane.
inline Vec tile_features(const uint32_t* tokens, int num_rows, const FavorProjection& projection,
                         const FavorShape& shape, const PairScratch& scratch) {
  Vec most = broadcast(-INFINITY);
  const int pairs = pairs_for(shape.head_dim);
  for (int p = 0; p < shape.num_panels; p += kTileVectors) {
    with_count<kTileVectors>(static_cast<int>(smaller(kTileVectors, shape.num_panels - p)), [&](auto panels) {
      constexpr int kVectors = decltype(panels)::value;
      Vec sums[kTileRows][kVectors];
      for (int r = 0; r < kTileRows; ++r) {
        for (int c = 0; c < kVectors; ++c) sums[r][c] = load(projection.bias + (p + c) * kWidth);
      }
      add_tile<Pairs, kVectors>(tokens, shape.dim_padded / 2, 1,
                                scratch.projection + int64_t{p} * kWidth * pairs, kVectors * kWidth, pairs,
                                sums);
      for (int r = 0; r < kTileRows; ++r) {
        for (int c = 0; c < kVectors; ++c) {
          if (r < num_rows) most = max(sums[r][c], most);
          store(scratch.features + r * scratch.num_features + (p + c) * kWidth, sums[r][c]);
        }
      }
    });
  }
  return most;
}

/// e = 2^(features - exponents) of a tile as pairs of tokens; their sums go to `weighted`.
inline void weigh_keys(const PairScratch& scratch, const float* exponents, bool fresh, uint32_t* weights,
                       float* weighted) {
  Vec by[kTileRows];
  for (int r = 0; r < kTileRows; ++r) by[r] = broadcast(exponents[r]);
  for (int64_t f = 0; f < scratch.num_features; f += kWidth) {
    Vec sum = fresh ? zero_vec() : load(weighted + f);
    for (int r = 0; r < kTileRows; r += 2) {
      const float* row = scratch.features + r * scratch.num_features + f;
      const Vec low = exp2_coarse(sub(load(row), by[r]));
      const Vec high = exp2_coarse(sub(load(row + scratch.num_features), by[r + 1]));
      sum = add(sum, add(low, high));
      store_lane_pairs(weights + r / 2 * scratch.weights_row + f, low, high);
    }
    store(weighted + f, sum);
  }
}

/// products (+)= e^T v over a block's pairs of tokens; the sum of v likewise.
inline void add_values(const FavorKeySpan& span, int64_t first, int count, bool fresh,
                       const PairScratch& scratch) {
  const FavorShape& shape = span.shape;
  const auto* v = static_cast<const uint16_t*>(span.values.data) + first * span.values.stride;
  pack_row_pairs(v, span.values.stride, count, shape.head_dim, shape.dim_padded, scratch.right);
  for (int d = 0; d < shape.dim_padded; d += kTileVectors * kWidth) {
    with_count<kTileVectors>(
        static_cast<int>(smaller(kTileVectors, (shape.dim_padded - d) / kWidth)), [&](auto vectors) {
          constexpr int kVectors = decltype(vectors)::value;
          for (int64_t f = 0; f < scratch.num_features; f += kTileRows) {
            Vec sums[kTileRows][kVectors];
            for (int r = 0; r < kTileRows; ++r) {
              for (int c = 0; c < kVectors; ++c) sums[r][c] = zero_vec();
            }
            add_tile<Pairs, kVectors>(scratch.weights + f, 1, scratch.weights_row, scratch.right + d,
                                      shape.dim_padded, (count + 1) / 2, sums);
            const auto rows = static_cast<int>(smaller(kTileRows, scratch.num_features - f));
            for (int r = 0; r < rows; ++r) {
              float* place = span.sums.products + (f + r) * shape.dim_padded + d;
              for (int c = 0; c < kVectors; ++c) {
                const Vec before = fresh ? zero_vec() : load(place + c * kWidth);
                store(place + c * kWidth, add(before, sums[r][c]));
              }
            }
          }
        });
  }
  for (int d = 0; d < shape.dim_padded; d += kWidth) {
    Vec sum = zero_vec();
    for (int t = 0; t < count && d < shape.head_dim; ++t)
      sum = add(sum, load_stored(v + t * span.values.stride + d, shape.head_dim - d));
    store(span.sums.plain + d, fresh ? sum : add(load(span.sums.plain + d), sum));
  }
}

/// The context as pairs of features, less norm times a centre, which is added to every output again:
///     out = (q' context) / (q' norm) = (q' (context - norm centre^T)) / (q' norm) + centre
/// So what is rounded is only how far the values' weighted means are apart. The centre is their mean over the
/// features.
inline void pack_context(const float* context, const float* norm, const FavorShape& shape,
                         const PairScratch& scratch) {
  Vec total = zero_vec();
  for (int64_t f = 0; f < scratch.num_features; f += kWidth) total = add(total, load(norm + f));
  const float sum_of_norms = reduce_add(total);
  const Vec share = broadcast(sum_of_norms > 0.0f ? 1.0f / sum_of_norms : 0.0f);
  for (int d = 0; d < shape.dim_padded; d += kWidth) {
    Vec sum = zero_vec();
    for (int64_t f = 0; f < scratch.num_features; ++f)
      sum = add(sum, load(context + f * shape.dim_padded + d));
    const Vec centre = mul(sum, share);
    store(scratch.centre + d, centre);
    const auto centred = [&](int64_t f) {
      return sub(load(context + f * shape.dim_padded + d), mul(broadcast(norm[f]), centre));
    };
    for (int64_t f = 0; f < scratch.num_features; f += 2)
      store_lane_pairs(scratch.right + f / 2 * shape.dim_padded + d, centred(f), centred(f + 1));
  }
}

/// q' of a tile's row as pairs of features; returns 1 / (q' . norm).
inline float weigh_query(const PairScratch& scratch, int r, float exponent, const float* norm,
                         const FavorShape& shape) {
  const float* row = scratch.features + r * scratch.num_features;
  uint32_t* weights = scratch.weights + r * scratch.weights_row / 2;
  Vec most = broadcast(-INFINITY);
  for (int64_t f = 0; f < scratch.num_features; f += kWidth) most = max(load(row + f), most);
  const Vec by = broadcast(exponent + reduce_max(most));
  const Vec eps = broadcast(shape.eps);
  Vec total = zero_vec();
  for (int64_t f = 0; f < scratch.num_features; f += 2 * kWidth) {
    const bool both = f + kWidth < scratch.num_features;
    const Vec low = add(exp2_coarse(sub(load(row + f), by)), eps);
    const Vec high = both ? add(exp2_coarse(sub(load(row + f + kWidth), by)), eps) : zero_vec();
    total = fmadd(low, load(norm + f), total);
    if (both) total = fmadd(high, load(norm + f + kWidth), total);
    store_rounded_pairs(weights + f / 2, low, high);
  }
  return 1.0f / reduce_add(total);
}

/// A tile's rows of the output: q' context, times the factors, plus the centre.
inline void mix_context(const FavorRows& to, int64_t token, int num_rows, const float* factors,
                        const FavorShape& shape, const PairScratch& scratch) {
  for (int d = 0; d < shape.dim_padded; d += kTileVectors * kWidth) {
    with_count<kTileVectors>(
        static_cast<int>(smaller(kTileVectors, (shape.dim_padded - d) / kWidth)), [&](auto vectors) {
          constexpr int kVectors = decltype(vectors)::value;
          Vec sums[kTileRows][kVectors];
          for (int r = 0; r < kTileRows; ++r) {
            for (int c = 0; c < kVectors; ++c) sums[r][c] = zero_vec();
          }
          add_tile<Pairs, kVectors>(scratch.weights, scratch.weights_row / 2, 1, scratch.right + d,
                                    shape.dim_padded, scratch.num_features / 2, sums);
          for (int r = 0; r < num_rows; ++r) {
            auto* out = static_cast<uint16_t*>(to.data) + (token + r) * to.stride + d;
            for (int c = 0; c < kVectors; ++c) {
              const Vec mixed =
                  fmadd(sums[r][c], broadcast(factors[r]), load(scratch.centre + d + c * kWidth));
              store_stored(out + c * kWidth, mixed, shape.head_dim - d - c * kWidth);
            }
          }
        });
  }
}

/// The rows of the block after the one that begins with `first`, on their way into the cache.
[[gnu::always_inline]] inline void fetch_next(const FavorRows& rows, int64_t first, int64_t count,
                                              int head_dim) {
  fetch_rows<uint16_t>({rows.data, rows.stride}, first + kBlockTokens, first + 2 * kBlockTokens, count,
                       head_dim);
}

inline void scale_floats(float* x, int64_t count, float scale) {
  const Vec by = broadcast(scale);
  for (int64_t i = 0; i < count; i += kWidth) store(x + i, mul(load(x + i), by));
}

/// What the keys' exponentials are relative to, and what of them lies in the sums already.
struct KeySums {
  const FavorKeySpan& span;
  const PairScratch& scratch;
  float reference;
  float highest = -INFINITY;
  int64_t block = 0;  // its first token
  bool summed = false;

  /// Adds the values of the block's tokens before `stop`.
  void flush(int64_t stop) {
    if (stop == block) return;
    add_values(span, block, static_cast<int>(stop - block), !summed, scratch);
    summed = true;
    block = stop;
  }

  /// Features may exceed the reference by kHeadroom, which float32 holds easily.
  void follow(int64_t token) {
    if (!(highest > reference + kHeadroom) || span.fixed_maximum) return;
    flush(token);
    raise();
  }

  /// Makes what is summed relative to the highest feature.
  void raise() {
    if (summed && highest != reference) {
      const float scale = exp2f(reference - highest);
      scale_floats(span.sums.products, scratch.num_features * span.shape.dim_padded, scale);
      scale_floats(span.sums.weighted, scratch.num_features, scale);
    }
    reference = highest;
  }
};

}  // namespace

std::int64_t favor_pair_scratch_size(const FavorShape& shape) noexcept {
  static float nowhere[1];
  return PairScratch(shape, nowhere).size;
}

FavorLargest favor_pair_key_span(const FavorKeySpan& span) noexcept {
  const FavorShape& shape = span.shape;
  const PairScratch scratch(shape, span.scratch);
  pack_projection(span.projection, shape, scratch.projection);
  memset(scratch.weights, 0, sizeof(uint32_t) * static_cast<size_t>(kBlockTokens / 2 * scratch.weights_row));
  KeySums sums{span, scratch, span.fixed_maximum ? span.maximum : -INFINITY};
  for (int64_t first = 0; first < span.count; first += kBlockTokens) {
    const auto count = static_cast<int>(smaller(kBlockTokens, span.count - first));
    load_tokens(span.keys, first, count, shape, scratch);
    fetch_next(span.keys, first, span.count, shape.head_dim);
    fetch_next(span.values, first, span.count, shape.head_dim);
    for (int t = 0; t < count; t += kTileRows) {
      const Vec most = tile_features(scratch.tokens + int64_t{t} * (shape.dim_padded / 2), count - t,
                                     span.projection, shape, scratch);
      const float above = reduce_max(most);
      sums.highest = above > sums.highest ? above : sums.highest;
      sums.follow(first + t);
      float exponents[kTileRows];
      for (int r = 0; r < kTileRows; ++r) exponents[r] = scratch.exponents[t + r] + sums.reference;
      weigh_keys(scratch, exponents, first + t == 0,
                 scratch.weights + (first + t - sums.block) / 2 * scratch.weights_row, span.sums.weighted);
    }
    sums.flush(first + count);
  }
  *span.sums.total = static_cast<float>(span.count);
  if (!span.fixed_maximum) sums.raise();
  return {sums.reference, -1, 0};
}

void favor_pair_query_span(const FavorQuerySpan& span) noexcept {
  const FavorShape& shape = span.shape;
  const PairScratch scratch(shape, span.scratch);
  pack_projection(span.projection, shape, scratch.projection);
  pack_context(span.context, span.norm, shape, scratch);
  for (int64_t first = 0; first < span.count; first += kBlockTokens) {
    const auto count = static_cast<int>(smaller(kBlockTokens, span.count - first));
    load_tokens(span.queries, first, count, shape, scratch);
    fetch_next(span.queries, first, span.count, shape.head_dim);
    fetch_next(span.out, first, span.count, shape.head_dim);
    for (int t = 0; t < count; t += kTileRows) {
      const auto rows = static_cast<int>(smaller(kTileRows, count - t));
      tile_features(scratch.tokens + int64_t{t} * (shape.dim_padded / 2), rows, span.projection, shape,
                    scratch);
      float factors[kTileRows];
      for (int r = 0; r < rows; ++r)
        factors[r] = weigh_query(scratch, r, scratch.exponents[t + r], span.norm, shape);
      mix_context(span.out, first + t, rows, factors, shape, scratch);
    }
  }
}

}  // namespace scfm
