/// Sparse graph attention compiled for generic; bfloat16 rows are widened as they are packed.
#include "attention/simd_generic.hpp"

// The loops below are written against the vocabulary above.
#include "attention/graph_loops.hpp"

namespace scfm {

const GraphKernels graph_generic = GraphTable<FloatRows>::kKernels;

}  // namespace scfm
