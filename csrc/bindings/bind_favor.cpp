/// FAVOR+ attention over numpy arrays.
#include <pybind11/pybind11.h>

#include <string>

#include "attention/favor_backward.hpp"
#include "attention/favor_forward.hpp"
#include "bindings/tensor_arguments.hpp"

namespace py = pybind11;

namespace scfm {
namespace {

FavorTensor view(const TensorArgument& tensor) {
  return {tensor.data, tensor.row_stride, tensor.head_stride};
}

FavorTensor view_like(const py::object& object, const TensorArgument& like, const char* function,
                      const char* argument, bool output = false) {
  const TensorArgument tensor = tensor_argument(object, function, argument, output);
  check_same(tensor, like, true, function, argument);
  return view(tensor);
}

FavorProblem problem_of(const TensorArgument& q, const py::object& k, const py::object& v,
                        const py::object& projection, bool given_max, const py::object& cu_seqlens,
                        double eps, const char* function) {
  FavorProblem problem{};
  problem.q = view(q);
  problem.k = view_like(k, q, function, "k");
  problem.v = view_like(v, q, function, "v");
  problem.is_bf16 = q.type == StorageType::bf16;
  problem.num_heads = q.heads;
  problem.head_dim = q.head_dim;
  problem.cu_seqlens = offsets_argument(cu_seqlens, q.rows, -1, function, "cu_seqlens");
  problem.num_cells = static_cast<std::int64_t>(py::len(cu_seqlens)) - 1;
  problem.num_features = py::isinstance<py::array>(projection) && py::len(projection.attr("shape")) == 2
                             ? projection.attr("shape")[py::int_(0)].cast<std::int64_t>()
                             : 0;
  problem.projection = float_input(projection, problem.num_features, q.head_dim, function, "projection");
  problem.given_max = given_max;
  problem.eps = static_cast<float>(eps);
  return problem;
}

void forward(const py::object& q, const py::object& k, const py::object& v, const py::object& projection,
             const py::object& out, const py::object& key_max, bool given_max, const py::object& cu_seqlens,
             double eps) {
  constexpr const char* kFunction = "favor_forward";
  const TensorArgument queries = tensor_argument(q, kFunction, "q");
  const FavorProblem problem = problem_of(queries, k, v, projection, given_max, cu_seqlens, eps, kFunction);
  const FavorTensor output = view_like(out, queries, kFunction, "out", true);
  float* maxima = given_max
                      ? const_cast<float*>(float_input(key_max, problem.num_cells, 0, kFunction, "key_max"))
                      : float_output(key_max, problem.num_cells, 0, kFunction, "key_max");
  const py::gil_scoped_release unlocked;
  favor_forward(problem, output, maxima);
}

void backward(const py::object& grad_out, const py::object& q, const py::object& k, const py::object& v,
              const py::object& projection, const py::object& dq, const py::object& dk, const py::object& dv,
              const py::object& key_max, bool given_max, const py::object& key_max_grad,
              const py::object& cu_seqlens, double eps) {
  constexpr const char* kFunction = "favor_backward";
  const TensorArgument queries = tensor_argument(q, kFunction, "q");
  const FavorProblem problem = problem_of(queries, k, v, projection, given_max, cu_seqlens, eps, kFunction);
  const FavorTensor upstream = view_like(grad_out, queries, kFunction, "grad_out");
  const FavorGradients gradients = {view_like(dq, queries, kFunction, "dq", true),
                                    view_like(dk, queries, kFunction, "dk", true),
                                    view_like(dv, queries, kFunction, "dv", true)};
  const float* maxima = float_input(key_max, problem.num_cells, 0, kFunction, "key_max");
  float* maxima_grad = float_output(key_max_grad, problem.num_cells, 0, kFunction, "key_max_grad");
  const py::gil_scoped_release unlocked;
  favor_backward(problem, upstream, gradients, maxima, maxima_grad);
}

}  // namespace

void bind_favor(py::module_& module) {
  module.def("favor_forward", &forward, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("projection"),
             py::arg("out"), py::arg("key_max"), py::arg("given_max"), py::arg("cu_seqlens"), py::arg("eps"),
             "FAVOR+ attention inside packed cells; writes out, and key_max (C,) unless it is given.");
  module.def("favor_backward", &backward, py::arg("grad_out"), py::arg("q"), py::arg("k"), py::arg("v"),
             py::arg("projection"), py::arg("dq"), py::arg("dk"), py::arg("dv"), py::arg("key_max"),
             py::arg("given_max"), py::arg("key_max_grad"), py::arg("cu_seqlens"), py::arg("eps"),
             "Its gradients; writes dq, dk, dv and key_max_grad (C,).");
}

}  // namespace scfm
