/// The rank kernels of the instruction set in use.
#pragma once

#include "tokenize/rank_kernels.hpp"

namespace scfm {

const RankKernels& active_rank_kernels();

}  // namespace scfm
