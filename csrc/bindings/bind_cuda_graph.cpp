/// Sparse graph attention on a GPU, as Python sees it.
#include <pybind11/pybind11.h>

#include "bindings/cuda_calls.hpp"
#include "bindings/dlpack_arguments.hpp"
#include "cuda/graph_attention.hpp"

namespace py = pybind11;

namespace scfm {
namespace {

/// Offsets and positions of a plan. What they say is the operator's to check: reading them back costs a wait.
cuda::GraphPairs pairs(DeviceArguments& arguments, const py::object& offsets, const py::object& positions,
                       const char* offsets_name, const char* positions_name) {
  const auto of_rows = arguments.flat(offsets, offsets_name, 'i', 64, arguments.shape().num_tokens + 1);
  const auto of_edges = arguments.flat(positions, positions_name, 'i', 32, -1);
  return {static_cast<const std::int64_t*>(of_rows.data), static_cast<const std::int32_t*>(of_edges.data)};
}

cuda::GraphShape scaled(const DeviceArguments& arguments, float scale) {
  cuda::GraphShape shape = arguments.shape();
  shape.scale = scale;
  return shape;
}

void forward(const py::object& q, const py::object& k, const py::object& v, const py::object& out,
             const py::object& lse, const py::object& row_offsets, const py::object& columns, float scale,
             std::uintptr_t stream) {
  constexpr const char* kName = "graph_forward";
  DeviceArguments arguments(kName);
  const cuda::GraphTensor queries = arguments.heads(q, "q");
  const cuda::GraphTensor keys = arguments.heads(k, "k");
  const cuda::GraphTensor values = arguments.heads(v, "v");
  const cuda::GraphTensor output = arguments.heads(out, "out");
  const cuda::GraphShape shape = scaled(arguments, scale);
  float* sums = arguments.facts(lse, "lse", shape.num_tokens, shape.num_heads);
  const cuda::GraphPairs rows = pairs(arguments, row_offsets, columns, "row_offsets", "columns");
  call_on_device(kName, arguments.device(), stream, [&](cudaStream_t queue) {
    return cuda::graph_forward(shape, queries, keys, values, output, sums, rows, queue);
  });
}

void backward(const py::object& grad_out, const py::object& q, const py::object& k, const py::object& v,
              const py::object& out, const py::object& lse, const py::object& delta, const py::object& dq,
              const py::object& dk, const py::object& dv, const py::object& row_offsets,
              const py::object& columns, const py::object& col_offsets, const py::object& rows, float scale,
              std::uintptr_t stream) {
  constexpr const char* kName = "graph_backward";
  DeviceArguments arguments(kName);
  cuda::GraphBackwardInputs inputs{};
  inputs.q = arguments.heads(q, "q");
  inputs.k = arguments.heads(k, "k");
  inputs.v = arguments.heads(v, "v");
  inputs.grad_out = arguments.heads(grad_out, "grad_out");
  inputs.out = arguments.heads(out, "out");
  cuda::GraphGradients gradients{};
  gradients.dq = arguments.heads(dq, "dq");
  gradients.dk = arguments.heads(dk, "dk");
  gradients.dv = arguments.heads(dv, "dv");
  const cuda::GraphShape shape = scaled(arguments, scale);
  inputs.lse = arguments.facts(lse, "lse", shape.num_tokens, shape.num_heads);
  gradients.delta = arguments.facts(delta, "delta", shape.num_tokens, shape.num_heads);
  const cuda::GraphPairs by_row = pairs(arguments, row_offsets, columns, "row_offsets", "columns");
  const cuda::GraphPairs by_column = pairs(arguments, col_offsets, rows, "col_offsets", "rows");
  call_on_device(kName, arguments.device(), stream, [&](cudaStream_t queue) {
    return cuda::graph_backward(shape, inputs, gradients, by_row, by_column, queue);
  });
}

}  // namespace

void bind_cuda_graph(py::module_& module) {
  using py::arg;
  module.def("graph_forward", &forward, arg("q"), arg("k"), arg("v"), arg("out"), arg("lse"),
             arg("row_offsets"), arg("columns"), arg("scale"), arg("stream"));
  module.def("graph_backward", &backward, arg("grad_out"), arg("q"), arg("k"), arg("v"), arg("out"),
             arg("lse"), arg("delta"), arg("dq"), arg("dk"), arg("dv"), arg("row_offsets"), arg("columns"),
             arg("col_offsets"), arg("rows"), arg("scale"), arg("stream"));
}

}  // namespace scfm
