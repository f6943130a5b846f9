/// embed_norm compiled for avx2.
#include "attention/simd_avx2.hpp"

// The loops below are written against the vocabulary above.
#include "attention/embed_norm_loops.hpp"

namespace scfm {

const EmbedNormKernels embed_norm_avx2 = kEmbedNorm;

}  // namespace scfm
