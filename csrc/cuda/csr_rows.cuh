/// The rows of a CSR block as kernels read them: any type of column and value, as stored or put in order.
///
/// Types are looked up at run time: a branch that every thread takes alike costs nothing beside the load, and
/// one kernel serves all twenty combinations. Every value becomes a float64, which holds each of them exactly
/// but integers beyond 2^53, which the CPU rounds the same way.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/rank_value.hpp"
#include "cuda/warp.cuh"

namespace scfm::cuda {

__device__ inline std::int64_t column_at(const void* columns, ColumnType type, std::int64_t i) {
  if (type == ColumnType::i32) return static_cast<const std::int32_t*>(columns)[i];
  return static_cast<const std::int64_t*>(columns)[i];
}

__device__ inline double value_at(const void* data, DataType type, std::int64_t i) {
  switch (type) {
    case DataType::f32:
      return static_cast<double>(static_cast<const float*>(data)[i]);
    case DataType::f64:
      return static_cast<const double*>(data)[i];
    case DataType::i8:
      return static_cast<double>(static_cast<const std::int8_t*>(data)[i]);
    case DataType::i16:
      return static_cast<double>(static_cast<const std::int16_t*>(data)[i]);
    case DataType::i32:
      return static_cast<double>(static_cast<const std::int32_t*>(data)[i]);
    case DataType::i64:
      return static_cast<double>(static_cast<const std::int64_t*>(data)[i]);
    case DataType::u8:
      return static_cast<double>(static_cast<const std::uint8_t*>(data)[i]);
    case DataType::u16:
      return static_cast<double>(static_cast<const std::uint16_t*>(data)[i]);
    case DataType::u32:
      return static_cast<double>(static_cast<const std::uint32_t*>(data)[i]);
    case DataType::u64:
      break;
  }
  return static_cast<double>(static_cast<const std::uint64_t*>(data)[i]);
}

/// Sums of a row's values run in eight lanes, entry i in lane i % 8, on every processor: so they round alike.
inline constexpr int kRowLanes = 8;

/// This thread's lane of its row, and the mask of the row's lanes in the warp.
struct RowLane {
  int lane = static_cast<int>(threadIdx.x) % kRowLanes;
  unsigned group = 0xFFu << (threadIdx.x % kWarpSize - lane);

  /// ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7)), in all eight lanes.
  template <class Number>
  __device__ Number sum(Number x) const {
    for (int offset = kRowLanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(group, x, offset);
    return x;
  }
};

/// One row, its columns strictly rising.
struct DeviceRow {
  const void* columns;
  ColumnType column_type;
  const void* data;
  DataType data_type;
  std::int64_t start;
  std::int32_t count;

  __device__ std::int32_t column(std::int32_t i) const {
    return static_cast<std::int32_t>(column_at(columns, column_type, start + i));
  }
  __device__ double value(std::int32_t i) const { return value_at(data, data_type, start + i); }

  /// Where the row holds a column, or -1.
  __device__ std::int32_t find(std::int32_t wanted) const {
    std::int32_t first = 0;
    std::int32_t last = count;
    while (first < last) {
      const std::int32_t middle = first + (last - first) / 2;
      if (column(middle) < wanted) {
        first = middle + 1;
      } else {
        last = middle;
      }
    }
    return first < count && column(first) == wanted ? first : -1;
  }
};

/// Where each row is to be read: as stored, or, if it was out of order, where it has been put in order.
struct ReadableRows {
  DeviceCsr csr;
  const std::uint8_t* out_of_order;
  OrderedRows ordered;

  __device__ DeviceRow operator[](std::int64_t row) const {
    const std::int64_t start = csr.indptr[row];
    if (ordered.counts != nullptr && out_of_order[row] != 0) {
      return {ordered.columns, ColumnType::i32, ordered.values, DataType::f64, start, ordered.counts[row]};
    }
    return {csr.columns,   csr.column_type, csr.data,
            csr.data_type, start,           static_cast<std::int32_t>(csr.indptr[row + 1] - start)};
  }
};

}  // namespace scfm::cuda
