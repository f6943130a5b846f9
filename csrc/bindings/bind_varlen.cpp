/// Attention inside packed cells over numpy arrays.
#include <pybind11/pybind11.h>

#include "attention/varlen_forward.hpp"
#include "bindings/tensor_arguments.hpp"
#include "bindings/varlen_arguments.hpp"

namespace py = pybind11;

namespace scfm {
namespace {

void forward(const py::object& q, const py::object& k, const py::object& v, const py::object& out,
             const py::object& lse, const py::object& cu_seqlens_q, const py::object& cu_seqlens_k,
             const py::object& num_known, double scale) {
  constexpr const char* kFunction = "varlen_forward";
  const TensorArgument queries = tensor_argument(q, kFunction, "q");
  const VarlenProblem problem =
      varlen_problem(queries, k, v, cu_seqlens_q, cu_seqlens_k, num_known, scale, kFunction);
  const VarlenTensor output = varlen_tensor(out, queries, true, kFunction, "out", true);
  float* sums = float_output(lse, queries.rows, queries.heads, kFunction, "lse");
  const py::gil_scoped_release unlocked;
  varlen_forward(problem, output, sums);
}

}  // namespace

void bind_varlen(py::module_& module) {
  module.def(
      "varlen_forward", &forward, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("lse"),
      py::arg("cu_seqlens_q"), py::arg("cu_seqlens_k"), py::arg("num_known"), py::arg("scale"),
      "Attention inside packed cells; writes out and lse (Tq, H). num_known: scGPT's known/unknown mask.");
}

}  // namespace scfm
