/// check_csr's sweeps compiled for generic.
#include "counts/row_facts_loops.hpp"

namespace scfm {

const RowFactsKernels row_facts_generic = kRowFacts;

}  // namespace scfm
