/// FAVOR+ attention's loops with AVX-512.
#include "attention/simd_avx512.hpp"

namespace scfm {
namespace {
// Sums of a tile, with one row of the right-hand side and one broadcast, fit in the registers.
constexpr int kTokenTile = 6;
constexpr int kVectorTile = 4;
}  // namespace
}  // namespace scfm

#include "attention/favor_gradient_loops.hpp"

namespace scfm {

const FavorKernels favor_kernels_avx512 = {
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

}  // namespace scfm
