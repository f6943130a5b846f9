#include "tokenize/rank_dispatch.hpp"

#include "cpu/isa.hpp"

namespace scfm {
namespace {

#ifdef SCFM_X86_SIMD
constexpr TablePerIsa<RankKernels> kTables = {&rank_kernels_generic, &rank_kernels_avx2, &rank_kernels_avx512,
                                              &rank_kernels_avx512};
#else
constexpr TablePerIsa<RankKernels> kTables = {&rank_kernels_generic, &rank_kernels_generic,
                                              &rank_kernels_generic, &rank_kernels_generic};
#endif

}  // namespace

const RankKernels& active_rank_kernels() { return active_table(kTables); }

}  // namespace scfm
