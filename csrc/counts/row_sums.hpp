/// Sums of the stored values of each cell, in float64: the library size where the file does not give one.
///
/// Summed in eight interleaved parts, then pairwise: the same order for every instruction set. Exact for
/// counts.
#pragma once

#include <span>

#include "base/csr_view.hpp"

namespace scfm {

/// sums has num_rows entries. Looks at indptr and data only; throws InvalidArgument if indptr does not fit
/// data.
void row_sums(const CsrView& csr, std::span<double> sums);

}  // namespace scfm
