/// Attention inside a cell, backward, for AVX-512 with products of bfloat16 pairs: of bfloat16 tensors all
/// five products are in pairs; probabilities and their gradients are rounded to bfloat16 for the three that
/// read them.
#include "attention/simd_avx512.hpp"

namespace scfm {
namespace {
constexpr int kTileRows = 6;
constexpr int kTileVectors = 4;
constexpr int kPanelVectors = 3;
}  // namespace
}  // namespace scfm

#include "attention/pair_products.hpp"
#include "attention/varlen_backward_loops.hpp"

namespace scfm {
namespace {

struct PairGradients {
  using Stored = uint16_t;
  using Product = Pairs;
  static int64_t depth(int head_dim) { return pairs_for(head_dim); }
  static int64_t row_size(int padded) { return padded / 2; }

  static void pack_left(const Stored* x, int64_t stride, int64_t count, int64_t rows, int head_dim,
                        int padded, uint32_t* out) {
    pack_pair_rows(x, stride, count, rows, head_dim, padded, out);
  }
  static const uint32_t* right_of(const uint32_t*, uint32_t* right) { return right; }
  static void pack_right(const Stored* x, int64_t stride, int64_t count, int64_t rows, int head_dim,
                         int padded, uint32_t* out) {
    pack_row_pairs(x, stride, count, head_dim, padded, out);
    const int64_t filled = (count + 1) / 2;
    memset(out + filled * padded, 0, sizeof(uint32_t) * static_cast<size_t>((rows / 2 - filled) * padded));
  }
  static void pack_keys(const Stored* x, int64_t stride, int64_t count, int head_dim, int padded,
                        uint32_t* panels, uint32_t* rows) {
    pack_pair_panels<kPanelColumns>(x, stride, count, head_dim, panels);
    if (rows != nullptr) pack_row_pairs(x, stride, count, head_dim, padded, rows);
  }
  static Vec exponential(Vec x) { return exp2_coarse(x); }

  struct Block {
    alignas(64) float p[kTileRows * kBlockKeys];
    alignas(64) float ds[kTileRows * kBlockKeys];
    alignas(64) uint32_t p_by_step[kBlockRows / 2 * kBlockKeys];
    alignas(64) uint32_t ds_by_step[kBlockRows / 2 * kBlockKeys];
    alignas(64) uint32_t ds_by_row[kBlockRows * kBlockKeys / 2];
    float* tile_p(int) { return p; }
    float* tile_ds(int) { return ds; }
    /// Rounds a tile into the two orders.
    void settle(int row) {
      for (int r = 0; r < kTileRows; r += 2) {
        const int step = (row + r) / 2 * kBlockKeys;
        for (int c = 0; c < kBlockKeys; c += kWidth) {
          store_lane_pairs(p_by_step + step + c, load(p + r * kBlockKeys + c),
                           load(p + (r + 1) * kBlockKeys + c));
          store_lane_pairs(ds_by_step + step + c, load(ds + r * kBlockKeys + c),
                           load(ds + (r + 1) * kBlockKeys + c));
        }
      }
      for (int i = 0; i < kTileRows * kBlockKeys; i += 2 * kWidth) {
        store_rounded_pairs(ds_by_row + row * (kBlockKeys / 2) + i / 2, load(ds + i), load(ds + i + kWidth));
      }
    }
    BlockWeights<uint32_t> weights() const { return {p_by_step, ds_by_step, ds_by_row}; }
  };
};

}  // namespace

const VarlenBackwardKernels varlen_backward_avx512_bf16 = {
    &varlen_gradient_scratch_size,
    &differentiate<FloatGradients<float>>,
    &differentiate<PairGradients>,
};

}  // namespace scfm
