/// CSR checks and sums, as Python sees them.
#include <pybind11/pybind11.h>

#include "bindings/array_arguments.hpp"
#include "counts/check_csr.hpp"
#include "counts/row_sums.hpp"

namespace py = pybind11;

namespace scfm {
namespace {

CsrCheck check(const py::object& indptr, const py::object& indices, const py::object& data,
               std::int64_t num_genes) {
  if (indices.is_none()) throw py::type_error("check_csr: indices is None, expected a numpy array");
  const CsrView csr = csr_of(indptr, indices, data, num_genes, "check_csr");
  if (num_genes < 0) {
    throw py::value_error("check_csr: num_genes = " + std::to_string(num_genes) + ", expected at least 0");
  }
  const py::gil_scoped_release unlocked;
  return check_csr(csr);
}

py::array_t<double> sums(const py::object& indptr, const py::object& data) {
  const CsrView csr = csr_of(indptr, py::none(), data, 0, "row_sums");
  py::array_t<double> result(csr.num_rows() < 0 ? 0 : csr.num_rows());
  const std::span<double> values(result.mutable_data(), static_cast<std::size_t>(result.size()));
  const py::gil_scoped_release unlocked;
  row_sums(csr, values);
  return result;
}

std::string describe(const CsrCheck& check) {
  if (check.error.empty()) return "CsrCheck(sound)";
  return "CsrCheck(error='" + check.error + "', row=" + std::to_string(check.row) +
         ", position=" + std::to_string(check.position) + ", column=" + std::to_string(check.column) +
         ", value=" + std::to_string(check.value) + ")";
}

}  // namespace

void bind_counts(py::module_& module) {
  py::class_<CsrCheck>(module, "CsrCheck",
                       "Whether a block of cells is sound, and what its values look like.")
      .def_readonly("error", &CsrCheck::error)
      .def_readonly("row", &CsrCheck::row)
      .def_readonly("position", &CsrCheck::position)
      .def_readonly("column", &CsrCheck::column)
      .def_readonly("value", &CsrCheck::value)
      .def_readonly("sorted", &CsrCheck::sorted)
      .def_readonly("duplicates", &CsrCheck::duplicates)
      .def_readonly("num_zeros", &CsrCheck::num_zeros)
      .def_readonly("num_nonintegers", &CsrCheck::num_nonintegers)
      .def_readonly("first_noninteger", &CsrCheck::first_noninteger)
      .def_readonly("max_value", &CsrCheck::max_value)
      .def("__repr__", &describe);
  module.def("check_csr", &check, py::arg("indptr"), py::arg("indices"), py::arg("data"),
             py::arg("num_genes"), "One pass over a CSR block: first fault, or the facts of its values.");
  module.def("row_sums", &sums, py::arg("indptr"), py::arg("data"),
             "Sum of the stored values of each row, float64.");
}

}  // namespace scfm
