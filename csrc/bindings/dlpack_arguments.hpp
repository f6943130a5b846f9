/// Argument checks of scfm._cuda: tensors on a GPU, taken through DLPack, so that shape, strides, type and
/// device come from the tensor itself and no torch header is needed. Nothing is converted or copied.
///
/// All checks of one call belong to one DeviceArguments, which holds the tensors until it goes, and says at
/// the end which device they share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/graph_attention.hpp"

namespace scfm {

/// A tensor in some device's memory. Strides count elements.
struct DeviceArray {
  void* data;
  std::vector<std::int64_t> shape;
  std::vector<std::int64_t> strides;
  char kind;  // 'f' float, 'b' bfloat, 'i' signed, 'u' unsigned or bool
  int bits;
  int device;  // of CUDA; -1 for another kind of memory

  std::int64_t size() const;
  std::string type_name() const;
};

class DeviceArguments {
 public:
  explicit DeviceArguments(const char* function) : function_(function) {}

  /// Any tensor. Throws InvalidArgument, naming function and argument, for anything else.
  DeviceArray array(const pybind11::object& object, const char* argument);

  /// One dimension, contiguous; of this type and size unless -1.
  DeviceArray flat(const pybind11::object& object, const char* argument, char kind, int bits,
                   std::int64_t size);

  /// float32, contiguous, (rows, columns).
  float* facts(const pybind11::object& object, const char* argument, std::int64_t rows, std::int64_t columns);

  /// (tokens, heads, head_dim) as the attention kernels take it: float32, float16 or bfloat16, aligned rows.
  /// The first decides what the others must look like.
  cuda::GraphTensor heads(const pybind11::object& object, const char* argument);

  /// Of the tensors that `heads` saw.
  const cuda::GraphShape& shape() const { return shape_; }

  /// The CUDA device that all lie on; InvalidArgument if one lies elsewhere.
  int device() const;

  [[noreturn]] void fail(const std::string& message) const;

 private:
  struct Place {
    std::string argument;
    int device;
  };

  void check_aligned(const DeviceArray& tensor, const char* argument) const;

  const char* function_;
  std::vector<pybind11::object> held_;  // the capsules, each of which keeps its tensor
  std::vector<Place> places_;
  cuda::GraphShape shape_{-1, 0, 0, cuda::Storage::f32, 0.0f};
};

}  // namespace scfm
