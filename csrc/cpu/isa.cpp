#include "cpu/isa.hpp"

#include <atomic>
#include <cstdlib>

#include "base/errors.hpp"
#include "cpu/features.hpp"

namespace scfm {
namespace {

constexpr std::array<std::string_view, kNumIsas> kNames = {"generic", "avx2", "avx512", "avx512_bf16"};
constexpr int kUnset = -1;
std::atomic<int> chosen{kUnset};

bool can_run(Isa isa) noexcept {
#ifdef SCFM_X86_SIMD
  const CpuFeatures& cpu = cpu_features();
  const bool avx2 = cpu.avx2 && cpu.fma && cpu.bmi2;
  const bool avx512 = avx2 && cpu.avx512f && cpu.avx512bw && cpu.avx512vl && cpu.avx512dq;
  switch (isa) {
    case Isa::generic:
      return true;
    case Isa::avx2:
      return avx2;
    case Isa::avx512:
      return avx512;
    case Isa::avx512_bf16:
      return avx512 && cpu.avx512_bf16;
  }
#endif
  return isa == Isa::generic;
}

std::string list_of_names() {
  std::string names;
  for (const Isa isa : available_isas()) {
    if (!names.empty()) names += ", ";
    names += isa_name(isa);
  }
  return names;
}

Isa from_name(const std::string& name, const std::string& where) {
  for (const Isa isa : available_isas()) {
    if (isa_name(isa) == name) return isa;
  }
  throw InvalidArgument(where + " = \"" + name +
                        "\" is not an instruction set this computer can run; expected one of " +
                        list_of_names());
}

}  // namespace

std::string_view isa_name(Isa isa) noexcept { return kNames[static_cast<std::size_t>(isa)]; }

std::vector<Isa> available_isas() {
  std::vector<Isa> found;
  for (int i = 0; i < kNumIsas; ++i) {
    if (can_run(static_cast<Isa>(i))) found.push_back(static_cast<Isa>(i));
  }
  return found;
}

Isa active_isa() {
  const int known = chosen.load(std::memory_order_relaxed);
  if (known != kUnset) return static_cast<Isa>(known);
  const char* forced = std::getenv("SCFM_ISA");
  const Isa isa =
      forced != nullptr && *forced != '\0' ? from_name(forced, "SCFM_ISA") : available_isas().back();
  // Two threads may race here; both find the same answer, and a set_isa in between wins.
  int expected = kUnset;
  chosen.compare_exchange_strong(expected, static_cast<int>(isa), std::memory_order_relaxed);
  return expected == kUnset ? isa : static_cast<Isa>(expected);
}

void set_isa(const std::string& name) {
  chosen.store(static_cast<int>(from_name(name, "set_isa: name")), std::memory_order_relaxed);
}

}  // namespace scfm
