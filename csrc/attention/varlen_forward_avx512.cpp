/// Attention inside a cell, forward, for AVX-512.
#include "attention/simd_avx512.hpp"

namespace scfm {
namespace {
constexpr int kTileRows = 6;
constexpr int kTileVectors = 4;
constexpr int kFloatBlockKeys = 64;
}  // namespace
}  // namespace scfm

#include "attention/varlen_forward_loops.hpp"

namespace scfm {

const VarlenForwardKernels varlen_forward_avx512 = {
    &varlen_scratch_size,
    &attend_span<FloatLayout<float>>,
    &attend_span<FloatLayout<uint16_t>>,
};

}  // namespace scfm
