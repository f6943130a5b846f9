/// The arguments that forward and backward of attention inside packed cells share.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

#include "attention/varlen_forward.hpp"
#include "bindings/tensor_arguments.hpp"

namespace scfm {

inline VarlenTensor varlen_tensor(const pybind11::object& object, const TensorArgument& like, bool same_rows,
                                  const char* function, const char* argument, bool output = false) {
  const TensorArgument tensor = tensor_argument(object, function, argument, output);
  check_same(tensor, like, same_rows, function, argument);
  return {tensor.data, tensor.row_stride, tensor.head_stride};
}

/// int32 (num_cells,), or null for None.
inline const std::int32_t* known_argument(const pybind11::object& object, std::int64_t num_cells,
                                          const char* function) {
  if (object.is_none()) return nullptr;
  using Counts = pybind11::array_t<std::int32_t, pybind11::array::c_style>;
  if (!pybind11::isinstance<Counts>(object) || pybind11::cast<Counts>(object).ndim() != 1 ||
      pybind11::cast<Counts>(object).size() != num_cells) {
    throw pybind11::value_error(std::string(function) + ": num_known must be a contiguous int32 array of " +
                                std::to_string(num_cells) + " counts, one a cell");
  }
  return pybind11::cast<Counts>(object).data();
}

inline VarlenProblem varlen_problem(const TensorArgument& q, const pybind11::object& k,
                                    const pybind11::object& v, const pybind11::object& cu_seqlens_q,
                                    const pybind11::object& cu_seqlens_k, const pybind11::object& num_known,
                                    double scale, const char* function) {
  VarlenProblem problem{};
  const TensorArgument keys = tensor_argument(k, function, "k");
  check_same(keys, q, false, function, "k");
  problem.q = {q.data, q.row_stride, q.head_stride};
  problem.k = {keys.data, keys.row_stride, keys.head_stride};
  problem.v = varlen_tensor(v, keys, true, function, "v");
  problem.is_bf16 = q.type == StorageType::bf16;
  problem.num_heads = q.heads;
  problem.head_dim = q.head_dim;
  problem.cu_seqlens_k = offsets_argument(cu_seqlens_k, keys.rows, -1, function, "cu_seqlens_k");
  problem.num_cells = static_cast<std::int64_t>(pybind11::len(cu_seqlens_k)) - 1;
  problem.cu_seqlens_q = offsets_argument(cu_seqlens_q, q.rows, problem.num_cells, function, "cu_seqlens_q");
  problem.num_known = known_argument(num_known, problem.num_cells, function);
  problem.scale = static_cast<float>(scale);
  return problem;
}

}  // namespace scfm
