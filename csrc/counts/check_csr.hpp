/// Whether a block of cells is sound, and what its values look like, in one pass over the data.
///
/// Sound means: indptr starts at 0, never falls and ends at the number of entries; columns and data are
/// equally long; every column is in [0, num_genes); every value is finite and not negative. The facts
/// (sorted, duplicates, zeros, non-integers, maximum) let the caller warn or refuse without another pass.
#pragma once

#include <cstdint>
#include <string>

#include "base/csr_view.hpp"

namespace scfm {

struct CsrCheck {
  /// "" or the first fault by position: indptr_start, indptr_decreasing, indptr_end, length, index_range,
  /// not_finite, negative.
  std::string error;
  std::int64_t row = -1;       // of the fault
  std::int64_t position = -1;  // of the fault, in data
  std::int64_t column = -1;    // of the fault, as found
  double value = 0.0;          // of the fault: the value, or what indptr or the length was

  bool sorted = true;                  // every row's columns never fall
  std::int64_t duplicates = 0;         // rows that hold some column twice
  std::int64_t num_zeros = 0;          // stored zeros
  std::int64_t num_nonintegers = 0;    // values with a fractional part
  std::int64_t first_noninteger = -1;  // first row with one
  double max_value = 0.0;
};

CsrCheck check_csr(const CsrView& csr);

}  // namespace scfm
