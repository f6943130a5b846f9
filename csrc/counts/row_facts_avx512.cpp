/// check_csr's sweeps compiled for avx512.
#include "counts/row_facts_loops.hpp"

namespace scfm {

const RowFactsKernels row_facts_avx512 = kRowFacts;

}  // namespace scfm
