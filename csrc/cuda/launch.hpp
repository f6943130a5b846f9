/// Starting a kernel, without the triple angle brackets: so that the same sources also compile for the host,
/// under the headers in tests/cuda/emulation, which is how they are tested where no GPU is.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

namespace scfm::cuda {

/// Blocks of `threads` threads over grid x by grid y, after what `stream` already holds. An empty grid is no
/// launch. Returns what the launch itself returned: what a kernel does wrong shows at the next
/// synchronisation.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), std::int64_t grid_x, std::int64_t grid_y, int threads,
                   cudaStream_t stream, Arguments&&... arguments) {
  if (grid_x == 0 || grid_y == 0) return cudaSuccess;
  constexpr std::int64_t kMostX = 0x7FFFFFFF;
  constexpr std::int64_t kMostY = 65535;
  if (grid_x > kMostX || grid_y > kMostY) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y), 1);
  config.blockDim = dim3(static_cast<unsigned>(threads), 1, 1);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

}  // namespace scfm::cuda
