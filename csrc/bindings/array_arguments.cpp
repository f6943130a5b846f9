#include "bindings/array_arguments.hpp"

namespace py = pybind11;

namespace scfm {
namespace {

std::string name_of(const char* function, const char* argument) {
  return std::string(function) + ": " + argument;
}

DataType data_type_of(const py::array& array, const char* function) {
  const char kind = array.dtype().kind();
  const auto size = array.dtype().itemsize();
  if (kind == 'f' && size == 4) return DataType::f32;
  if (kind == 'f' && size == 8) return DataType::f64;
  if (kind == 'i' && size == 1) return DataType::i8;
  if (kind == 'i' && size == 2) return DataType::i16;
  if (kind == 'i' && size == 4) return DataType::i32;
  if (kind == 'i' && size == 8) return DataType::i64;
  if (kind == 'u' && size == 1) return DataType::u8;
  if (kind == 'u' && size == 2) return DataType::u16;
  if (kind == 'u' && size == 4) return DataType::u32;
  if (kind == 'u' && size == 8) return DataType::u64;
  wrong_dtype(array, function, "data", "float32, float64 or an integer type");
}

}  // namespace

void wrong_dtype(const py::array& array, const char* function, const char* argument,
                 const std::string& expected) {
  throw py::type_error(name_of(function, argument) + " has dtype " + std::string(py::str(array.dtype())) +
                       ", expected " + expected);
}

py::array flat_array(const py::object& object, const char* function, const char* argument) {
  if (!py::isinstance<py::array>(object)) {
    throw py::type_error(name_of(function, argument) + " is a " +
                         std::string(py::str(py::type::of(object).attr("__name__"))) +
                         ", expected a numpy array");
  }
  auto array = py::reinterpret_borrow<py::array>(object);
  if (array.ndim() != 1) {
    throw py::value_error(name_of(function, argument) + " has " + std::to_string(array.ndim()) +
                          " dimensions, expected 1");
  }
  if (array.size() > 1 && array.strides(0) != array.itemsize()) {
    throw py::value_error(name_of(function, argument) +
                          " is not contiguous; pass numpy.ascontiguousarray(...)");
  }
  if ((array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_) == 0) {
    throw py::value_error(name_of(function, argument) + " is not aligned in memory; pass a copy of it");
  }
  const char order = array.dtype().byteorder();
  if (order != '=' && order != '|') {
    throw py::type_error(name_of(function, argument) + " has dtype " + std::string(py::str(array.dtype())) +
                         ", expected native byte order");
  }
  return array;
}

CsrView csr_of(const py::object& indptr, const py::object& indices, const py::object& data,
               std::int64_t num_genes, const char* function) {
  CsrView csr;
  csr.indptr = array_of<std::int64_t>(indptr, function, "indptr");
  csr.num_genes = num_genes;
  if (!indices.is_none()) {
    const py::array columns = flat_array(indices, function, "indices");
    const auto size = columns.dtype().itemsize();
    if (columns.dtype().kind() != 'i' || (size != 4 && size != 8)) {
      wrong_dtype(columns, function, "indices", "int32 or int64");
    }
    csr.column_type = size == 4 ? ColumnType::i32 : ColumnType::i64;
    csr.columns = columns.data();
    csr.num_columns = columns.size();
  }
  const py::array values = flat_array(data, function, "data");
  csr.data_type = data_type_of(values, function);
  csr.data = values.data();
  csr.num_data = values.size();
  return csr;
}

}  // namespace scfm
