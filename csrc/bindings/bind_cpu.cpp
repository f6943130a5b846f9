/// Instruction sets and threads, as Python sees them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "base/errors.hpp"
#include "cpu/features.hpp"
#include "cpu/isa.hpp"
#include "cpu/thread_pool.hpp"

namespace py = pybind11;

namespace scfm {
namespace {

py::dict features() {
  const CpuFeatures& cpu = cpu_features();
  py::dict found;
  found["avx2"] = cpu.avx2;
  found["fma"] = cpu.fma;
  found["avx512f"] = cpu.avx512f;
  found["avx512bw"] = cpu.avx512bw;
  found["avx512vl"] = cpu.avx512vl;
  found["avx512dq"] = cpu.avx512dq;
  found["avx512_bf16"] = cpu.avx512_bf16;
  found["amx_bf16"] = cpu.amx_bf16;
  return found;
}

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (const Isa isa : available_isas()) names.emplace_back(isa_name(isa));
  return names;
}

/// Runs num_tasks empty tasks of which those listed throw: lets the tests see that a worker's exception comes
/// back.
void throw_in_tasks(std::int64_t num_tasks, const std::vector<std::int64_t>& failing) {
  const py::gil_scoped_release unlocked;
  parallel_for(num_tasks, num_threads(), [&](std::int64_t task, int) {
    for (const std::int64_t fails : failing) {
      if (task == fails) throw InvalidArgument("task " + std::to_string(task) + " failed");
    }
  });
}

/// Runs Python's signal handlers; true if one raised, and then the exception stays set for the caller.
bool interrupted() {
  if (Py_IsInitialized() == 0) return false;
  const py::gil_scoped_acquire locked;
  return PyErr_CheckSignals() != 0;
}

}  // namespace

void bind_cpu(py::module_& module) {
  set_interrupt_check(&interrupted);
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Interrupted&) {
      if (PyErr_Occurred() == nullptr) PyErr_SetNone(PyExc_KeyboardInterrupt);
    }
  });
  module.def("available_isas", &isa_names,
             "Instruction sets this build can use on this processor, plainest first.");
  module.def(
      "active_isa", [] { return std::string(isa_name(active_isa())); },
      "The instruction set in use. SCFM_ISA forces one at the first use; ValueError if it cannot run here.");
  module.def("set_isa", &set_isa, py::arg("name"),
             "Force an instruction set by name; ValueError if it cannot run.");
  module.def("cpu_features", &features, "What the processor and its operating system can run.");
  module.def("set_num_threads", &set_num_threads, py::arg("count"), "Threads for native work, 1 to 1024.");
  module.def("get_num_threads", &num_threads,
             "Threads for native work; at first what processor affinity allows.");
  module.def("_throw_in_tasks", &throw_in_tasks, py::arg("num_tasks"), py::arg("failing"),
             "For tests: run empty tasks on the pool, the listed ones raising ValueError.");
}

}  // namespace scfm
