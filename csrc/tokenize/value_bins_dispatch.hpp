/// The value_bins kernels of the instruction set in use, and the checks that its functions share.
#pragma once

#include <span>
#include <string>

#include "tokenize/value_bins_kernels.hpp"

namespace scfm {

const ValueBinsKernels& active_value_bins_kernels();

/// Throws InvalidArgument unless the quantiles rise from 0 to 1 and are no more than kMostEdges.
void require_quantiles(std::span<const double> quantiles, const std::string& function);

/// Throws InvalidArgument unless every draw is from 0 and below 1.
void require_draws(std::span<const double> draws, const std::string& function);

}  // namespace scfm
