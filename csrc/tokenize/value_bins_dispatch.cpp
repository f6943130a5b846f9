#include "tokenize/value_bins_dispatch.hpp"

#include "base/errors.hpp"
#include "cpu/isa.hpp"
#include "tokenize/value_bins_edges.hpp"

namespace scfm {
namespace {

#ifdef SCFM_X86_SIMD
constexpr TablePerIsa<ValueBinsKernels> kTables = {&value_bins_generic, &value_bins_avx2, &value_bins_avx512,
                                                   &value_bins_avx512};
#else
constexpr TablePerIsa<ValueBinsKernels> kTables = {&value_bins_generic, &value_bins_generic,
                                                   &value_bins_generic, &value_bins_generic};
#endif

}  // namespace

const ValueBinsKernels& active_value_bins_kernels() { return active_table(kTables); }

void require_quantiles(std::span<const double> quantiles, const std::string& function) {
  if (static_cast<std::int64_t>(quantiles.size()) > kMostEdges) {
    throw InvalidArgument(function + ": quantiles has " + std::to_string(quantiles.size()) +
                          " entries, expected at most " + std::to_string(kMostEdges));
  }
  double last = 0.0;
  for (std::size_t k = 0; k < quantiles.size(); ++k) {
    const double quantile = quantiles[k];
    if (!(quantile >= last && quantile <= 1.0) || (k == 0 && quantile != 0.0)) {
      throw InvalidArgument(function + ": quantiles[" + std::to_string(k) + "] = " +
                            std::to_string(quantile) + ", expected numbers that rise from 0 to at most 1");
    }
    last = quantile;
  }
}

void require_draws(std::span<const double> draws, const std::string& function) {
  for (std::size_t i = 0; i < draws.size(); ++i) {
    if (draws[i] >= 0.0 && draws[i] < 1.0) continue;
    throw InvalidArgument(function + ": draws[" + std::to_string(i) + "] = " + std::to_string(draws[i]) +
                          ", expected a number from 0 and below 1");
  }
}

}  // namespace scfm
