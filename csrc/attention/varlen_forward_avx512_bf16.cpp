/// Attention inside a cell, forward, for AVX-512 with products of bfloat16 pairs: of bfloat16 tensors both
/// products are in pairs, and the weights are rounded to bfloat16 for the second.
#include "attention/simd_avx512.hpp"

namespace scfm {
namespace {
constexpr int kTileRows = 6;
constexpr int kTileVectors = 4;
constexpr int kFloatBlockKeys = 64;
}  // namespace
}  // namespace scfm

#include "attention/pair_products.hpp"
#include "attention/varlen_forward_loops.hpp"

namespace scfm {
namespace {

struct PairLayout {
  using Stored = uint16_t;
  using Product = Pairs;
  static constexpr int kBlockKeys = 128;

  static int64_t depth(int head_dim) { return pairs_for(head_dim); }
  static int64_t query_size(int, int padded) { return padded / 2; }
  static int64_t values_row(int padded) { return padded; }

  static void pack_queries(const Stored* x, int64_t stride, int64_t count, int64_t rows, int head_dim,
                           int padded, uint32_t* out) {
    pack_pair_rows(x, stride, count, rows, head_dim, padded, out);
  }
  static void pack_keys(const Stored* x, int64_t stride, int64_t count, int head_dim, uint32_t* out) {
    pack_pair_panels<kTileColumns>(x, stride, count, head_dim, out);
  }
  static void pack_values(const Stored* x, int64_t stride, int64_t count, int head_dim, int padded,
                          uint32_t* out) {
    pack_row_pairs(x, stride, count, head_dim, padded, out);
  }
  static void store_weights(uint32_t* out, Vec low, Vec high) { store_rounded_pairs(out, low, high); }
  static Vec exponential(Vec x) { return exp2_coarse(x); }
};

}  // namespace

const VarlenForwardKernels varlen_forward_avx512_bf16 = {
    &varlen_scratch_size,
    &attend_span<FloatLayout<float>>,
    &attend_span<PairLayout>,
};

}  // namespace scfm
