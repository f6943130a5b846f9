#include "tokenize/row_reader.hpp"

#include <algorithm>
#include <limits>
#include <string>
#include <type_traits>

namespace scfm {

/// Throws for the first column out of range; the caller knows that there is one.
void RowReader::require_in_range(std::int64_t row, std::int64_t start, std::int64_t count) const {
  with_columns(csr_.column_type, csr_.columns, [&](const auto* columns) {
    for (std::int64_t i = start; i < start + count; ++i) {
      if (columns[i] >= 0 && static_cast<std::int64_t>(columns[i]) < csr_.num_genes) continue;
      throw InvalidArgument(std::string(function_) + ": row " + std::to_string(row) + ": indices[" +
                            std::to_string(i) + "] = " + std::to_string(columns[i]) +
                            " is out of range for " + std::to_string(csr_.num_genes) + " genes");
    }
  });
}

/// int64 columns into int32 scratch, refusing what does not fit.
void RowReader::narrow_columns(std::int64_t row, std::int64_t start, std::int64_t count) {
  const auto* wide = static_cast<const std::int64_t*>(csr_.columns) + start;
  std::int32_t* narrow = columns_.reserve(count);
  std::uint64_t highest = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    highest = std::max(highest, static_cast<std::uint64_t>(wide[i]));
    narrow[i] = static_cast<std::int32_t>(static_cast<std::uint32_t>(wide[i]));
  }
  if (highest > static_cast<std::uint64_t>(std::numeric_limits<std::int32_t>::max()))
    require_in_range(row, start, count);
}

/// Sorts by column and sums what shares one.
Row RowReader::canonical(Row row) {
  order_.resize(static_cast<std::size_t>(row.count));
  for (std::int64_t i = 0; i < row.count; ++i) {
    order_[static_cast<std::size_t>(i)] =
        (static_cast<std::uint64_t>(row.columns[i]) << 32) | static_cast<std::uint64_t>(i);
  }
  std::sort(order_.begin(), order_.end());  // by column, then by position
  std::int32_t* columns = canonical_columns_.reserve(row.count);
  double* values = canonical_values_.reserve(row.count);
  std::int64_t count = 0;
  for (const std::uint64_t entry : order_) {
    const auto column = static_cast<std::int32_t>(entry >> 32);
    const double value = row.value(static_cast<std::int64_t>(entry & 0xFFFFFFFFu));
    if (count > 0 && columns[count - 1] == column) {
      values[count - 1] += value;
    } else {
      columns[count] = column;
      values[count] = value;
      ++count;
    }
  }
  if (!row.values_are_f64) {
    for (std::int64_t i = 0; i < count; ++i) values[i] = static_cast<double>(static_cast<float>(values[i]));
  }
  return {columns, values, true, count};
}

Row RowReader::read(std::int64_t row) {
  const std::int64_t start = csr_.indptr[static_cast<std::size_t>(row)];
  const std::int64_t count = csr_.indptr[static_cast<std::size_t>(row) + 1] - start;
  if (count > std::numeric_limits<std::int32_t>::max()) {
    throw InvalidArgument(std::string(function_) + ": row " + std::to_string(row) + " has " +
                          std::to_string(count) + " entries, more than 2^31 - 1");
  }
  if (count == 0) return {nullptr, nullptr, true, 0};
  Row result{nullptr, nullptr, true, count};
  if (csr_.column_type == ColumnType::i64) {
    narrow_columns(row, start, count);
    result.columns = columns_.data();
  } else {
    result.columns = static_cast<const std::int32_t*>(csr_.columns) + start;
  }
  const ColumnScan scan = kernels_.scan_columns(result.columns, count);
  if (scan.highest >= static_cast<std::uint64_t>(csr_.num_genes)) require_in_range(row, start, count);
  with_data(csr_.data_type, csr_.data, [&](const auto* data) {
    using Value = std::remove_cv_t<std::remove_pointer_t<decltype(data)>>;
    if constexpr (std::is_floating_point_v<Value>) {
      result.values = data + start;
      result.values_are_f64 = std::is_same_v<Value, double>;
    } else {
      double* values = values_.reserve(count);
      for (std::int64_t i = 0; i < count; ++i) values[i] = static_cast<double>(data[start + i]);
      result.values = values;
    }
  });
  return scan.ascending ? result : canonical(result);
}

}  // namespace scfm
