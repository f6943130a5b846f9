/// A block of cells as compressed sparse rows, borrowed from the caller. Cells are rows, genes are columns.
///
/// Nothing here is trusted: check_csr says whether the arrays hold together, and every other function that
/// takes a CsrView checks what its own memory safety needs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "base/errors.hpp"

namespace scfm {

enum class DataType : int { f32, f64, i8, i16, i32, i64, u8, u16, u32, u64 };
inline constexpr int kNumDataTypes = 10;
enum class ColumnType : int { i32, i64 };

struct CsrView {
  std::span<const std::int64_t> indptr;  // num_rows + 1 entries, from 0
  const void* columns = nullptr;         // num_columns entries of column_type
  ColumnType column_type = ColumnType::i32;
  std::int64_t num_columns = 0;
  const void* data = nullptr;  // num_data entries of data_type
  DataType data_type = DataType::f32;
  std::int64_t num_data = 0;
  std::int64_t num_genes = 0;

  std::int64_t num_rows() const noexcept { return static_cast<std::int64_t>(indptr.size()) - 1; }
};

/// Calls callable(static_cast<const T*>(data)) with the T that type names.
template <class Callable>
decltype(auto) with_data(DataType type, const void* data, Callable&& callable) {
  switch (type) {
    case DataType::f32:
      return callable(static_cast<const float*>(data));
    case DataType::f64:
      return callable(static_cast<const double*>(data));
    case DataType::i8:
      return callable(static_cast<const std::int8_t*>(data));
    case DataType::i16:
      return callable(static_cast<const std::int16_t*>(data));
    case DataType::i32:
      return callable(static_cast<const std::int32_t*>(data));
    case DataType::i64:
      return callable(static_cast<const std::int64_t*>(data));
    case DataType::u8:
      return callable(static_cast<const std::uint8_t*>(data));
    case DataType::u16:
      return callable(static_cast<const std::uint16_t*>(data));
    case DataType::u32:
      return callable(static_cast<const std::uint32_t*>(data));
    case DataType::u64:
      break;
  }
  return callable(static_cast<const std::uint64_t*>(data));
}

template <class Callable>
decltype(auto) with_columns(ColumnType type, const void* columns, Callable&& callable) {
  if (type == ColumnType::i32) return callable(static_cast<const std::int32_t*>(columns));
  return callable(static_cast<const std::int64_t*>(columns));
}

/// Throws InvalidArgument unless indptr starts at 0, never falls and ends at num_entries: after this every
/// row indptr[r]..indptr[r+1] lies inside arrays of num_entries.
inline void require_indptr(std::span<const std::int64_t> indptr, std::int64_t num_entries,
                           const std::string& function) {
  if (indptr.empty()) throw InvalidArgument(function + ": indptr is empty, expected num_cells + 1 entries");
  if (indptr.front() != 0) {
    throw InvalidArgument(function + ": indptr[0] = " + std::to_string(indptr.front()) + ", expected 0");
  }
  for (std::size_t row = 0; row + 1 < indptr.size(); ++row) {
    if (indptr[row + 1] < indptr[row]) {
      throw InvalidArgument(function + ": indptr falls from " + std::to_string(indptr[row]) + " to " +
                            std::to_string(indptr[row + 1]) + " at row " + std::to_string(row));
    }
  }
  if (indptr.back() != num_entries) {
    throw InvalidArgument(function + ": indptr ends at " + std::to_string(indptr.back()) + ", expected " +
                          std::to_string(num_entries) + ", the number of entries");
  }
}

/// Cuts rows into tasks of about entries_per_task entries: task t covers rows [t * rows, (t + 1) * rows).
/// Depends on the block alone, never on the number of threads.
inline std::int64_t rows_per_task(const CsrView& csr, std::int64_t entries_per_task) noexcept {
  const std::int64_t mean = csr.num_rows() > 0 ? csr.num_data / csr.num_rows() : 0;
  const std::int64_t rows = entries_per_task / (mean + 1);
  return rows < 1 ? 1 : (rows > 1024 ? 1024 : rows);
}

}  // namespace scfm
