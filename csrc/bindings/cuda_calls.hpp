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

/// Makes a device the current one of this thread, and the one before it again when it goes. Set even where
/// this runtime believes it is current already: torch brings a runtime of its own, which may have switched
/// since.
class OnDevice {
 public:
  OnDevice(const char* function, int device) : device_(device) {
    require(function, cudaGetDevice(&before_));
    require(function, cudaSetDevice(device));
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  ~OnDevice() {
    if (before_ != device_) static_cast<void>(cudaSetDevice(before_));
  }

 private:
  int device_;
  int before_ = 0;
};

/// stream: the address that torch.cuda.Stream.cuda_stream gives.
template <class Launch>
void call_on_device(const char* function, int device, std::uintptr_t stream, Launch&& launch) {
  const pybind11::gil_scoped_release unlocked;
  const OnDevice on_device(function, device);
  require(function, launch(reinterpret_cast<cudaStream_t>(stream)));
}

}  // namespace scfm
