/// The vector vocabulary in plain C++: what the attention loops are written in where nothing better is known
/// of the processor. Every instruction set has a header with these names, and each translation unit includes
/// one of them; all is in an unnamed namespace, so that the linker never mixes two.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace scfm {
namespace {

struct Vec {
  static constexpr int width = 8;
  float lane[8];
};

template <class Each>
inline Vec make_vec(Each each) {
  Vec out;
  for (int i = 0; i < Vec::width; ++i) out.lane[i] = each(i);
  return out;
}

inline float bf16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &wide, sizeof value);
  return value;
}

/// Round to nearest, ties to even; NaN stays NaN.
inline uint16_t float_to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline Vec broadcast(float x) {
  return make_vec([x](int) { return x; });
}
inline Vec zero_vec() { return broadcast(0.0f); }
inline Vec load(const float* p) {
  return make_vec([p](int i) { return p[i]; });
}
/// The first n lanes, 0 <= n <= width; the others are zero and their memory is not touched.
inline Vec load_partial(const float* p, int n) {
  return make_vec([p, n](int i) { return i < n ? p[i] : 0.0f; });
}
inline void store(float* p, Vec x) {
  for (int i = 0; i < Vec::width; ++i) p[i] = x.lane[i];
}
inline void store_partial(float* p, Vec x, int n) {
  for (int i = 0; i < n; ++i) p[i] = x.lane[i];
}
inline Vec load_bf16(const uint16_t* p) {
  return make_vec([p](int i) { return bf16_to_float(p[i]); });
}
inline Vec load_bf16_partial(const uint16_t* p, int n) {
  return make_vec([p, n](int i) { return i < n ? bf16_to_float(p[i]) : 0.0f; });
}
inline void store_bf16(uint16_t* p, Vec x) {
  for (int i = 0; i < Vec::width; ++i) p[i] = float_to_bf16(x.lane[i]);
}
inline void store_bf16_partial(uint16_t* p, Vec x, int n) {
  for (int i = 0; i < n; ++i) p[i] = float_to_bf16(x.lane[i]);
}

inline Vec add(Vec a, Vec b) {
  return make_vec([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline Vec sub(Vec a, Vec b) {
  return make_vec([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline Vec mul(Vec a, Vec b) {
  return make_vec([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline Vec max(Vec a, Vec b) {
  return make_vec([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
/// a * b + c
inline Vec fmadd(Vec a, Vec b, Vec c) {
  return make_vec([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}
/// Lanes below n from a, the rest from b.
inline Vec first_lanes(int n, Vec a, Vec b) {
  return make_vec([&](int i) { return i < n ? a.lane[i] : b.lane[i]; });
}
inline float reduce_add(Vec x) {
  float sum = 0.0f;
  for (int i = 0; i < Vec::width; ++i) sum += x.lane[i];
  return sum;
}
inline float reduce_max(Vec x) {
  float most = x.lane[0];
  for (int i = 1; i < Vec::width; ++i) most = x.lane[i] > most ? x.lane[i] : most;
  return most;
}
/// Lane i = base[index[i] - origin] for the first n lanes; the others are zero.
inline Vec gather(const float* base, const int32_t* index, int32_t origin, int n) {
  return make_vec([=](int i) { return i < n ? base[index[i] - origin] : 0.0f; });
}
/// p[0 .. 3] = the sums of the lanes of a, b, c, d.
inline void store_sums4(float* p, Vec a, Vec b, Vec c, Vec d) {
  p[0] = reduce_add(a);
  p[1] = reduce_add(b);
  p[2] = reduce_add(c);
  p[3] = reduce_add(d);
}
/// 2^x within 2^-22 for x <= 0 down to -126; 0 below and for -infinity.
inline Vec exp2_vec(Vec x) {
  return make_vec([&](int i) { return x.lane[i] < -126.0f ? 0.0f : exp2f(x.lane[i]); });
}

/// 2^x within 2^-22 for every x: 0 below -126, infinity from 128, NaN stays NaN.
inline Vec exp2_any(Vec x) { return exp2_vec(x); }

}  // namespace
}  // namespace scfm
