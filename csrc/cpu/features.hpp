/// What this processor and its operating system can run, asked of CPUID and XGETBV once.
///
/// A feature counts only if the operating system saves its registers, else using it would trap.
#pragma once

namespace scfm {

struct CpuFeatures {
  bool avx2 = false;
  bool fma = false;
  bool bmi2 = false;
  bool avx512f = false;
  bool avx512bw = false;
  bool avx512vl = false;
  bool avx512dq = false;
  bool avx512_bf16 = false;
  bool amx_bf16 = false;
};

const CpuFeatures& cpu_features() noexcept;

}  // namespace scfm
