/// FAVOR+ attention over one span of a head's tokens: the keys' sums, their merging, and the queries'
/// outputs.
#pragma once

#include "attention/favor_product_loops.hpp"

namespace scfm {
namespace {

constexpr float kMinusInfinity = -__builtin_inff();

inline float exp2_of(float x) { return reduce_max(exp2_any(broadcast(x))); }

/// The memory of one block; the first two are rows of dim_padded, the last two panels.
struct FavorScratch {
  float* x;
  float* y;
  float* rows;
  float* features;
  float* others;
  float* exponents;  // one a token
  float* factors;    // one a token
};

inline int block_size(int64_t left) { return left < kBlockTokens ? static_cast<int>(left) : kBlockTokens; }

inline int64_t favor_scratch_size(const FavorShape& shape) noexcept {
  return int64_t{kBlockTokens} * (3 * shape.dim_padded + 2 * shape.num_panels * Vec::width + 2);
}

inline FavorScratch divide_scratch(const FavorShape& shape, float* memory) {
  const int64_t rows = int64_t{kBlockTokens} * shape.dim_padded;
  const int64_t panels = int64_t{kPanelStride} * shape.num_panels;
  return {memory,
          memory + rows,
          memory + 2 * rows,
          memory + 3 * rows,
          memory + 3 * rows + panels,
          memory + 3 * rows + 2 * panels,
          memory + 3 * rows + 2 * panels + kBlockTokens};
}

/// Copies a block's rows as float32, with zeros to dim_padded and to whole tiles of tokens.
inline void load_rows(const FavorRows& from, int64_t first, int count, const FavorShape& shape, float* to) {
  const int whole = shape.head_dim / Vec::width * Vec::width;
  const int rest = shape.head_dim - whole;
  for (int t = 0; t < count; ++t, to += shape.dim_padded) {
    const int64_t offset = (first + t) * from.stride;
    if (from.is_bf16) {
      const uint16_t* row = static_cast<const uint16_t*>(from.data) + offset;
      for (int d = 0; d < whole; d += Vec::width) store(to + d, load_bf16(row + d));
      if (rest > 0) store(to + whole, load_bf16_partial(row + whole, rest));
    } else {
      const float* row = static_cast<const float*>(from.data) + offset;
      for (int d = 0; d < whole; d += Vec::width) store(to + d, load(row + d));
      if (rest > 0) store(to + whole, load_partial(row + whole, rest));
    }
  }
  const int64_t padding = int64_t{tokens_in_tiles(count) - count} * shape.dim_padded;
  for (int64_t i = 0; i < padding; i += Vec::width) store(to + i, zero_vec());
}

/// Stores scale * row + other_scale * other as the token's row; without an `other`, scale * row.
inline void store_row(const FavorRows& to, int64_t token, const FavorShape& shape, const float* row,
                      float scale, const float* other, float other_scale) {
  const Vec by = broadcast(scale);
  const Vec other_by = broadcast(other_scale);
  for (int d = 0; d < shape.head_dim; d += Vec::width) {
    Vec result = mul(by, load(row + d));
    if (other != nullptr) result = fmadd(other_by, load(other + d), result);
    const int live = smaller(Vec::width, shape.head_dim - d);
    const int64_t place = token * to.stride + d;
    if (to.is_bf16) {
      uint16_t* at = static_cast<uint16_t*>(to.data) + place;
      live == Vec::width ? store_bf16(at, result) : store_bf16_partial(at, result, live);
    } else {
      float* at = static_cast<float*>(to.data) + place;
      live == Vec::width ? store(at, result) : store_partial(at, result, live);
    }
  }
}

/// n(x) of each token, in base 2.
inline void half_norms(const float* x, int count, const FavorShape& shape, float* norms) {
  for (int t = 0; t < count; ++t, x += shape.dim_padded) {
    Vec sum = zero_vec();
    for (int d = 0; d < shape.dim_padded; d += Vec::width) sum = fmadd(load(x + d), load(x + d), sum);
    norms[t] = shape.norm_scale * reduce_add(sum);
  }
}

/// The largest feature of the block; the padding is -infinity and never counts.
inline float largest_feature(const float* features, int count, int num_panels) {
  Vec most = broadcast(kMinusInfinity);
  for (int p = 0; p < num_panels; ++p) {
    const float* panel = features + p * kPanelStride;
    for (int t = 0; t < count; ++t) most = max(load(panel + t * Vec::width), most);
  }
  return reduce_max(most);
}

/// The first feature of a token that has this value, or -1.
inline int find_feature(const float* token, int num_panels, float value) {
  for (int p = 0; p < num_panels; ++p, token += kPanelStride) {
    if (reduce_max(load(token)) != value) continue;
    for (int f = 0; f < Vec::width; ++f) {
      if (token[f] == value) return p * Vec::width + f;
    }
  }
  return -1;
}

inline void find_largest(const float* features, int64_t first, int count, int num_panels,
                         FavorLargest& largest) {
  const float value = largest_feature(features, count, num_panels);
  if (!(value > largest.value)) return;
  for (int t = 0; t < count; ++t) {
    const int feature = find_feature(features + t * Vec::width, num_panels, value);
    if (feature >= 0) {
      largest = {value, first + t, feature};
      return;
    }
  }
}

/// features = 2^(features - exponents[token]), in place; their sums over the tokens go (are added) to
/// `weighted`, if wanted.
inline void exponentials(float* features, int count, int num_panels, const float* exponents, bool fresh,
                         float* weighted) {
  for (int p = 0; p < num_panels; ++p) {
    float* panel = features + p * kPanelStride;
    Vec sum = zero_vec();
    for (int t = 0; t < count; ++t) {
      const Vec e = exp2_any(sub(load(panel + t * Vec::width), broadcast(exponents[t])));
      store(panel + t * Vec::width, e);
      sum = add(sum, e);
    }
    if (weighted != nullptr) {
      float* place = weighted + p * Vec::width;
      store(place, fresh ? sum : add(load(place), sum));
    }
  }
}

inline void add_rows(const float* x, int count, int row_length, bool fresh, float* sum) {
  for (int d = 0; d < row_length; d += Vec::width) {
    Vec block = zero_vec();
    for (int t = 0; t < count; ++t) block = add(block, load(x + t * row_length + d));
    store(sum + d, fresh ? block : add(load(sum + d), block));
  }
}

inline void scale_floats(float* x, int64_t count, float scale) {
  const Vec by = broadcast(scale);
  for (int64_t i = 0; i < count; i += Vec::width) store(x + i, mul(load(x + i), by));
}

/// The keys' sums relative to a maximum that rises as blocks come by; what was summed is rescaled when it
/// does.
inline FavorLargest favor_key_span(const FavorKeySpan& span) noexcept {
  const FavorShape& shape = span.shape;
  const int64_t num_features = int64_t{shape.num_panels} * Vec::width;
  const FavorScratch scratch = divide_scratch(shape, span.scratch);
  FavorLargest largest = {kMinusInfinity, -1, 0};
  float reference = span.fixed_maximum ? span.maximum : kMinusInfinity;
  for (int64_t first = 0; first < span.count; first += kBlockTokens) {
    const int count = block_size(span.count - first);
    const bool fresh = first == 0;
    load_rows(span.keys, first, count, shape, scratch.x);
    load_rows(span.values, first, count, shape, scratch.y);
    half_norms(scratch.x, count, shape, scratch.exponents);
    features_of(scratch.x, count, shape, span.projection.panels, span.projection.bias, scratch.features);
    if (span.find_largest) find_largest(scratch.features, first, count, shape.num_panels, largest);
    if (!span.fixed_maximum) {
      const float above = largest_feature(scratch.features, count, shape.num_panels);
      if (above > reference) {
        if (!fresh) {
          const float scale = exp2_of(reference - above);
          scale_floats(span.sums.products, num_features * shape.dim_padded, scale);
          scale_floats(span.sums.weighted, num_features, scale);
        }
        reference = above;
      }
    }
    for (int t = 0; t < count; ++t) scratch.exponents[t] += reference;
    exponentials(scratch.features, count, shape.num_panels, scratch.exponents, fresh, span.sums.weighted);
    add_products(scratch.features, scratch.y, count, shape, fresh, span.sums.products);
    add_rows(scratch.y, count, shape.dim_padded, fresh, span.sums.plain);
  }
  *span.sums.total = static_cast<float>(span.count);
  if (!span.fixed_maximum) largest.value = reference;
  return largest;
}

/// sum over spans of scale * sums[i] (of the exponentials), for one vector.
inline Vec merged(const FavorMerge& merge, int64_t i) {
  Vec sum = mul(broadcast(merge.scales[0]), load(merge.first + i));
  for (int s = 1; s < merge.num_spans; ++s) {
    sum = fmadd(broadcast(merge.scales[s]), load(merge.first + s * merge.span_stride + i), sum);
  }
  return sum;
}

inline void favor_merge(const FavorMerge& merge, float* rows, float* norm) noexcept {
  const FavorShape& shape = merge.shape;
  const int num_features = shape.num_panels * Vec::width;
  const int64_t weighted = int64_t{num_features} * shape.dim_padded;
  const int64_t plain = weighted + num_features;
  float total = 0.0f;
  for (int s = 0; s < merge.num_spans; ++s) {
    total += merge.first[s * merge.span_stride + plain + shape.dim_padded];
  }
  for (int d = 0; d < shape.dim_padded; d += Vec::width) {
    Vec of_eps = zero_vec();
    for (int s = 0; s < merge.num_spans; ++s) {
      of_eps = add(of_eps, load(merge.first + s * merge.span_stride + plain + d));
    }
    of_eps = mul(of_eps, broadcast(shape.eps));
    for (int f = 0; f < num_features; ++f) {
      const int64_t i = int64_t{f} * shape.dim_padded + d;
      store(rows + i, f < shape.num_features ? add(merged(merge, i), of_eps) : zero_vec());
    }
  }
  for (int f = 0; f < num_features; f += Vec::width) {
    const Vec sum = add(merged(merge, weighted + f), broadcast(shape.eps * total));
    store(norm + f, first_lanes(smaller(Vec::width, shape.num_features - f), sum, zero_vec()));
  }
}

/// q' of a block in place, and 1 / (q' . norm) of each token in `exponents`, which brings n(q).
inline void query_features(float* features, int count, const FavorShape& shape, const float* norm,
                           float* exponents) {
  const Vec eps = broadcast(shape.eps);
  for (int t = 0; t < count; ++t) {
    float* token = features + t * Vec::width;
    Vec most = broadcast(kMinusInfinity);
    for (int p = 0; p < shape.num_panels; ++p) most = max(load(token + p * kPanelStride), most);
    const Vec exponent = broadcast(exponents[t] + reduce_max(most));
    Vec total = zero_vec();
    for (int p = 0; p < shape.num_panels; ++p) {
      float* place = token + p * kPanelStride;
      const Vec feature = add(exp2_any(sub(load(place), exponent)), eps);
      store(place, feature);
      total = fmadd(feature, load(norm + p * Vec::width), total);
    }
    exponents[t] = 1.0f / reduce_add(total);
  }
}

inline void favor_query_span(const FavorQuerySpan& span) noexcept {
  const FavorShape& shape = span.shape;
  const FavorScratch scratch = divide_scratch(shape, span.scratch);
  for (int64_t first = 0; first < span.count; first += kBlockTokens) {
    const int count = block_size(span.count - first);
    load_rows(span.queries, first, count, shape, scratch.x);
    half_norms(scratch.x, count, shape, scratch.exponents);
    features_of(scratch.x, count, shape, span.projection.panels, span.projection.bias, scratch.features);
    query_features(scratch.features, count, shape, span.norm, scratch.exponents);
    rows_of(scratch.features, count, shape, span.context, scratch.rows);
    for (int t = 0; t < count; ++t) {
      const float* row = scratch.rows + t * shape.dim_padded;
      store_row(span.out, first + t, shape, row, scratch.exponents[t], nullptr, 0.0f);
    }
  }
}

}  // namespace
}  // namespace scfm
