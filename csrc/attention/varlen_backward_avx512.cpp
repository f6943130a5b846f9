/// Attention inside a cell, backward, for AVX-512.
#include "attention/simd_avx512.hpp"

namespace scfm {
namespace {
constexpr int kTileRows = 6;
constexpr int kTileVectors = 4;
constexpr int kPanelVectors = 3;
}  // namespace
}  // namespace scfm

#include "attention/varlen_backward_loops.hpp"

namespace scfm {

const VarlenBackwardKernels varlen_backward_avx512 = {
    &varlen_gradient_scratch_size,
    &differentiate<FloatGradients<float>>,
    &differentiate<FloatGradients<uint16_t>>,
};

}  // namespace scfm
