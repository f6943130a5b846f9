/// Sixteen bytes at once between memory and registers: four float, or eight float16 or bfloat16 numbers.
/// Arithmetic is always in float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace scfm::cuda {

template <class Element>
struct Stored;

template <>
struct Stored<float> {
  static constexpr int kPerVector = 4;

  static __device__ void load(const float* from, float* to) {
    const float4 x = __ldg(reinterpret_cast<const float4*>(from));
    to[0] = x.x;
    to[1] = x.y;
    to[2] = x.z;
    to[3] = x.w;
  }
  static __device__ void store(float* to, const float* from) {
    *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
  }
  static __device__ float narrow(float x) { return x; }
};

/// Two numbers of 16 bits in a word.
struct HalfPairs {
  static __device__ float2 widen(std::uint32_t word) {
    __half2 pair;
    memcpy(&pair, &word, sizeof pair);
    return __half22float2(pair);
  }
  static __device__ std::uint32_t narrow(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    std::uint32_t word;
    memcpy(&word, &pair, sizeof word);
    return word;
  }
};

struct BfloatPairs {
  static __device__ float2 widen(std::uint32_t word) {
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000u));
  }
  static __device__ std::uint32_t narrow(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    std::uint32_t word;
    memcpy(&word, &pair, sizeof word);
    return word;
  }
};

template <class Element, class Pairs>
struct StoredPairs {
  static constexpr int kPerVector = 8;

  static __device__ void load(const Element* from, float* to) {
    const uint4 words = __ldg(reinterpret_cast<const uint4*>(from));
    const std::uint32_t each[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = Pairs::widen(each[i]);
      to[2 * i] = pair.x;
      to[2 * i + 1] = pair.y;
    }
  }
  static __device__ void store(Element* to, const float* from) {
    *reinterpret_cast<uint4*>(to) =
        make_uint4(Pairs::narrow(from[0], from[1]), Pairs::narrow(from[2], from[3]),
                   Pairs::narrow(from[4], from[5]), Pairs::narrow(from[6], from[7]));
  }
};

template <>
struct Stored<__half> : StoredPairs<__half, HalfPairs> {
  static __device__ __half narrow(float x) { return __float2half_rn(x); }
};

template <>
struct Stored<__nv_bfloat16> : StoredPairs<__nv_bfloat16, BfloatPairs> {
  static __device__ __nv_bfloat16 narrow(float x) { return __float2bfloat16_rn(x); }
};

}  // namespace scfm::cuda
