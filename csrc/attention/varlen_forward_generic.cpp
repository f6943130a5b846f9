/// Attention inside a cell, forward, in plain C++.
#include "attention/simd_generic.hpp"

namespace scfm {
namespace {
constexpr int kTileRows = 2;
constexpr int kTileVectors = 2;
constexpr int kFloatBlockKeys = 64;
}  // namespace
}  // namespace scfm

#include "attention/varlen_forward_loops.hpp"

namespace scfm {

const VarlenForwardKernels varlen_forward_generic = {
    &varlen_scratch_size,
    &attend_span<FloatLayout<float>>,
    &attend_span<FloatLayout<uint16_t>>,
};

}  // namespace scfm
