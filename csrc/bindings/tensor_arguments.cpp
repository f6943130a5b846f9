#include "bindings/tensor_arguments.hpp"

#include <span>

#include "bindings/array_arguments.hpp"

namespace py = pybind11;

namespace scfm {
namespace {

std::string name_of(const char* function, const char* argument) {
  return std::string(function) + ": " + argument;
}

std::string shape_of(const py::array& array) {
  std::string shape = "(";
  for (py::ssize_t i = 0; i < array.ndim(); ++i) {
    shape += (i == 0 ? "" : ", ") + std::to_string(array.shape(i));
  }
  return shape + ")";
}

py::array numpy_array(const py::object& object, const char* function, const char* argument, bool output) {
  if (!py::isinstance<py::array>(object)) {
    throw py::type_error(name_of(function, argument) + " is a " +
                         std::string(py::str(py::type::of(object).attr("__name__"))) +
                         ", expected a numpy array");
  }
  auto array = py::reinterpret_borrow<py::array>(object);
  const char order = array.dtype().byteorder();
  if ((array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_) == 0 || (order != '=' && order != '|')) {
    throw py::value_error(name_of(function, argument) + " is not aligned or not in native byte order");
  }
  if (output && !array.writeable()) throw py::value_error(name_of(function, argument) + " is read-only");
  return array;
}

py::array float_array(const py::object& object, std::int64_t rows, std::int64_t columns, const char* function,
                      const char* argument, bool output) {
  const py::array array = numpy_array(object, function, argument, output);
  if (array.dtype().kind() != 'f' || array.itemsize() != 4) {
    wrong_dtype(array, function, argument, "float32");
  }
  const bool fits = columns == 0 ? array.ndim() == 1 && array.shape(0) == rows
                                 : array.ndim() == 2 && array.shape(0) == rows && array.shape(1) == columns;
  if (!fits) {
    throw py::value_error(name_of(function, argument) + " has shape " + shape_of(array) + ", expected (" +
                          std::to_string(rows) +
                          (columns == 0 ? ",)" : ", " + std::to_string(columns) + ")"));
  }
  if ((array.flags() & py::array::c_style) == 0) {
    throw py::value_error(name_of(function, argument) + " is not contiguous");
  }
  return array;
}

}  // namespace

TensorArgument tensor_argument(const py::object& object, const char* function, const char* argument,
                               bool output) {
  const py::array array = numpy_array(object, function, argument, output);
  const char kind = array.dtype().kind();
  const auto size = array.itemsize();
  if (!(kind == 'f' && size == 4) && !(kind == 'i' && size == 2)) {
    wrong_dtype(array, function, argument, "float32, or int16 holding the bits of bfloat16");
  }
  if (array.ndim() != 3) {
    throw py::value_error(name_of(function, argument) + " has shape " + shape_of(array) +
                          ", expected (tokens, heads, head_dim)");
  }
  if (array.size() > 0 && array.shape(2) > 1 && array.strides(2) != size) {
    throw py::value_error(name_of(function, argument) + " is not contiguous in its last dimension");
  }
  for (const int axis : {0, 1}) {
    const bool used = array.shape(axis) > 1;
    if (used && (array.strides(axis) % size != 0 || array.strides(axis) < 0)) {
      throw py::value_error(name_of(function, argument) + " has a stride of " +
                            std::to_string(array.strides(axis)) + " bytes");
    }
    if (used && output && array.size() > 0 && array.strides(axis) < array.shape(2) * size) {
      throw py::value_error(name_of(function, argument) + " overlaps itself");
    }
  }
  return {const_cast<void*>(array.data()),
          kind == 'f' ? StorageType::f32 : StorageType::bf16,
          array.shape(0),
          array.shape(1),
          array.shape(2),
          array.strides(0) / size,
          array.strides(1) / size};
}

void check_same(const TensorArgument& tensor, const TensorArgument& like, bool same_rows,
                const char* function, const char* argument) {
  if (tensor.type != like.type) {
    throw py::type_error(name_of(function, argument) + " has another dtype than the first tensor");
  }
  if ((same_rows && tensor.rows != like.rows) || tensor.heads != like.heads ||
      tensor.head_dim != like.head_dim) {
    throw py::value_error(name_of(function, argument) + " is " + std::to_string(tensor.rows) + " x " +
                          std::to_string(tensor.heads) + " x " + std::to_string(tensor.head_dim) +
                          ", expected " + (same_rows ? std::to_string(like.rows) : std::string("any")) +
                          " x " + std::to_string(like.heads) + " x " + std::to_string(like.head_dim));
  }
}

float* float_output(const py::object& object, std::int64_t rows, std::int64_t columns, const char* function,
                    const char* argument) {
  return static_cast<float*>(
      const_cast<void*>(float_array(object, rows, columns, function, argument, true).data()));
}

const float* float_input(const py::object& object, std::int64_t rows, std::int64_t columns,
                         const char* function, const char* argument) {
  return static_cast<const float*>(float_array(object, rows, columns, function, argument, false).data());
}

const std::int32_t* offsets_argument(const py::object& object, std::int64_t num_rows, std::int64_t num_cells,
                                     const char* function, const char* argument) {
  const std::span<const std::int32_t> offsets = array_of<std::int32_t>(object, function, argument);
  const auto count = static_cast<std::int64_t>(offsets.size());
  if (count < 1 || (num_cells >= 0 && count != num_cells + 1)) {
    throw py::value_error(name_of(function, argument) + " has " + std::to_string(count) +
                          " entries, expected " +
                          (num_cells >= 0 ? std::to_string(num_cells + 1) : std::string("cells + 1")));
  }
  bool rises = offsets.front() == 0 && offsets.back() == num_rows;
  for (std::int64_t i = 1; i < count; ++i) {
    rises = rises && offsets[static_cast<std::size_t>(i - 1)] <= offsets[static_cast<std::size_t>(i)];
  }
  if (!rises) {
    throw py::value_error(name_of(function, argument) + " must rise from 0 to " + std::to_string(num_rows) +
                          ", found " + std::to_string(offsets.front()) + " to " +
                          std::to_string(offsets.back()));
  }
  return offsets.data();
}

}  // namespace scfm
