/// Sparse graph attention, as Python sees it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>

#include "attention/graph_backward.hpp"
#include "attention/graph_forward.hpp"
#include "attention/graph_plan.hpp"
#include "bindings/array_arguments.hpp"
#include "bindings/tensor_arguments.hpp"

namespace py = pybind11;

namespace scfm {
namespace {

TokenIds token_ids_of(const py::object& object) {
  const py::array ids = flat_array(object, "graph_plan", "token_ids");
  const auto size = ids.dtype().itemsize();
  if (ids.dtype().kind() != 'i' || (size != 4 && size != 8)) {
    wrong_dtype(ids, "graph_plan", "token_ids", "int32 or int64");
  }
  return {ids.data(), size == 8, ids.size()};
}

std::span<const std::uint8_t> flags_of(const py::object& object) {
  const py::array flags = flat_array(object, "graph_plan", "is_global");
  const char kind = flags.dtype().kind();
  if ((kind != 'b' && kind != 'u') || flags.dtype().itemsize() != 1) {
    wrong_dtype(flags, "graph_plan", "is_global", "bool or uint8");
  }
  return {static_cast<const std::uint8_t*>(flags.data()), static_cast<std::size_t>(flags.size())};
}

py::array_t<std::int32_t> adopt(std::unique_ptr<std::int32_t[]> values, std::int64_t size) {
  std::int32_t* memory = values.release();
  const py::capsule owner(memory, [](void* pointer) { delete[] static_cast<std::int32_t*>(pointer); });
  return py::array_t<std::int32_t>(static_cast<py::ssize_t>(size), memory, owner);
}

py::tuple plan(const py::object& cu_seqlens, const py::object& token_ids, const py::object& gene_offsets,
               const py::object& gene_columns, const py::object& is_global) {
  const TokenIds ids = token_ids_of(token_ids);
  offsets_argument(cu_seqlens, ids.count, -1, "graph_plan", "cu_seqlens");
  const auto offsets = array_of<std::int32_t>(cu_seqlens, "graph_plan", "cu_seqlens");
  const GeneGraphView graph{array_of<std::int64_t>(gene_offsets, "graph_plan", "gene_offsets"),
                            array_of<std::int32_t>(gene_columns, "graph_plan", "gene_columns"),
                            flags_of(is_global)};
  GraphPlan made;
  {
    const py::gil_scoped_release unlocked;
    made = graph_plan(offsets, ids, graph);
  }
  const std::int64_t num_edges = made.row_offsets.back();
  return py::make_tuple(to_array(std::move(made.row_offsets)), adopt(std::move(made.columns), num_edges),
                        to_array(std::move(made.col_offsets)), adopt(std::move(made.rows), num_edges));
}

GraphTensor graph_tensor(const TensorArgument& tensor) {
  return {tensor.data, tensor.type == StorageType::bf16, tensor.row_stride, tensor.head_stride};
}

GraphTensor tensor_like(const py::object& object, const TensorArgument& like, const char* function,
                        const char* argument, bool output = false) {
  const TensorArgument tensor = tensor_argument(object, function, argument, output);
  check_same(tensor, like, true, function, argument);
  return graph_tensor(tensor);
}

GraphShape shape_of(const TensorArgument& tensor) { return {tensor.rows, tensor.heads, tensor.head_dim}; }

GraphPairs pairs_of(const py::object& offsets, const py::object& positions, const char* function,
                    const char* offsets_name, const char* positions_name) {
  return {array_of<std::int64_t>(offsets, function, offsets_name),
          array_of<std::int32_t>(positions, function, positions_name), offsets_name, positions_name};
}

void forward(const py::object& q, const py::object& k, const py::object& v, const py::object& out,
             const py::object& lse, const py::object& row_offsets, const py::object& columns, float scale) {
  constexpr const char* kName = "graph_forward";
  const TensorArgument first = tensor_argument(q, kName, "q");
  const GraphTensor keys = tensor_like(k, first, kName, "k");
  const GraphTensor values = tensor_like(v, first, kName, "v");
  const GraphTensor output = tensor_like(out, first, kName, "out", true);
  float* sums = float_output(lse, first.rows, first.heads, kName, "lse");
  const GraphPairs rows = pairs_of(row_offsets, columns, kName, "row_offsets", "columns");
  const py::gil_scoped_release unlocked;
  graph_forward(shape_of(first), graph_tensor(first), keys, values, output, sums, rows, scale);
}

void backward(const py::object& grad_out, const py::object& q, const py::object& k, const py::object& v,
              const py::object& out, const py::object& lse, const py::object& dq, const py::object& dk,
              const py::object& dv, const py::object& row_offsets, const py::object& columns,
              const py::object& col_offsets, const py::object& rows, float scale) {
  constexpr const char* kName = "graph_backward";
  const TensorArgument first = tensor_argument(q, kName, "q");
  const GraphInputs inputs{.grad_out = tensor_like(grad_out, first, kName, "grad_out"),
                           .q = graph_tensor(first),
                           .k = tensor_like(k, first, kName, "k"),
                           .v = tensor_like(v, first, kName, "v"),
                           .lse = float_input(lse, first.rows, first.heads, kName, "lse")};
  tensor_like(out, first, kName, "out");  // by its shape only: see GraphRowGradTask
  const GraphTensor q_grads = tensor_like(dq, first, kName, "dq", true);
  const GraphTensor k_grads = tensor_like(dk, first, kName, "dk", true);
  const GraphTensor v_grads = tensor_like(dv, first, kName, "dv", true);
  const GraphPairs by_row = pairs_of(row_offsets, columns, kName, "row_offsets", "columns");
  const GraphPairs by_column = pairs_of(col_offsets, rows, kName, "col_offsets", "rows");
  const py::gil_scoped_release unlocked;
  graph_backward(shape_of(first), inputs, q_grads, k_grads, v_grads, by_row, by_column, scale);
}

}  // namespace

void bind_graph(py::module_& module) {
  using py::arg;
  module.def("graph_plan", &plan, arg("cu_seqlens"), arg("token_ids"), arg("gene_offsets"),
             arg("gene_columns"), arg("is_global"));
  module.def("graph_forward", &forward, arg("q"), arg("k"), arg("v"), arg("out"), arg("lse"),
             arg("row_offsets"), arg("columns"), arg("scale"));
  module.def("graph_backward", &backward, arg("grad_out"), arg("q"), arg("k"), arg("v"), arg("out"),
             arg("lse"), arg("dq"), arg("dk"), arg("dv"), arg("row_offsets"), arg("columns"),
             arg("col_offsets"), arg("rows"), arg("scale"));
}

}  // namespace scfm
