/// The 32 threads that run together.
#pragma once

namespace scfm::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kWholeWarp = 0xFFFFFFFFu;

}  // namespace scfm::cuda
