/// scFoundation's rows with read depths, and the thinning of counts, as Python sees them.
#include <pybind11/pybind11.h>

#include "bindings/array_arguments.hpp"
#include "bindings/packed_arrays.hpp"
#include "tokenize/read_depth.hpp"
#include "tokenize/read_depth_thinning.hpp"

namespace py = pybind11;

namespace scfm {
namespace {

[[noreturn]] void wrong_name(const char* argument, const std::string& found, const char* expected) {
  throw py::value_error(std::string("read_depth: ") + argument + " = \"" + found + "\", expected " +
                        expected);
}

DepthValues values_of(const std::string& name) {
  if (name == "per_total") return DepthValues::per_total;
  if (name == "per_median") return DepthValues::per_median;
  if (name == "given") return DepthValues::given;
  wrong_name("values", name, "per_total, per_median or given");
}

DepthTotal total_of(const std::string& name) {
  if (name == "inputs") return DepthTotal::inputs;
  if (name == "outputs") return DepthTotal::outputs;
  if (name == "listed") return DepthTotal::listed;
  wrong_name("total", name, "inputs, outputs or listed");
}

DepthTarget target_of(const std::string& name) {
  if (name == "fixed") return DepthTarget::fixed;
  if (name == "times") return DepthTarget::times;
  if (name == "plus") return DepthTarget::plus;
  if (name == "same") return DepthTarget::same;
  wrong_name("target", name, "fixed, times, plus or same");
}

/// ReadDepthResult with its arrays as numpy's, each owning its memory.
struct ReadDepthArrays {
  py::object token_ids, values, cu_seqlens, num_gene_tokens, mapped_counts, total_counts, target_depth,
      source_depth;
};

ReadDepthArrays tokenize(const py::object& indptr, const py::object& indices, const py::object& data,
                         const py::object& column_position, std::int64_t num_positions,
                         const std::string& values, const std::string& total, const py::object& totals,
                         double target_sum, bool total_is_logged, const std::string& target,
                         double target_number, bool single) {
  constexpr const char* kFunction = "read_depth";
  if (indices.is_none()) throw py::type_error("read_depth: indices is None, expected a numpy array");
  const auto positions = array_of<std::int32_t>(column_position, kFunction, "column_position");
  const CsrView csr = csr_of(indptr, indices, data, static_cast<std::int64_t>(positions.size()), kFunction);
  ReadDepthOptions options;
  options.values = values_of(values);
  options.total = total_of(total);
  if (options.total == DepthTotal::listed) options.totals = array_of<double>(totals, kFunction, "totals");
  options.target_sum = target_sum;
  options.total_is_logged = total_is_logged;
  options.target = target_of(target);
  options.target_number = target_number;
  options.single = single;
  ReadDepthResult result;
  {
    const py::gil_scoped_release unlocked;
    result = read_depth(csr, positions, num_positions, options);
  }
  ReadDepthArrays arrays;
  arrays.token_ids = adopt(std::move(result.token_ids));
  arrays.values = adopt(std::move(result.values));
  arrays.cu_seqlens = to_array(std::move(result.cu_seqlens));
  arrays.num_gene_tokens = to_array(std::move(result.num_gene_tokens));
  arrays.mapped_counts = to_array(std::move(result.mapped_counts));
  arrays.total_counts = to_array(std::move(result.total_counts));
  arrays.target_depth = to_array(std::move(result.target_depth));
  arrays.source_depth = to_array(std::move(result.source_depth));
  return arrays;
}

py::array_t<double> shares(const py::object& totals, const py::object& cell_ids, double min_total,
                           double probability, std::uint64_t seed, std::uint32_t epoch) {
  const auto sums = array_of<double>(totals, "draw_shares", "totals");
  const auto cells = array_of<std::int64_t>(cell_ids, "draw_shares", "cell_ids");
  py::array_t<double> drawn(static_cast<py::ssize_t>(sums.size()));
  draw_shares(sums, cells, min_total, probability, {seed, epoch}, {drawn.mutable_data(), sums.size()});
  return drawn;
}

py::array_t<double> thin(const py::object& indptr, const py::object& indices, const py::object& data,
                         const py::object& cell_ids, const py::object& shares, std::uint64_t seed,
                         std::uint32_t epoch) {
  constexpr const char* kFunction = "thin_counts";
  if (indices.is_none()) throw py::type_error("thin_counts: indices is None, expected a numpy array");
  const auto cells = array_of<std::int64_t>(cell_ids, kFunction, "cell_ids");
  const auto share_of = array_of<double>(shares, kFunction, "shares");
  const CsrView csr = csr_of(indptr, indices, data, 0, kFunction);
  py::array_t<double> thinned(static_cast<py::ssize_t>(csr.num_data));
  const std::span<double> out(thinned.mutable_data(), static_cast<std::size_t>(csr.num_data));
  {
    const py::gil_scoped_release unlocked;
    thin_counts(csr, cells, share_of, {seed, epoch}, out);
  }
  return thinned;
}

}  // namespace

void bind_read_depth(py::module_& module) {
  py::class_<ReadDepthArrays>(module, "ReadDepthResult", "Packed positions and values of a block of cells.")
      .def_readonly("token_ids", &ReadDepthArrays::token_ids)
      .def_readonly("values", &ReadDepthArrays::values)
      .def_readonly("cu_seqlens", &ReadDepthArrays::cu_seqlens)
      .def_readonly("num_gene_tokens", &ReadDepthArrays::num_gene_tokens)
      .def_readonly("mapped_counts", &ReadDepthArrays::mapped_counts)
      .def_readonly("total_counts", &ReadDepthArrays::total_counts)
      .def_readonly("target_depth", &ReadDepthArrays::target_depth)
      .def_readonly("source_depth", &ReadDepthArrays::source_depth);
  module.def("read_depth", &tokenize, py::arg("indptr"), py::arg("indices"), py::arg("data"),
             py::arg("column_position"), py::arg("num_positions"), py::arg("values"), py::arg("total"),
             py::arg("totals"), py::arg("target_sum"), py::arg("total_is_logged"), py::arg("target"),
             py::arg("target_number"), py::arg("single"), "scFoundation's tokens of a CSR block.");
  module.def("draw_shares", &shares, py::arg("totals"), py::arg("cell_ids"), py::arg("min_total"),
             py::arg("probability"), py::arg("seed"), py::arg("epoch"),
             "Share of each cell's counts that down-sampling keeps.");
  module.def("thin_counts", &thin, py::arg("indptr"), py::arg("indices"), py::arg("data"),
             py::arg("cell_ids"), py::arg("shares"), py::arg("seed"), py::arg("epoch"),
             "Binomial thinning of a CSR block's counts.");
}

}  // namespace scfm
