#include "counts/check_csr.hpp"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "counts/row_facts.hpp"
#include "cpu/thread_pool.hpp"

namespace scfm {
namespace {

constexpr std::int64_t kEntriesPerTask = 1 << 16;
constexpr std::int64_t kMaxBitmapGenes = std::int64_t{1} << 24;  // 2 MiB a thread

bool check_indptr(const CsrView& csr, CsrCheck& check) {
  const auto fault = [&check](const char* error, std::int64_t row, std::int64_t found) {
    check.error = error;
    check.row = row;
    check.value = static_cast<double>(found);
    return false;
  };
  if (csr.indptr.empty()) return fault("indptr_start", -1, -1);
  if (csr.indptr.front() != 0) return fault("indptr_start", 0, csr.indptr.front());
  for (std::int64_t row = 0; row < csr.num_rows(); ++row) {
    const auto i = static_cast<std::size_t>(row);
    if (csr.indptr[i + 1] < csr.indptr[i]) return fault("indptr_decreasing", row, csr.indptr[i + 1]);
  }
  if (csr.num_columns != csr.num_data) return fault("length", -1, csr.num_columns);
  if (csr.indptr.back() != csr.num_data) return fault("indptr_end", csr.num_rows(), csr.indptr.back());
  return true;
}

template <class Value>
const char* value_error(Value value) noexcept {
  if constexpr (std::is_floating_point_v<Value>) {
    if (!std::isfinite(value)) return "not_finite";
  }
  if constexpr (std::is_signed_v<Value>) {
    if (value < 0) return "negative";
  }
  return nullptr;
}

/// The first fault of a row that the kernels found suspect, or nothing (a -0.0 is no fault).
template <class Column, class Value>
bool find_fault(const CsrView& csr, const Column* columns, const Value* values, std::int64_t row,
                CsrCheck& check) {
  const auto r = static_cast<std::size_t>(row);
  for (std::int64_t i = csr.indptr[r]; i < csr.indptr[r + 1]; ++i) {
    const bool column_ok = columns[i] >= 0 && static_cast<std::int64_t>(columns[i]) < csr.num_genes;
    const char* error = column_ok ? value_error(values[i]) : "index_range";
    if (error == nullptr) continue;
    check.error = error;
    check.row = row;
    check.position = i;
    check.column = static_cast<std::int64_t>(columns[i]);
    check.value = static_cast<double>(values[i]);
    return true;
  }
  return false;
}

/// Facts of a sound row that holds -0.0, entry by entry.
template <class Value>
ValueFacts plain_facts(const Value* values, std::int64_t count) noexcept {
  ValueFacts facts{false, 0, 0, 0.0};
  for (std::int64_t i = 0; i < count; ++i) {
    const auto value = static_cast<double>(values[i]);
    facts.num_zeros += value == 0.0 ? 1 : 0;
    facts.num_nonintegers += value != std::floor(value) ? 1 : 0;
    facts.max_value = std::max(facts.max_value, value);
  }
  return facts;
}

/// Whether an unsorted row repeats a column. All columns are known to be in range.
template <class Column>
bool repeats_column(const Column* columns, std::int64_t count, std::int64_t num_genes,
                    std::vector<bool>& seen, std::vector<Column>& ordered) {
  if (num_genes > kMaxBitmapGenes) {
    ordered.assign(columns, columns + count);
    std::sort(ordered.begin(), ordered.end());
    return std::adjacent_find(ordered.begin(), ordered.end()) != ordered.end();
  }
  seen.assign(static_cast<std::size_t>(num_genes), false);
  for (std::int64_t i = 0; i < count; ++i) {
    auto bit = seen[static_cast<std::size_t>(columns[i])];
    if (bit) return true;
    bit = true;
  }
  return false;
}

template <class Column, class Value>
CsrCheck check_rows(const CsrView& csr, const RowFactsKernels& kernels, const Column* columns,
                    const Value* values, std::int64_t first_row, std::int64_t last_row) {
  CsrCheck check;
  std::vector<bool> seen;
  std::vector<Column> ordered;
  for (std::int64_t row = first_row; row < last_row; ++row) {
    const std::int64_t start = csr.indptr[static_cast<std::size_t>(row)];
    const std::int64_t count = csr.indptr[static_cast<std::size_t>(row) + 1] - start;
    if (count == 0) continue;
    const ColumnFacts column_facts =
        kernels.columns[static_cast<int>(csr.column_type)](columns + start, count, csr.num_genes);
    ValueFacts value_facts = kernels.values[static_cast<int>(csr.data_type)](values + start, count);
    if (column_facts.out_of_range || value_facts.suspect) {
      if (find_fault(csr, columns, values, row, check)) return check;
      value_facts = plain_facts(values + start, count);
    }
    if (column_facts.repeats) {
      ++check.duplicates;
    } else if (column_facts.falls) {
      check.duplicates += repeats_column(columns + start, count, csr.num_genes, seen, ordered) ? 1 : 0;
    }
    check.sorted = check.sorted && !column_facts.falls;
    check.num_zeros += value_facts.num_zeros;
    check.num_nonintegers += value_facts.num_nonintegers;
    if (value_facts.num_nonintegers > 0 && check.first_noninteger < 0) check.first_noninteger = row;
    check.max_value = std::max(check.max_value, value_facts.max_value);
  }
  return check;
}

/// Joins the checks of consecutive stretches of rows; the first fault stands for all.
CsrCheck merge(const std::vector<CsrCheck>& parts) {
  CsrCheck whole;
  for (const CsrCheck& part : parts) {
    if (!part.error.empty()) return part;
    whole.sorted = whole.sorted && part.sorted;
    whole.duplicates += part.duplicates;
    whole.num_zeros += part.num_zeros;
    whole.num_nonintegers += part.num_nonintegers;
    if (whole.first_noninteger < 0) whole.first_noninteger = part.first_noninteger;
    whole.max_value = std::max(whole.max_value, part.max_value);
  }
  return whole;
}

}  // namespace

CsrCheck check_csr(const CsrView& csr) {
  CsrCheck check;
  if (!check_indptr(csr, check)) return check;
  const RowFactsKernels& kernels = row_facts_kernels();
  const std::int64_t rows = rows_per_task(csr, kEntriesPerTask);
  const std::int64_t num_tasks = (csr.num_rows() + rows - 1) / rows;
  std::vector<CsrCheck> parts(static_cast<std::size_t>(num_tasks));
  parallel_for(num_tasks, num_threads(), [&](std::int64_t task, int) {
    const std::int64_t first = task * rows;
    const std::int64_t last = std::min(first + rows, csr.num_rows());
    parts[static_cast<std::size_t>(task)] =
        with_columns(csr.column_type, csr.columns, [&](const auto* columns) {
          return with_data(csr.data_type, csr.data, [&](const auto* values) {
            return check_rows(csr, kernels, columns, values, first, last);
          });
        });
  });
  return merge(parts);
}

}  // namespace scfm
