/// Hands out the rows of a CSR block in the one form that the kernels take: int32 columns, strictly ascending
/// and in range, with float32 or float64 values. Rows that already are like that are passed through
/// untouched.
#pragma once

#include <cstdint>
#include <vector>

#include "base/aligned_buffer.hpp"
#include "base/csr_view.hpp"
#include "tokenize/rank_kernels.hpp"

namespace scfm {

struct Row {
  const std::int32_t* columns;
  const void* values;
  bool values_are_f64;
  std::int64_t count;

  double value(std::int64_t i) const noexcept {
    return values_are_f64 ? static_cast<const double*>(values)[i] : static_cast<const float*>(values)[i];
  }
};

class RowReader {
 public:
  /// `csr` must have passed require_indptr, with as many columns as data. function: named in errors.
  RowReader(const CsrView& csr, const RankKernels& kernels, const char* function) noexcept
      : csr_(csr), kernels_(kernels), function_(function) {}

  /// Throws InvalidArgument if a column is out of range. Unsorted columns are sorted; values of the same
  /// column are summed in float64 (rounded to float32 if that is the type of the data). The result is valid
  /// until the next call.
  Row read(std::int64_t row);

 private:
  void narrow_columns(std::int64_t row, std::int64_t start, std::int64_t count);
  void require_in_range(std::int64_t row, std::int64_t start, std::int64_t count) const;
  Row canonical(Row row);

  const CsrView& csr_;
  const RankKernels& kernels_;
  const char* function_;
  AlignedBuffer<std::int32_t> columns_;
  AlignedBuffer<double> values_;
  std::vector<std::uint64_t> order_;
  AlignedBuffer<std::int32_t> canonical_columns_;
  AlignedBuffer<double> canonical_values_;
};

}  // namespace scfm
