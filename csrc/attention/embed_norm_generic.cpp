/// embed_norm compiled for generic.
#include "attention/simd_generic.hpp"

// The loops below are written against the vocabulary above.
#include "attention/embed_norm_loops.hpp"

namespace scfm {

const EmbedNormKernels embed_norm_generic = kEmbedNorm;

}  // namespace scfm
