/// Which instruction set the kernels use: the best this processor runs, unless SCFM_ISA or set_isa forces
/// another.
///
/// Each family of kernels is a plain struct of function pointers, filled once per instruction set by
/// translation units that include nothing but <cstdint>, <immintrin.h> and plain structs. (An inline std
/// function compiled with AVX-512 could be the copy the linker keeps for everyone, and then trap on an older
/// processor.)
#pragma once

#include <array>
#include <string>
#include <string_view>
#include <vector>

namespace scfm {

enum class Isa : int { generic = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };
inline constexpr int kNumIsas = 4;

std::string_view isa_name(Isa isa) noexcept;

/// The instruction sets that this build contains and this processor runs, plainest first.
std::vector<Isa> available_isas();

/// The one in use. Reads SCFM_ISA at the first call; throws InvalidArgument if that names none that can run.
Isa active_isa();

/// Forces one by name; throws InvalidArgument if it is unknown or cannot run here.
void set_isa(const std::string& name);

/// One table of kernels for each instruction set, in the order of Isa. Where a family has nothing special for
/// a set, its entry repeats the next plainer one.
template <class Table>
using TablePerIsa = std::array<const Table*, kNumIsas>;

template <class Table>
const Table& active_table(const TablePerIsa<Table>& tables) {
  return *tables[static_cast<std::size_t>(active_isa())];
}

}  // namespace scfm
