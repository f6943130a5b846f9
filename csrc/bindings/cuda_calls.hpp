/// How scfm._cuda calls the launchers: on the device of the tensors, the GIL released, and an error of CUDA's
/// becoming an exception of ours.
#pragma once

#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace scfm {

/// Becomes scfm._cuda.CudaError.
class CudaFailure : public std::runtime_error {
 public:
  CudaFailure(const char* function, cudaError_t error)
      : std::runtime_error(std::string(function) + ": " + cudaGetErrorString(error) + " (" +
                           cudaGetErrorName(error) + ")") {}
};

inline void require(const char* function, cudaError_t error) {
  if (error == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // so that nobody else is told of it
  throw CudaFailure(function, error);
}

/// Makes a device the current one of this thread, and the old one again when it goes.
class OnDevice {
 public:
  OnDevice(const char* function, int device) {
    require(function, cudaGetDevice(&before_));
    if (before_ == device) return;
    require(function, cudaSetDevice(device));
    changed_ = true;
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  ~OnDevice() {
    if (changed_) static_cast<void>(cudaSetDevice(before_));
  }

 private:
  int before_ = 0;
  bool changed_ = false;
};

/// stream: the address that torch.cuda.Stream.cuda_stream gives.
template <class Launch>
void call_on_device(const char* function, int device, std::uintptr_t stream, Launch&& launch) {
  const pybind11::gil_scoped_release unlocked;
  const OnDevice on_device(function, device);
  require(function, launch(reinterpret_cast<cudaStream_t>(stream)));
}

}  // namespace scfm
