/// The forward's spans of bfloat16 tensors in products of bfloat16 pairs (AVX512-BF16), in place of the loops
/// of favor_loops.hpp, which widen them. The projection, the feature maps and the context are rounded to
/// bfloat16 where they enter a product; exponents, sums and norms stay in float32.
#pragma once

#include <cstdint>

#include "attention/favor_kernels.hpp"

namespace scfm {

/// Floats of scratch memory that the functions below need.
std::int64_t favor_pair_scratch_size(const FavorShape& shape) noexcept;

/// As FavorKernels::key_span, of bfloat16 rows; where the largest a_k is, it does not look for.
FavorLargest favor_pair_key_span(const FavorKeySpan& span) noexcept;

/// As FavorKernels::query_span, of bfloat16 rows.
void favor_pair_query_span(const FavorQuerySpan& span) noexcept;

}  // namespace scfm
