/// Gradients of FAVOR+ attention over one span of a head's tokens, from recomputed feature maps.
///
/// With g the gradient of out, u = g context^T and norm_i = q'_i . norm, the output itself is not needed:
///     d(q' context)_i = g_i / norm_i,   d(q' norm)_i = -(g_i . out_i) / norm_i = -(q'_i . u_i) / norm_i^2
#pragma once

#include "attention/favor_loops.hpp"

namespace scfm {
namespace {

inline void favor_lay_out_context(const FavorShape& shape, const float* rows, const float* norm,
                                  const FavorContext& context) noexcept {
  for (int p = 0; p < shape.num_panels; ++p) {
    const float* from = rows + int64_t{p} * Vec::width * shape.dim_padded;
    float* to = context.panels + int64_t{p} * Vec::width * shape.head_dim;
    for (int d = 0; d < shape.head_dim; ++d) {
      for (int f = 0; f < Vec::width; ++f) to[d * Vec::width + f] = from[f * shape.dim_padded + d];
    }
    store(context.norm + p * Vec::width, load(norm + p * Vec::width));
  }
  add_rows(rows, shape.num_panels * Vec::width, shape.dim_padded, true, context.over_features);
}

struct QueryGradient {
  float inverse_norm;  // 1 / (q' . norm)
  float d_norm;        // d(q' norm)
};

/// One token of a block: `token` is a_q and becomes e = q' - eps; `others` is u = g context^T and becomes the
/// gradient of a_q, the maximum's share included. On return `exponent` (which brings n(q)) is the gradient of
/// n(q).
inline QueryGradient query_token_gradient(float* token, float* others, const FavorShape& shape,
                                          const float* norm, float& exponent) {
  Vec most = broadcast(kMinusInfinity);
  for (int p = 0; p < shape.num_panels; ++p) most = max(load(token + p * kPanelStride), most);
  const float top = reduce_max(most);
  const int top_feature = find_feature(token, shape.num_panels, top);
  const Vec lowered = broadcast(exponent + top);
  const Vec eps = broadcast(shape.eps);
  Vec total = zero_vec();
  Vec mixed = zero_vec();
  for (int p = 0; p < shape.num_panels; ++p) {
    const Vec e = exp2_any(sub(load(token + p * kPanelStride), lowered));
    store(token + p * kPanelStride, e);
    const Vec feature = add(e, eps);
    total = fmadd(feature, load(norm + p * Vec::width), total);
    mixed = fmadd(feature, load(others + p * kPanelStride), mixed);
  }
  const float inverse = 1.0f / reduce_add(total);
  const float d_norm = -(reduce_add(mixed) * inverse) * inverse;
  const Vec by = broadcast(inverse);
  const Vec norm_by = broadcast(d_norm);
  Vec sum = zero_vec();
  for (int p = 0; p < shape.num_panels; ++p) {
    float* place = others + p * kPanelStride;
    const Vec d_feature = fmadd(norm_by, load(norm + p * Vec::width), mul(load(place), by));
    const Vec d_a = mul(load(token + p * kPanelStride), d_feature);
    store(place, d_a);
    sum = add(sum, d_a);
  }
  exponent = -reduce_add(sum);
  if (top_feature >= 0)
    others[top_feature / Vec::width * kPanelStride + top_feature % Vec::width] += exponent;
  return {inverse, d_norm};
}

/// weighted (+)= sum over tokens of factor * features.
inline void add_weighted(const float* features, int count, int num_panels, const float* factors, bool fresh,
                         float* weighted) {
  for (int p = 0; p < num_panels; ++p) {
    const float* panel = features + p * kPanelStride;
    Vec sum = zero_vec();
    for (int t = 0; t < count; ++t) sum = fmadd(broadcast(factors[t]), load(panel + t * Vec::width), sum);
    float* place = weighted + p * Vec::width;
    store(place, fresh ? sum : add(load(place), sum));
  }
}

inline void favor_query_gradient_span(const FavorQueryGradientSpan& span) noexcept {
  const FavorShape& shape = span.shape;
  const FavorScratch scratch = divide_scratch(shape, span.scratch);
  float total = 0.0f;
  for (int64_t first = 0; first < span.count; first += kBlockTokens) {
    const int count = block_size(span.count - first);
    const bool fresh = first == 0;
    load_rows(span.queries, first, count, shape, scratch.x);
    load_rows(span.grad_out, first, count, shape, scratch.y);
    half_norms(scratch.x, count, shape, scratch.exponents);
    features_of(scratch.x, count, shape, span.projection.panels, span.projection.bias, scratch.features);
    features_of(scratch.y, count, shape, span.context.panels, nullptr, scratch.others);
    for (int t = 0; t < count; ++t) {
      const QueryGradient of =
          query_token_gradient(scratch.features + t * Vec::width, scratch.others + t * Vec::width, shape,
                               span.context.norm, scratch.exponents[t]);
      scale_floats(scratch.y + t * shape.dim_padded, shape.dim_padded, of.inverse_norm);
      scratch.factors[t] = of.d_norm;
      total += of.d_norm;
    }
    add_products(scratch.features, scratch.y, count, shape, fresh, span.sums.products);
    add_weighted(scratch.features, count, shape.num_panels, scratch.factors, fresh, span.sums.weighted);
    add_rows(scratch.y, count, shape.dim_padded, fresh, span.sums.plain);
    rows_of(scratch.others, count, shape, span.projection.rows, scratch.rows);
    for (int t = 0; t < count; ++t) {
      store_row(span.dq, first + t, shape, scratch.rows + t * shape.dim_padded, 1.0f,
                scratch.x + t * shape.dim_padded, shape.square_scale * scratch.exponents[t]);
    }
  }
  *span.sums.total = total;
}

/// `others` *= features, and minus the sum of each token's in `sums`.
inline void key_feature_gradients(const float* features, float* others, int count, int num_panels,
                                  float* sums) {
  for (int t = 0; t < count; ++t) {
    Vec sum = zero_vec();
    for (int p = 0; p < num_panels; ++p) {
      const int64_t place = int64_t{p} * kPanelStride + t * Vec::width;
      const Vec d_a = mul(load(others + place), load(features + place));
      store(others + place, d_a);
      sum = add(sum, d_a);
    }
    sums[t] = -reduce_add(sum);
  }
}

inline double favor_key_gradient_span(const FavorKeyGradientSpan& span) noexcept {
  const FavorShape& shape = span.shape;
  const FavorScratch scratch = divide_scratch(shape, span.scratch);
  const FavorContext& context = span.grad_context;
  double d_maximum = 0.0;
  for (int64_t first = 0; first < span.count; first += kBlockTokens) {
    const int count = block_size(span.count - first);
    load_rows(span.keys, first, count, shape, scratch.x);
    load_rows(span.values, first, count, shape, scratch.y);
    half_norms(scratch.x, count, shape, scratch.exponents);
    for (int t = 0; t < count; ++t) scratch.exponents[t] += span.maximum;
    features_of(scratch.x, count, shape, span.projection.panels, span.projection.bias, scratch.features);
    exponentials(scratch.features, count, shape.num_panels, scratch.exponents, true, nullptr);
    features_of(scratch.y, count, shape, context.panels, context.norm, scratch.others);
    rows_of(scratch.features, count, shape, span.grad_context_rows, scratch.rows);
    for (int t = 0; t < count; ++t) {
      store_row(span.dv, first + t, shape, scratch.rows + t * shape.dim_padded, 1.0f, context.over_features,
                shape.eps);
    }
    key_feature_gradients(scratch.features, scratch.others, count, shape.num_panels, scratch.exponents);
    rows_of(scratch.others, count, shape, span.projection.rows, scratch.rows);
    for (int t = 0; t < count; ++t) {
      const float* row = scratch.rows + t * shape.dim_padded;
      const float* key = scratch.x + t * shape.dim_padded;
      const float d_norm = scratch.exponents[t];
      store_row(span.dk, first + t, shape, row, 1.0f, key, shape.square_scale * d_norm);
      if (first + t == span.kept_token) {
        store_row({span.kept, 0, false}, 0, shape, row, 1.0f, key, shape.square_scale * d_norm);
      }
      d_maximum += d_norm;
    }
  }
  return d_maximum;
}

inline void favor_store_row(const FavorRows& to, const FavorShape& shape, const float* row,
                            const float* other, float scale) noexcept {
  store_row(to, 0, shape, row, 1.0f, other, scale);
}

}  // namespace
}  // namespace scfm
