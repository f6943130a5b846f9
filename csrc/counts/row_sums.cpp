#include "counts/row_sums.hpp"

#include <algorithm>

#include "cpu/thread_pool.hpp"

namespace scfm {
namespace {

constexpr std::int64_t kEntriesPerTask = 1 << 16;

template <class Value>
double sum_in_eight_parts(const Value* values, std::int64_t count) noexcept {
  double part[8] = {};
  std::int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (int lane = 0; lane < 8; ++lane) part[lane] += static_cast<double>(values[i + lane]);
  }
  for (int lane = 0; i < count; ++i, ++lane) part[lane] += static_cast<double>(values[i]);
  return ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
}

}  // namespace

void row_sums(const CsrView& csr, std::span<double> sums) {
  require_indptr(csr.indptr, csr.num_data, "row_sums");
  if (static_cast<std::int64_t>(sums.size()) != csr.num_rows()) {
    throw InvalidArgument("row_sums: sums has " + std::to_string(sums.size()) + " entries, expected " +
                          std::to_string(csr.num_rows()));
  }
  const std::int64_t rows = rows_per_task(csr, kEntriesPerTask);
  parallel_for((csr.num_rows() + rows - 1) / rows, num_threads(), [&](std::int64_t task, int) {
    with_data(csr.data_type, csr.data, [&](const auto* values) {
      for (std::int64_t row = task * rows; row < std::min((task + 1) * rows, csr.num_rows()); ++row) {
        const auto r = static_cast<std::size_t>(row);
        sums[r] = sum_in_eight_parts(values + csr.indptr[r], csr.indptr[r + 1] - csr.indptr[r]);
      }
    });
  });
}

}  // namespace scfm
