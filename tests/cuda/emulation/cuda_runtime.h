/// Stands in for CUDA's header of this name when a C++ compiler builds the kernels for the host: as much of
/// the language as csrc/cuda uses, run by fibers (fibers.hpp). Nothing of it is ever shipped.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#include "fibers.hpp"

using std::int32_t;
using std::int64_t;
using std::uint32_t;
using std::uint64_t;

// ---- the language
// -----------------------------------------------------------------------------------------------

#define __global__
#define __host__
#define __device__
#define __shared__ static  // blocks run one after another
#define __launch_bounds__(...)
static const emulation::Index& threadIdx = emulation::running.thread_index;
static const emulation::Index& blockIdx = emulation::running.block_index;
static const emulation::Index& blockDim = emulation::running.block_size;
static const emulation::Index& gridDim = emulation::running.grid_size;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline void __syncthreads() { emulation::wait_for_block(); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) { emulation::wait_for_lanes(mask); }

/// Every lane of the mask puts down its value, then takes what lane `from` of it put down.
template <class Value>
Value emulated_shuffle(unsigned mask, Value value, int from) {
  static_assert(sizeof(Value) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  emulation::lane_slot(emulation::lane()) = bits;
  emulation::wait_for_lanes(mask);
  if ((mask >> from & 1u) == 0) emulation::fail("a shuffle reads from a lane outside its mask");
  bits = emulation::lane_slot(from);
  emulation::wait_for_lanes(mask);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class Value>
Value __shfl_sync(unsigned mask, Value value, int from, int width = 32) {
  const int lane = emulation::lane();
  return emulated_shuffle(mask, value, lane / width * width + (from & (width - 1)));
}
template <class Value>
Value __shfl_xor_sync(unsigned mask, Value value, int offset) {
  return emulated_shuffle(mask, value, emulation::lane() ^ offset);
}
template <class Value>
Value __shfl_up_sync(unsigned mask, Value value, int offset) {
  const int lane = emulation::lane();
  return emulated_shuffle(mask, value, lane >= offset ? lane - offset : lane);
}

inline unsigned __ballot_sync(unsigned mask, bool vote) {
  unsigned votes = 0;
  emulation::lane_slot(emulation::lane()) = vote ? 1 : 0;
  emulation::wait_for_lanes(mask);
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1u) votes |= static_cast<unsigned>(emulation::lane_slot(lane)) << lane;
  }
  emulation::wait_for_lanes(mask);
  return votes;
}
inline int __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }

inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline int __popc(unsigned x) { return std::popcount(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }

/// Vector loads must be aligned: a GPU faults where this processor would not.
template <class Value>
Value __ldg(const Value* from) {
  if (reinterpret_cast<std::uintptr_t>(from) % alignof(Value) != 0) emulation::fail("a load is not aligned");
  return *from;
}

inline unsigned long long atomicMin(unsigned long long* place, unsigned long long x) {
  const unsigned long long old = *place;
  if (x < old) *place = x;
  return old;
}
inline unsigned long long atomicMax(unsigned long long* place, unsigned long long x) {
  const unsigned long long old = *place;
  if (x > old) *place = x;
  return old;
}
inline unsigned long long atomicAdd(unsigned long long* place, unsigned long long x) {
  const unsigned long long old = *place;
  *place = old + x;
  return old;
}

// ---- the runtime
// ------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::function<void()> body = [&] { kernel(arguments...); };
  emulation::run_grid(config->gridDim.x, config->gridDim.y, config->blockDim.x, body);
  return cudaSuccess;
}
