#include "counts/row_facts.hpp"

#include "cpu/isa.hpp"

namespace scfm {
namespace {

#ifdef SCFM_X86_SIMD
constexpr TablePerIsa<RowFactsKernels> kTables = {&row_facts_generic, &row_facts_avx2, &row_facts_avx512,
                                                  &row_facts_avx512};
#else
constexpr TablePerIsa<RowFactsKernels> kTables = {&row_facts_generic, &row_facts_generic, &row_facts_generic,
                                                  &row_facts_generic};
#endif

}  // namespace

const RowFactsKernels& row_facts_kernels() { return active_table(kTables); }

}  // namespace scfm
