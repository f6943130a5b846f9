/// Tokenizers and masking, as Python sees them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "base/philox.hpp"
#include "bindings/array_arguments.hpp"
#include "bindings/packed_arrays.hpp"
#include "tokenize/first_fit.hpp"
#include "tokenize/gene_values.hpp"
#include "tokenize/mlm_mask.hpp"
#include "tokenize/rank_value.hpp"

namespace py = pybind11;

namespace scfm {
namespace {

py::tuple mask(const py::object& token_ids, const py::object& cu_seqlens, const py::object& cell_ids,
               std::uint64_t seed, std::uint32_t epoch, double probability, std::int32_t mask_token,
               std::int32_t vocab_size, const std::vector<std::int32_t>& never_masked) {
  const auto tokens = array_of<std::int32_t>(token_ids, "mlm_mask", "token_ids");
  const auto offsets = array_of<std::int32_t>(cu_seqlens, "mlm_mask", "cu_seqlens");
  const auto cells = array_of<std::int64_t>(cell_ids, "mlm_mask", "cell_ids");
  py::array_t<std::int32_t> masked(static_cast<py::ssize_t>(tokens.size()));
  const std::span<std::int32_t> out(masked.mutable_data(), tokens.size());
  std::vector<std::int64_t> selected;
  {
    const py::gil_scoped_release unlocked;
    selected = mlm_mask(tokens, offsets, cells,
                        {seed, epoch, probability, mask_token, vocab_size, never_masked}, out);
  }
  return py::make_tuple(masked, to_array(std::move(selected)));
}

py::array_t<std::int64_t> place(const py::object& lengths, std::int64_t capacity) {
  const auto items = array_of<std::int64_t>(lengths, "first_fit", "lengths");
  std::vector<std::int64_t> bins(items.size());
  {
    const py::gil_scoped_release unlocked;
    first_fit(items, capacity, bins);
  }
  return to_array(std::move(bins));
}

py::array_t<std::uint64_t> values_of_genes(const py::object& indptr, const py::object& indices,
                                           const py::object& data, const py::object& column_gene,
                                           const py::object& library_size, const py::object& counted) {
  constexpr const char* kFunction = "gene_values";
  if (indices.is_none()) throw py::type_error("gene_values: indices is None, expected a numpy array");
  const auto genes = array_of<std::int32_t>(column_gene, kFunction, "column_gene");
  const CsrView csr = csr_of(indptr, indices, data, static_cast<std::int64_t>(genes.size()), kFunction);
  const auto sizes = array_of<double>(library_size, kFunction, "library_size");
  const auto rows = array_of<std::uint8_t>(counted, kFunction, "counted");
  std::vector<std::uint64_t> keys;
  {
    const py::gil_scoped_release unlocked;
    keys = gene_values(csr, genes, sizes, rows);
  }
  return to_array(std::move(keys));
}

py::tuple merge(const py::object& keys, const py::object& numbers, const py::object& more, int num_bits) {
  const auto sorted = array_of<std::uint64_t>(keys, "merge_keys", "keys");
  const auto counts = array_of<std::int64_t>(numbers, "merge_keys", "numbers");
  const auto added = array_of<std::uint64_t>(more, "merge_keys", "more");
  CountedKeys merged;
  {
    const py::gil_scoped_release unlocked;
    merged = merge_keys(sorted, counts, added, num_bits);
  }
  return py::make_tuple(to_array(std::move(merged.keys)), to_array(std::move(merged.numbers)));
}

py::array_t<std::uint32_t> philox(const py::object& counter, const py::object& key) {
  const auto c = array_of<std::uint32_t>(counter, "philox4x32", "counter");
  const auto k = array_of<std::uint32_t>(key, "philox4x32", "key");
  if (c.size() != 4 || k.size() != 2) {
    throw py::value_error("philox4x32: counter and key have " + std::to_string(c.size()) + " and " +
                          std::to_string(k.size()) + " words, expected 4 and 2");
  }
  const PhiloxCounter words = philox4x32({c[0], c[1], c[2], c[3]}, {k[0], k[1]});
  return py::array_t<std::uint32_t>(4, words.data());
}

/// RankValueResult with its arrays as numpy's, each owning its memory.
struct RankValueArrays {
  py::object token_ids, cu_seqlens, counts, num_gene_tokens, mapped_counts, total_counts;
};

RankArithmetic arithmetic_of(const std::string& name) {
  if (name == "multiply64") return RankArithmetic::multiply64;
  if (name == "multiply32") return RankArithmetic::multiply32;
  if (name == "divide64") return RankArithmetic::divide64;
  if (name == "divide32") return RankArithmetic::divide32;
  throw py::value_error("rank_value: arithmetic = \"" + name +
                        "\", expected multiply64, multiply32, divide64 or divide32");
}

RankValueArrays rank(const py::object& indptr, const py::object& indices, const py::object& data,
                     const py::object& library_size, const py::object& column_slot,
                     const py::object& slot_token, const py::object& slot_median, std::int64_t num_single,
                     const std::string& arithmetic, bool keep_zeros, std::int64_t max_tokens,
                     std::int32_t prefix_token, std::int32_t suffix_token, bool with_counts) {
  constexpr const char* kFunction = "rank_value";
  if (indices.is_none()) throw py::type_error("rank_value: indices is None, expected a numpy array");
  const auto sizes = array_of<double>(library_size, kFunction, "library_size");
  GeneSlots slots;
  slots.column_slot = array_of<std::int32_t>(column_slot, kFunction, "column_slot");
  slots.slot_token = array_of<std::int32_t>(slot_token, kFunction, "slot_token");
  slots.slot_median = array_of<double>(slot_median, kFunction, "slot_median");
  slots.num_single = num_single;
  const auto num_genes = static_cast<std::int64_t>(slots.column_slot.size());
  const CsrView csr = csr_of(indptr, indices, data, num_genes, kFunction);
  const RankValueOptions options{
      arithmetic_of(arithmetic), keep_zeros, max_tokens, prefix_token, suffix_token, with_counts};
  RankValueResult result;
  {
    const py::gil_scoped_release unlocked;
    result = rank_value(csr, sizes, slots, options);
  }
  RankValueArrays arrays;
  arrays.token_ids = adopt(std::move(result.token_ids));
  arrays.counts = with_counts ? py::object(adopt(std::move(result.counts))) : py::none();
  arrays.cu_seqlens = to_array(std::move(result.cu_seqlens));
  arrays.num_gene_tokens = to_array(std::move(result.num_gene_tokens));
  arrays.mapped_counts = to_array(std::move(result.mapped_counts));
  arrays.total_counts = to_array(std::move(result.total_counts));
  return arrays;
}

}  // namespace

void bind_tokenize(py::module_& module) {
  module.def("mlm_mask", &mask, py::arg("token_ids"), py::arg("cu_seqlens"), py::arg("cell_ids"),
             py::arg("seed"), py::arg("epoch"), py::arg("probability"), py::arg("mask_token"),
             py::arg("vocab_size"), py::arg("never_masked"),
             "BERT masking of packed tokens: (masked ids, selected positions).");
  py::class_<RankValueArrays>(module, "RankValueResult", "Packed rank-value tokens of a block of cells.")
      .def_readonly("token_ids", &RankValueArrays::token_ids)
      .def_readonly("cu_seqlens", &RankValueArrays::cu_seqlens)
      .def_readonly("counts", &RankValueArrays::counts)
      .def_readonly("num_gene_tokens", &RankValueArrays::num_gene_tokens)
      .def_readonly("mapped_counts", &RankValueArrays::mapped_counts)
      .def_readonly("total_counts", &RankValueArrays::total_counts);
  module.def("rank_value", &rank, py::arg("indptr"), py::arg("indices"), py::arg("data"),
             py::arg("library_size"), py::arg("column_slot"), py::arg("slot_token"), py::arg("slot_median"),
             py::arg("num_single"), py::arg("arithmetic"), py::arg("keep_zeros"), py::arg("max_tokens"),
             py::arg("prefix_token"), py::arg("suffix_token"), py::arg("with_counts"),
             "Geneformer's rank-value encoding of a CSR block.");
  module.def("first_fit", &place, py::arg("lengths"), py::arg("capacity"),
             "The bin of each item, placed in their order into the first bin with room.");
  module.def("gene_values", &values_of_genes, py::arg("indptr"), py::arg("indices"), py::arg("data"),
             py::arg("column_gene"), py::arg("library_size"), py::arg("counted"),
             "Keys of a block's values that sort by gene and then by CP10k value.");
  module.def("merge_keys", &merge, py::arg("keys"), py::arg("numbers"), py::arg("more"), py::arg("num_bits"),
             "Different ascending keys with their numbers, and more keys merged in.");
  module.def("philox4x32", &philox, py::arg("counter"), py::arg("key"),
             "Philox4x32-10: four words from four and two.");
}

}  // namespace scfm
