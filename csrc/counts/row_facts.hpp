/// Kernels of check_csr: what holds for a run of entries, found in one vectorised sweep without branches.
///
/// They only say whether something is wrong; the (rare) caller that learns of a fault looks for its place
/// afterwards.
#pragma once

#include <cstdint>

namespace scfm {

struct ColumnFacts {
  bool out_of_range;  // some column < 0 or >= num_genes
  bool falls;         // some column is less than the one before
  bool repeats;       // some column equals the one before
};

struct ValueFacts {
  bool suspect;  // some value is negative, infinite or not a number (or -0.0: look closer); the rest is then
                 // unset
  std::int64_t num_zeros;
  std::int64_t num_nonintegers;
  double max_value;  // 0 for an empty run
};

/// One entry per DataType and ColumnType, in the order of those enums.
struct RowFactsKernels {
  ValueFacts (*values[10])(const void* data, std::int64_t count) noexcept;
  ColumnFacts (*columns[2])(const void* columns, std::int64_t count, std::int64_t num_genes) noexcept;
};

extern const RowFactsKernels row_facts_generic;
extern const RowFactsKernels row_facts_avx2;
extern const RowFactsKernels row_facts_avx512;

/// Those of the instruction set in use.
const RowFactsKernels& row_facts_kernels();

}  // namespace scfm
