/// The Python module scfm._cuda: kernels on tensors that lie on a GPU. It is linked to CUDA's static runtime
/// and so imports on any machine; without a driver it has no device, and calls raise CudaError.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include "base/errors.hpp"
#include "bindings/cuda_calls.hpp"

namespace py = pybind11;

namespace scfm {

void bind_cuda_graph(py::module_& module);
void bind_cuda_rank(py::module_& module);

namespace {

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  static_cast<void>(cudaGetLastError());
  return 0;
}

std::string device_name(int device) {
  cudaDeviceProp properties;
  require("device_name", cudaGetDeviceProperties(&properties, device));
  return properties.name;
}

py::tuple runtime_version() {
  int version = 0;
  require("runtime_version", cudaRuntimeGetVersion(&version));
  return py::make_tuple(version / 1000, version % 1000 / 10);
}

py::object cuda_error;  // the exceptions' classes; live as long as the module
py::object invalid_argument;

/// scfm's own classes, so that one `except scfm.ScfmError` catches them.
void register_errors(py::module_& module) {
  const py::module_ errors = py::module_::import("scfm.errors");
  invalid_argument = errors.attr("InvalidArgumentError");
  py::dict members;
  members["code"] = "cuda";
  members["__doc__"] = "CUDA refused a call: no driver, no memory, or an earlier kernel's fault.";
  const py::tuple bases = py::make_tuple(errors.attr("ScfmError"), py::handle(PyExc_RuntimeError));
  cuda_error = py::reinterpret_steal<py::object>(
      PyErr_NewException("scfm._cuda.CudaError", bases.ptr(), members.ptr()));
  module.attr("CudaError") = cuda_error;
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const CudaFailure& error) {
      PyErr_SetString(cuda_error.ptr(), error.what());
    } catch (const InvalidArgument& error) {
      PyErr_SetString(invalid_argument.ptr(), error.what());
    }
  });
}

}  // namespace
}  // namespace scfm

PYBIND11_MODULE(_cuda, module, py::mod_gil_not_used()) {
  module.doc() =
      "scfm's CUDA kernels. Tensors are taken through DLPack, without copies; work is queued on the stream "
      "that "
      "is passed, and calls return before it is done.";
  scfm::register_errors(module);
  module.def("device_count", &scfm::device_count, "GPUs that CUDA's runtime can use; 0 without a driver.");
  module.def("device_name", &scfm::device_name, py::arg("device"),
             "A GPU's name; CudaError if it is not there.");
  module.def("runtime_version", &scfm::runtime_version, "Of the CUDA runtime built in: (major, minor).");
  scfm::bind_cuda_graph(module);
  scfm::bind_cuda_rank(module);
}
