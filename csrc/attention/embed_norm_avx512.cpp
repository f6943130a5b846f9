/// embed_norm compiled for avx512.
#include "attention/simd_avx512.hpp"

// The loops below are written against the vocabulary above.
#include "attention/embed_norm_loops.hpp"

namespace scfm {

const EmbedNormKernels embed_norm_avx512 = kEmbedNorm;

}  // namespace scfm
