#include "cpu/features.hpp"

#ifdef SCFM_X86_SIMD
#include <cpuid.h>

#include <cstdint>
#endif

namespace scfm {
namespace {

#ifdef SCFM_X86_SIMD

std::uint64_t enabled_register_state() noexcept {
  std::uint32_t low = 0;
  std::uint32_t high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
}

constexpr bool bit(unsigned word, int position) noexcept { return ((word >> position) & 1u) != 0; }

CpuFeatures detect() noexcept {
  CpuFeatures found;
  unsigned eax = 0;
  unsigned ebx = 0;
  unsigned ecx = 0;
  unsigned edx = 0;
  if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0 || !bit(ecx, 27)) return found;  // no OSXSAVE, no AVX state
  const unsigned leaf1_ecx = ecx;
  const std::uint64_t state = enabled_register_state();
  const bool ymm_saved = (state & 0x6u) == 0x6u;            // xmm, ymm
  const bool zmm_saved = (state & 0xE6u) == 0xE6u;          // and opmask, both halves of zmm
  const bool tiles_saved = (state & 0x60000u) == 0x60000u;  // AMX configuration and tile data
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return found;
  const unsigned num_subleaves = eax;
  found.fma = ymm_saved && bit(leaf1_ecx, 12);
  found.avx2 = ymm_saved && bit(ebx, 5);
  found.bmi2 = bit(ebx, 8);
  found.avx512f = zmm_saved && bit(ebx, 16);
  found.avx512dq = found.avx512f && bit(ebx, 17);
  found.avx512bw = found.avx512f && bit(ebx, 30);
  found.avx512vl = found.avx512f && bit(ebx, 31);
  found.amx_bf16 = tiles_saved && bit(edx, 22);
  if (num_subleaves >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0) {
    found.avx512_bf16 = found.avx512f && bit(eax, 5);
  }
  return found;
}

#else

CpuFeatures detect() noexcept { return {}; }

#endif

}  // namespace

const CpuFeatures& cpu_features() noexcept {
  static const CpuFeatures features = detect();
  return features;
}

}  // namespace scfm
