/// FAVOR+ attention's loops with AVX-512, and the table for processors that multiply bfloat16 pairs.
#include "attention/simd_avx512.hpp"

namespace scfm {
namespace {
// Sums of a tile, with one row of the right-hand side and one broadcast, fit in the registers.
constexpr int kTokenTile = 6;
constexpr int kVectorTile = 4;
}  // namespace
}  // namespace scfm

#include "attention/favor_gradient_loops.hpp"
#include "attention/favor_pair_spans.hpp"

namespace scfm {
namespace {

constexpr FavorKernels kFloatKernels = {
    Vec::width,
    kBlockTokens,
    &favor_scratch_size,
    &favor_key_span,
    &favor_merge,
    &favor_lay_out_context,
    &favor_query_span,
    &favor_query_gradient_span,
    &favor_key_gradient_span,
    &favor_store_row,
};

int64_t scratch_size(const FavorShape& shape) noexcept {
  const int64_t of_floats = favor_scratch_size(shape), of_pairs = favor_pair_scratch_size(shape);
  return of_floats > of_pairs ? of_floats : of_pairs;
}

FavorLargest key_span(const FavorKeySpan& span) noexcept {
  const bool in_pairs = span.keys.is_bf16 && span.may_round;
  return in_pairs ? favor_pair_key_span(span) : favor_key_span(span);
}

void query_span(const FavorQuerySpan& span) noexcept {
  span.queries.is_bf16 ? favor_pair_query_span(span) : favor_query_span(span);
}

constexpr FavorKernels with_pairs() {
  FavorKernels kernels = kFloatKernels;
  kernels.scratch_size = &scratch_size;
  kernels.key_span = &key_span;
  kernels.query_span = &query_span;
  return kernels;
}

}  // namespace

const FavorKernels favor_kernels_avx512 = kFloatKernels;
const FavorKernels favor_kernels_avx512_bf16 = with_pairs();

}  // namespace scfm
