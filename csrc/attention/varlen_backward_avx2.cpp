/// Attention inside a cell, backward, for AVX2.
#include "attention/simd_avx2.hpp"

namespace scfm {
namespace {
constexpr int kTileRows = 6;
constexpr int kTileVectors = 2;
constexpr int kPanelVectors = 2;
}  // namespace
}  // namespace scfm

#include "attention/varlen_backward_loops.hpp"

namespace scfm {

const VarlenBackwardKernels varlen_backward_avx2 = {
    &varlen_gradient_scratch_size,
    &differentiate<FloatGradients<float>>,
    &differentiate<FloatGradients<uint16_t>>,
};

}  // namespace scfm
