/// scBERT's log bins, as Python sees them.
#include <pybind11/pybind11.h>

#include "bindings/array_arguments.hpp"
#include "bindings/packed_arrays.hpp"
#include "tokenize/log_bins.hpp"

namespace py = pybind11;

namespace scfm {
namespace {

/// LogBinsResult with its arrays as numpy's, each owning its memory.
struct LogBinsArrays {
  py::object token_ids, values, cu_seqlens, num_panel_genes, mapped_counts, total_counts;
};

LogBinsArrays bin_block(const py::object& indptr, const py::object& indices, const py::object& data,
                        const py::object& column_position, std::int32_t panel_size, bool already_logged) {
  constexpr const char* kFunction = "log_bins";
  if (indices.is_none()) throw py::type_error("log_bins: indices is None, expected a numpy array");
  LogBinsOptions options;
  options.column_position = array_of<std::int32_t>(column_position, kFunction, "column_position");
  options.panel_size = panel_size;
  options.already_logged = already_logged;
  const CsrView csr =
      csr_of(indptr, indices, data, static_cast<std::int64_t>(options.column_position.size()), kFunction);
  LogBinsResult result;
  {
    const py::gil_scoped_release unlocked;
    result = log_bins(csr, options);
  }
  LogBinsArrays arrays;
  arrays.token_ids = adopt(std::move(result.token_ids));
  arrays.values = adopt(std::move(result.values));
  arrays.cu_seqlens = to_array(std::move(result.cu_seqlens));
  arrays.num_panel_genes = to_array(std::move(result.num_panel_genes));
  arrays.mapped_counts = to_array(std::move(result.mapped_counts));
  arrays.total_counts = to_array(std::move(result.total_counts));
  return arrays;
}

}  // namespace

void bind_log_bins(py::module_& module) {
  py::class_<LogBinsArrays>(module, "LogBinsResult", "Panel positions and bins of a block of cells.")
      .def_readonly("token_ids", &LogBinsArrays::token_ids)
      .def_readonly("values", &LogBinsArrays::values)
      .def_readonly("cu_seqlens", &LogBinsArrays::cu_seqlens)
      .def_readonly("num_panel_genes", &LogBinsArrays::num_panel_genes)
      .def_readonly("mapped_counts", &LogBinsArrays::mapped_counts)
      .def_readonly("total_counts", &LogBinsArrays::total_counts);
  module.def("log_bins", &bin_block, py::arg("indptr"), py::arg("indices"), py::arg("data"),
             py::arg("column_position"), py::arg("panel_size"), py::arg("already_logged"),
             "scBERT's bins of a CSR block.");
}

}  // namespace scfm
