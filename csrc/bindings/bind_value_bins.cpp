/// scGPT's value binning, as Python sees it.
#include <pybind11/pybind11.h>

#include "bindings/array_arguments.hpp"
#include "bindings/packed_arrays.hpp"
#include "tokenize/value_bins.hpp"
#include "tokenize/value_bins_arrays.hpp"

namespace py = pybind11;

namespace scfm {
namespace {

BinRule rule_of(const std::string& name, const char* function) {
  if (name == "left") return BinRule::left;
  if (name == "seeded") return BinRule::seeded;
  if (name == "given") return BinRule::given;
  throw py::value_error(std::string(function) + ": rule = \"" + name + "\", expected left, seeded or given");
}

KeptTokens kept_of(const std::string& name) {
  if (name == "any") return KeptTokens::any;
  if (name == "largest") return KeptTokens::largest;
  throw py::value_error("value_bins: kept = \"" + name + "\", expected any or largest");
}

/// ValueBinsResult with its arrays as numpy's, each owning its memory.
struct ValueBinsArrays {
  py::object token_ids, values, cu_seqlens, num_gene_tokens, mapped_counts, total_counts;
};

ValueBinsArrays bin_block(const py::object& indptr, const py::object& indices, const py::object& data,
                          const py::object& column_slot, const py::object& slot_token,
                          const py::object& quantiles, const std::string& rule, const py::object& draws,
                          const py::object& draw_offsets, const std::string& kept, std::int64_t max_tokens,
                          std::int32_t prefix_token, float prefix_value, bool with_zeros, std::uint64_t seed,
                          std::uint32_t epoch) {
  constexpr const char* kFunction = "value_bins";
  if (indices.is_none()) throw py::type_error("value_bins: indices is None, expected a numpy array");
  TokenSlots slots;
  slots.column_slot = array_of<std::int32_t>(column_slot, kFunction, "column_slot");
  slots.slot_token = array_of<std::int32_t>(slot_token, kFunction, "slot_token");
  const CsrView csr =
      csr_of(indptr, indices, data, static_cast<std::int64_t>(slots.column_slot.size()), kFunction);
  ValueBinsOptions options;
  options.quantiles = array_of<double>(quantiles, kFunction, "quantiles");
  options.rule = rule_of(rule, kFunction);
  if (options.rule == BinRule::given) {
    options.draws = array_of<double>(draws, kFunction, "draws");
    options.draw_offsets = array_of<std::int64_t>(draw_offsets, kFunction, "draw_offsets");
  }
  options.kept = kept_of(kept);
  options.max_tokens = max_tokens;
  options.prefix_token = prefix_token;
  options.prefix_value = prefix_value;
  options.with_zeros = with_zeros;
  options.key = {seed, epoch};
  ValueBinsResult result;
  {
    const py::gil_scoped_release unlocked;
    result = value_bins(csr, slots, options);
  }
  ValueBinsArrays arrays;
  arrays.token_ids = adopt(std::move(result.token_ids));
  arrays.values = adopt(std::move(result.values));
  arrays.cu_seqlens = to_array(std::move(result.cu_seqlens));
  arrays.num_gene_tokens = to_array(std::move(result.num_gene_tokens));
  arrays.mapped_counts = to_array(std::move(result.mapped_counts));
  arrays.total_counts = to_array(std::move(result.total_counts));
  return arrays;
}

PackedValues packed_of(const py::object& values, const py::object& offsets, const py::object& token_ids,
                       const char* function) {
  PackedValues packed;
  packed.offsets = array_of<std::int64_t>(offsets, function, "offsets");
  const CsrView view = csr_of(offsets, py::none(), values, 0, function);
  packed.type = view.data_type;
  packed.values = view.data;
  packed.num_values = view.num_data;
  if (!token_ids.is_none()) packed.token_ids = array_of<std::int32_t>(token_ids, function, "token_ids");
  return packed;
}

py::array_t<std::int32_t> bin_arrays(const py::object& values, const py::object& offsets,
                                     const py::object& token_ids, const py::object& quantiles,
                                     const std::string& rule, const py::object& draws, std::uint64_t seed,
                                     std::uint32_t epoch) {
  constexpr const char* kFunction = "bin_values";
  const PackedValues packed = packed_of(values, offsets, token_ids, kFunction);
  const auto edges = array_of<double>(quantiles, kFunction, "quantiles");
  const BinRule bin_rule = rule_of(rule, kFunction);
  std::span<const double> given;
  if (bin_rule == BinRule::given) given = array_of<double>(draws, kFunction, "draws");
  py::array_t<std::int32_t> bins(packed.num_values);
  const std::span<std::int32_t> out(bins.mutable_data(), static_cast<std::size_t>(packed.num_values));
  const py::gil_scoped_release unlocked;
  bin_values(packed, edges, bin_rule, {seed, epoch}, given, out);
  return bins;
}

py::tuple edges_of(const py::object& values, const py::object& offsets, const py::object& quantiles) {
  constexpr const char* kFunction = "value_edges";
  const PackedValues packed = packed_of(values, offsets, py::none(), kFunction);
  const auto of = array_of<double>(quantiles, kFunction, "quantiles");
  const auto num_cells = static_cast<py::ssize_t>(packed.offsets.empty() ? 0 : packed.offsets.size() - 1);
  const auto num_values = static_cast<std::size_t>(packed.num_values);
  py::array_t<double> edges({num_cells, static_cast<py::ssize_t>(of.size())});
  py::array_t<std::int32_t> left(packed.num_values);
  py::array_t<std::int32_t> right(packed.num_values);
  const std::span<double> edges_out(edges.mutable_data(), static_cast<std::size_t>(edges.size()));
  const std::span<std::int32_t> left_out(left.mutable_data(), num_values);
  const std::span<std::int32_t> right_out(right.mutable_data(), num_values);
  {
    const py::gil_scoped_release unlocked;
    value_edges(packed, of, edges_out, left_out, right_out);
  }
  return py::make_tuple(edges, left, right);
}

py::array_t<std::uint8_t> choose(const py::object& cu_seqlens, const py::object& cell_ids,
                                 const py::object& num_chosen, std::int64_t num_spared, std::uint64_t seed,
                                 std::uint32_t epoch, std::uint32_t purpose) {
  constexpr const char* kFunction = "choose_tokens";
  const auto offsets = array_of<std::int32_t>(cu_seqlens, kFunction, "cu_seqlens");
  const auto cells = array_of<std::int64_t>(cell_ids, kFunction, "cell_ids");
  const auto numbers = array_of<std::int32_t>(num_chosen, kFunction, "num_chosen");
  const std::int32_t num_tokens = offsets.empty() || offsets.back() < 0 ? 0 : offsets.back();
  py::array_t<std::uint8_t> chosen(num_tokens);
  const std::span<std::uint8_t> out(chosen.mutable_data(), static_cast<std::size_t>(num_tokens));
  const py::gil_scoped_release unlocked;
  choose_tokens(offsets, cells, numbers, num_spared, {seed, epoch}, purpose, out);
  return chosen;
}

}  // namespace

void bind_value_bins(py::module_& module) {
  py::class_<ValueBinsArrays>(module, "ValueBinsResult", "Packed tokens and bins of a block of cells.")
      .def_readonly("token_ids", &ValueBinsArrays::token_ids)
      .def_readonly("values", &ValueBinsArrays::values)
      .def_readonly("cu_seqlens", &ValueBinsArrays::cu_seqlens)
      .def_readonly("num_gene_tokens", &ValueBinsArrays::num_gene_tokens)
      .def_readonly("mapped_counts", &ValueBinsArrays::mapped_counts)
      .def_readonly("total_counts", &ValueBinsArrays::total_counts);
  module.def("value_bins", &bin_block, py::arg("indptr"), py::arg("indices"), py::arg("data"),
             py::arg("column_slot"), py::arg("slot_token"), py::arg("quantiles"), py::arg("rule"),
             py::arg("draws"), py::arg("draw_offsets"), py::arg("kept"), py::arg("max_tokens"),
             py::arg("prefix_token"), py::arg("prefix_value"), py::arg("with_zeros"), py::arg("seed"),
             py::arg("epoch"), "scGPT's value binning of a CSR block.");
  module.def("bin_values", &bin_arrays, py::arg("values"), py::arg("offsets"), py::arg("token_ids"),
             py::arg("quantiles"), py::arg("rule"), py::arg("draws"), py::arg("seed"), py::arg("epoch"),
             "Bins of packed values, cell by cell.");
  module.def("value_edges", &edges_of, py::arg("values"), py::arg("offsets"), py::arg("quantiles"),
             "Each cell's quantile edges, and how many of them are <= and < each value.");
  module.def("choose_tokens", &choose, py::arg("cu_seqlens"), py::arg("cell_ids"), py::arg("num_chosen"),
             py::arg("num_spared"), py::arg("seed"), py::arg("epoch"), py::arg("purpose"),
             "A given number of each cell's tokens, at random.");
}

}  // namespace scfm
