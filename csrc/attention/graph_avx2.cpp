/// Sparse graph attention compiled for avx2; bfloat16 rows are widened as they are packed.
#include "attention/simd_avx2.hpp"

// The loops below are written against the vocabulary above.
#include "attention/graph_loops.hpp"

namespace scfm {

const GraphKernels graph_avx2 = GraphTable<FloatRows>::kKernels;

}  // namespace scfm
