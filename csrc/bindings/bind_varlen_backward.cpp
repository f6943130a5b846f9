/// Gradients of attention inside packed cells over numpy arrays.
#include <pybind11/pybind11.h>

#include "attention/varlen_backward.hpp"
#include "bindings/tensor_arguments.hpp"
#include "bindings/varlen_arguments.hpp"

namespace py = pybind11;

namespace scfm {
namespace {

void backward(const py::object& grad_out, const py::object& q, const py::object& k, const py::object& v,
              const py::object& out, const py::object& lse, const py::object& dq, const py::object& dk,
              const py::object& dv, const py::object& cu_seqlens_q, const py::object& cu_seqlens_k,
              const py::object& num_known, double scale) {
  constexpr const char* kFunction = "varlen_backward";
  const TensorArgument queries = tensor_argument(q, kFunction, "q");
  const TensorArgument keys = tensor_argument(k, kFunction, "k");
  const VarlenProblem problem =
      varlen_problem(queries, k, v, cu_seqlens_q, cu_seqlens_k, num_known, scale, kFunction);
  const VarlenTensor upstream = varlen_tensor(grad_out, queries, true, kFunction, "grad_out");
  const VarlenForwardResult result = {varlen_tensor(out, queries, true, kFunction, "out"),
                                      float_input(lse, queries.rows, queries.heads, kFunction, "lse")};
  const VarlenGradients gradients = {varlen_tensor(dq, queries, true, kFunction, "dq", true),
                                     varlen_tensor(dk, keys, true, kFunction, "dk", true),
                                     varlen_tensor(dv, keys, true, kFunction, "dv", true)};
  const py::gil_scoped_release unlocked;
  varlen_backward(problem, upstream, result, gradients);
}

}  // namespace

void bind_varlen_backward(py::module_& module) {
  module.def("varlen_backward", &backward, py::arg("grad_out"), py::arg("q"), py::arg("k"), py::arg("v"),
             py::arg("out"), py::arg("lse"), py::arg("dq"), py::arg("dk"), py::arg("dv"),
             py::arg("cu_seqlens_q"), py::arg("cu_seqlens_k"), py::arg("num_known"), py::arg("scale"),
             "Gradients of varlen_forward; writes dq, dk and dv.");
}

}  // namespace scfm
