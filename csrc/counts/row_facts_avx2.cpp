/// check_csr's sweeps compiled for avx2.
#include "counts/row_facts_loops.hpp"

namespace scfm {

const RowFactsKernels row_facts_avx2 = kRowFacts;

}  // namespace scfm
