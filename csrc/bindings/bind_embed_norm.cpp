/// embed_norm, as Python sees it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "attention/embed_norm.hpp"
#include "bindings/array_arguments.hpp"
#include "bindings/tensor_arguments.hpp"

namespace py = pybind11;

namespace scfm {
namespace {

/// A contiguous (rows, columns) array of float32, or int16 holding the bits of bfloat16; -1: any number.
struct Matrix {
  EmbedRows values;
  std::int64_t rows;
  std::int64_t columns;
};

[[noreturn]] void wrong(const char* function, const std::string& message) {
  throw py::value_error(std::string(function) + ": " + message);
}

Matrix matrix_of(const py::object& object, std::int64_t rows, std::int64_t columns, const char* function,
                 const char* argument, bool output = false) {
  if (!py::isinstance<py::array>(object)) {
    throw py::type_error(std::string(function) + ": " + argument + " is no numpy array");
  }
  const auto array = py::reinterpret_borrow<py::array>(object);
  const char kind = array.dtype().kind();
  const auto size = array.itemsize();
  const char order = array.dtype().byteorder();
  if (!((kind == 'f' && size == 4) || (kind == 'i' && size == 2)) || (order != '=' && order != '|')) {
    wrong_dtype(array, function, argument, "float32, or int16 holding the bits of bfloat16");
  }
  if (array.ndim() != 2 || (rows >= 0 && array.shape(0) != rows) ||
      (columns >= 0 && array.shape(1) != columns)) {
    const auto wanted = [](std::int64_t count) {
      return count < 0 ? std::string("any") : std::to_string(count);
    };
    wrong(function, std::string(argument) + " has the wrong shape, expected (" + wanted(rows) + ", " +
                        wanted(columns) + ")");
  }
  constexpr int kWanted = int{py::array::c_style} | int{py::detail::npy_api::NPY_ARRAY_ALIGNED_};
  if ((array.flags() & kWanted) != kWanted)
    wrong(function, std::string(argument) + " is not contiguous or not aligned");
  if (output && !array.writeable()) wrong(function, std::string(argument) + " is read-only");
  return {{const_cast<void*>(array.data()), kind == 'i'}, array.shape(0), array.shape(1)};
}

EmbedRows rows_like(const py::object& object, std::int64_t rows, const Matrix& like, const char* function,
                    const char* argument, bool output = false) {
  const Matrix matrix = matrix_of(object, rows, like.columns, function, argument, output);
  if (matrix.values.is_bf16 != like.values.is_bf16) {
    throw py::type_error(std::string(function) + ": " + argument + " has another dtype than the first table");
  }
  return matrix.values;
}

EmbedTable table_of(const py::object& ids, const EmbedRows& rows, std::int64_t num_tokens,
                    const char* function) {
  const py::array array = flat_array(ids, function, "ids");
  const auto size = array.dtype().itemsize();
  if (array.dtype().kind() != 'i' || (size != 4 && size != 8)) {
    wrong_dtype(array, function, "ids", "int32 or int64");
  }
  if (array.size() != num_tokens) {
    wrong(function, "ids have " + std::to_string(array.size()) + " entries, expected " +
                        std::to_string(num_tokens) + " as the first");
  }
  return {rows, array.data(), size == 8};
}

struct Arguments {
  EmbedNormProblem problem;
  Matrix first;
};

Arguments arguments_of(const py::list& ids, const py::list& tables, const py::object& addend,
                       const py::object& weight, const char* function) {
  if (ids.size() != tables.size() || tables.empty()) {
    wrong(function, std::to_string(ids.size()) + " ids and " + std::to_string(tables.size()) +
                        " tables, expected one for each");
  }
  Arguments arguments;
  arguments.first = matrix_of(tables[0], -1, -1, function, "tables");
  EmbedNormProblem& problem = arguments.problem;
  problem.size = arguments.first.columns;
  problem.num_tokens = flat_array(ids[0], function, "ids").size();
  if (problem.size < 1) wrong(function, "tables have no columns");
  for (std::size_t n = 0; n < tables.size(); ++n) {
    const EmbedRows rows = rows_like(tables[n], -1, arguments.first, function, "tables");
    problem.tables.push_back(table_of(ids[n], rows, problem.num_tokens, function));
    problem.table_rows.push_back(py::reinterpret_borrow<py::array>(tables[n]).shape(0));
  }
  problem.addend = addend.is_none()
                       ? EmbedRows{nullptr, false}
                       : rows_like(addend, problem.num_tokens, arguments.first, function, "addend");
  problem.weight = weight.is_none() ? nullptr : float_input(weight, problem.size, 0, function, "weight");
  problem.bias = nullptr;
  return arguments;
}

void forward(const py::list& ids, const py::list& tables, const py::object& addend, const py::object& weight,
             const py::object& bias, const py::object& out, const py::object& mean, const py::object& rstd,
             float eps) {
  constexpr const char* kName = "embed_norm_forward";
  Arguments arguments = arguments_of(ids, tables, addend, weight, kName);
  EmbedNormProblem& problem = arguments.problem;
  if (weight.is_none() != bias.is_none()) wrong(kName, "weight and bias are given together or not at all");
  if (!bias.is_none()) problem.bias = float_input(bias, problem.size, 0, kName, "bias");
  const EmbedRows output = rows_like(out, problem.num_tokens, arguments.first, kName, "out", true);
  float* means = float_output(mean, problem.num_tokens, 0, kName, "mean");
  float* rstds = float_output(rstd, problem.num_tokens, 0, kName, "rstd");
  const py::gil_scoped_release unlocked;
  embed_norm_forward(problem, output, means, rstds, eps);
}

void backward(const py::object& grad_out, const py::list& ids, const py::list& tables,
              const py::object& addend, const py::object& weight, const py::object& mean,
              const py::object& rstd, const py::list& grad_tables, const py::object& grad_addend,
              const py::object& grad_weight, const py::object& grad_bias) {
  constexpr const char* kName = "embed_norm_backward";
  const Arguments arguments = arguments_of(ids, tables, addend, weight, kName);
  const EmbedNormProblem& problem = arguments.problem;
  const EmbedRows upstream = rows_like(grad_out, problem.num_tokens, arguments.first, kName, "grad_out");
  const float* means = float_input(mean, problem.num_tokens, 0, kName, "mean");
  const float* rstds = float_input(rstd, problem.num_tokens, 0, kName, "rstd");
  if (addend.is_none() != grad_addend.is_none() || weight.is_none() != grad_weight.is_none() ||
      weight.is_none() != grad_bias.is_none() || grad_tables.size() != tables.size()) {
    wrong(kName, "gradients are given exactly for what has one: the tables, addend, weight and bias");
  }
  EmbedNormGradients gradients{{}, {nullptr, false}, nullptr, nullptr};
  for (std::size_t n = 0; n < tables.size(); ++n) {
    gradients.tables.push_back(
        float_output(grad_tables[n], problem.table_rows[n], problem.size, kName, "grad_tables"));
  }
  if (!addend.is_none()) {
    gradients.addend =
        rows_like(grad_addend, problem.num_tokens, arguments.first, kName, "grad_addend", true);
  }
  if (!weight.is_none()) {
    gradients.weight = float_output(grad_weight, problem.size, 0, kName, "grad_weight");
    gradients.bias = float_output(grad_bias, problem.size, 0, kName, "grad_bias");
  }
  const py::gil_scoped_release unlocked;
  embed_norm_backward(problem, upstream, means, rstds, gradients);
}

}  // namespace

void bind_embed_norm(py::module_& module) {
  using py::arg;
  module.def("embed_norm_forward", &forward, arg("ids"), arg("tables"), arg("addend"), arg("weight"),
             arg("bias"), arg("out"), arg("mean"), arg("rstd"), arg("eps"));
  module.def("embed_norm_backward", &backward, arg("grad_out"), arg("ids"), arg("tables"), arg("addend"),
             arg("weight"), arg("mean"), arg("rstd"), arg("grad_tables"), arg("grad_addend"),
             arg("grad_weight"), arg("grad_bias"));
}

}  // namespace scfm
