/// The inner loops of FAVOR+ attention, one table per instruction set.
///
///     a_q = (c q) W^T,  a_k = (c k) W^T,  c = D^(-1/4);   n(x) = |c x|^2 / 2
///     q' = exp(a_q - n(q) - max_f a_q) + eps;   k' = exp(a_k - n(k) - M) + eps
///     out_i = (q'_i . context) / (q'_i . norm);   context = sum_j k'_j v_j^T,  norm = sum_j k'_j
///
/// Feature maps exist for one block of tokens at a time, in scratch memory. The eps of every map is left out
/// of the sums (`FavorSums`) and added when they are merged, where it is one outer product: so a sum taken
/// relative to one maximum can be rescaled to another.
///
/// Exponents are kept in base 2 (W and n carry the factor log2 e): what the exponential gets is then exact to
/// the last place of the product however far below zero it is.
///
/// Layouts. Rows of `dim_padded` floats: tokens, and the contexts by feature. Panels of `width` features: W
/// as [panel][dimension][width], features of a block as [panel][token][width].
#pragma once

#include <cstdint>

namespace scfm {

struct FavorShape {
  int head_dim;
  int dim_padded;  // to a multiple of the vector width
  int num_features;
  int num_panels;  // of width features; the last may be partly padding
  float eps;
  float norm_scale;    // n(x) in base 2 = norm_scale |x|^2
  float square_scale;  // c^2: the gradient of n(x) is c^2 x
};

/// Rows of one head, read or written; bfloat16 is widened, and rounded to nearest.
struct FavorRows {
  void* data;           // of the first row
  std::int64_t stride;  // elements
  bool is_bf16;
};

/// What is constant in a call.
struct FavorProjection {
  const float* panels;  // log2(e) c W
  const float* bias;    // per feature: 0, and -infinity where it is padding, whose exponential is then 0
  const float* rows;    // c W, a row of dim_padded floats a feature: the way back to the tokens
};

/// Sums over tokens of exponentials e (L, F) with vectors x (L, D) and numbers s (L): of the keys x = v and s
/// = 1, of the queries' gradients x = d(q' context) and s = d(q' norm).
struct FavorSums {
  float* products;  // e^T x: a row a feature
  float* weighted;  // e^T s, (features)
  float* plain;     // the sum of x, (dim_padded)
  float* total;     // the sum of s, one number
};

/// A merged context in the layout that gradients need.
struct FavorContext {
  float* panels;         // [panel][dimension][width]
  float* norm;           // (features), 0 in the padding
  float* over_features;  // the sum of the context's rows, (dim_padded)
};

struct FavorKeySpan {
  FavorShape shape;
  FavorProjection projection;
  FavorRows keys;
  FavorRows values;
  std::int64_t count;
  bool fixed_maximum;  // else sums are relative to the largest a_k of the span
  bool find_largest;   // where the largest a_k is
  bool may_round;      // features and values to bfloat16, if that is what is stored; else all is float32
  float maximum;       // in base 2; read if fixed
  FavorSums sums;
  float* scratch;
};

struct FavorLargest {
  float value;         // largest a_k in base 2, -infinity if there is none
  std::int64_t token;  // the first that has it (and its first feature), or -1: not looked for, or NaN
  int feature;
};

struct FavorMerge {
  FavorShape shape;
  const float* first;  // a span's sums: products, weighted, plain, total, one after the other
  std::int64_t span_stride;
  const float* scales;  // by which each span's exponentials are multiplied
  int num_spans;
};

struct FavorQuerySpan {
  FavorShape shape;
  FavorProjection projection;
  FavorRows queries;
  FavorRows out;
  std::int64_t count;
  const float* context;  // a row a feature, 0 in the padding
  const float* norm;
  float* scratch;
};

struct FavorQueryGradientSpan {
  FavorShape shape;
  FavorProjection projection;
  FavorRows queries;
  FavorRows grad_out;
  FavorRows dq;
  std::int64_t count;
  FavorContext context;
  FavorSums sums;
  float* scratch;
};

struct FavorKeyGradientSpan {
  FavorShape shape;
  FavorProjection projection;
  FavorRows keys;
  FavorRows values;
  FavorRows dk;
  FavorRows dv;
  std::int64_t count;
  float maximum;  // M in base 2
  FavorContext grad_context;
  const float* grad_context_rows;
  std::int64_t kept_token;  // whose row of dk is also written, unrounded, to kept; -1 for none
  float* kept;              // (dim_padded)
  float* scratch;
};

struct FavorKernels {
  int width;           // floats of a vector
  int tokens_at_once;  // tokens of a block
  /// Floats of scratch memory that the functions below need.
  std::int64_t (*scratch_size)(const FavorShape& shape) noexcept;
  /// Overwrites span.sums.
  FavorLargest (*key_span)(const FavorKeySpan& span) noexcept;
  /// Adds the spans' sums, with the eps of the feature maps: rows and norm may be those of the first span.
  void (*merge)(const FavorMerge& merge, float* rows, float* norm) noexcept;
  void (*lay_out_context)(const FavorShape& shape, const float* rows, const float* norm,
                          const FavorContext& context) noexcept;
  void (*query_span)(const FavorQuerySpan& span) noexcept;
  /// Overwrites span.sums.
  void (*query_gradient_span)(const FavorQueryGradientSpan& span) noexcept;
  /// The sum of the gradients of a_k, negative: the span's part of the gradient of M.
  double (*key_gradient_span)(const FavorKeyGradientSpan& span) noexcept;
  /// to = row + scale * other.
  void (*store_row)(const FavorRows& to, const FavorShape& shape, const float* row, const float* other,
                    float scale) noexcept;
};

extern const FavorKernels favor_kernels_generic;
extern const FavorKernels favor_kernels_avx2;
extern const FavorKernels favor_kernels_avx512;
extern const FavorKernels favor_kernels_avx512_bf16;  // the forward of bfloat16 rows in products of pairs

}  // namespace scfm
