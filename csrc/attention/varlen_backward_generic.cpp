/// Attention inside a cell, backward, in plain C++.
#include "attention/simd_generic.hpp"

namespace scfm {
namespace {
constexpr int kTileRows = 2;
constexpr int kTileVectors = 2;
constexpr int kPanelVectors = 2;
}  // namespace
}  // namespace scfm

#include "attention/varlen_backward_loops.hpp"

namespace scfm {

const VarlenBackwardKernels varlen_backward_generic = {
    &varlen_gradient_scratch_size,
    &differentiate<FloatGradients<float>>,
    &differentiate<FloatGradients<uint16_t>>,
};

}  // namespace scfm
