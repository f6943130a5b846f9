/// Tensor arguments of the attention bindings: numpy arrays over torch's memory, float32 or bfloat16 (which
/// numpy does not know: int16 arrays of the same bits). Shapes, strides and types come from the array itself,
/// so a caller cannot make a kernel read out of bounds.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

namespace scfm {

enum class StorageType { f32, bf16 };

/// Three dimensions (rows, heads, head_dim), the last contiguous. Strides count elements.
struct TensorArgument {
  void* data;
  StorageType type;
  std::int64_t rows;
  std::int64_t heads;
  std::int64_t head_dim;
  std::int64_t row_stride;
  std::int64_t head_stride;
};

/// Throws TypeError or ValueError, naming function and argument, unless it is such an array (and writable,
/// where `output`). Valid while `object` is held.
TensorArgument tensor_argument(const pybind11::object& object, const char* function, const char* argument,
                               bool output = false);

/// Throws ValueError unless the two have the same rows (where asked), heads, head_dim and storage type.
void check_same(const TensorArgument& tensor, const TensorArgument& like, bool same_rows,
                const char* function, const char* argument);

/// A contiguous float32 array of exactly this shape (1 or 2 dimensions; columns = 0 for one), writable.
float* float_output(const pybind11::object& object, std::int64_t rows, std::int64_t columns,
                    const char* function, const char* argument);
const float* float_input(const pybind11::object& object, std::int64_t rows, std::int64_t columns,
                         const char* function, const char* argument);

/// int32 offsets that rise from 0 to num_rows; throws ValueError otherwise. `num_cells` of -1: any number.
const std::int32_t* offsets_argument(const pybind11::object& object, std::int64_t num_rows,
                                     std::int64_t num_cells, const char* function, const char* argument);

}  // namespace scfm
