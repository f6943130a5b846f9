/// Sorting by one block of threads, in shared or global memory, of any number of pairs.
///
/// A bitonic network in the form whose comparators all point the same way: runs are merged by comparing the
/// first with the mirrored second, then halves of halves. Places past the end would hold what sorts last and
/// never move, so they need not exist: any length sorts in place, without padding. Pairs of a key and an id,
/// all ids different, have one order only, so the network's instability does not show.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace scfm::cuda {

/// By key descending, then by id ascending.
template <class Id>
__device__ void put_in_order(std::uint64_t* keys, Id* ids, std::uint32_t low, std::uint32_t high) {
  const std::uint64_t low_key = keys[low];
  const std::uint64_t high_key = keys[high];
  if (low_key > high_key) return;
  const Id low_id = ids[low];
  const Id high_id = ids[high];
  if (low_key == high_key && low_id < high_id) return;
  keys[low] = high_key;
  keys[high] = low_key;
  ids[low] = high_id;
  ids[high] = low_id;
}

/// Between steps of these strides. A warp compares 32 pairs in a row; where partners lie no more than 32
/// apart those are 64 places of its own, and no other warp has to be waited for.
__device__ inline void wait_for_step(std::uint32_t stride, std::uint32_t next) {
  if (stride > 32 || next > 32) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

/// Sorts `count` pairs, at most 2^31 - 1; all threads of the block call it, and may use the result when it
/// returns. The block has a whole number of warps.
template <class Id>
__device__ void sort_in_block(std::uint64_t* keys, Id* ids, std::uint32_t count) {
  std::uint32_t size = 1;
  while (size < count) size *= 2;
  __syncthreads();
  for (std::uint32_t run = 1; run < size; run *= 2) {
    for (std::uint32_t pair = threadIdx.x; pair < size / 2; pair += blockDim.x) {
      const std::uint32_t within = pair & (run - 1);
      const std::uint32_t first = (pair - within) * 2;
      const std::uint32_t mirrored = first + 2 * run - 1 - within;
      if (mirrored < count) put_in_order(keys, ids, first + within, mirrored);
    }
    wait_for_step(run, run / 2);
    for (std::uint32_t stride = run / 2; stride > 0; stride /= 2) {
      for (std::uint32_t pair = threadIdx.x; pair < size / 2; pair += blockDim.x) {
        const std::uint32_t low = (pair - (pair & (stride - 1))) * 2 + (pair & (stride - 1));
        if (low + stride < count) put_in_order(keys, ids, low, low + stride);
      }
      wait_for_step(stride, stride > 1 ? stride / 2 : 2 * run);
    }
  }
  __syncthreads();
}

}  // namespace scfm::cuda
