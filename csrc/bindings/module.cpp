/// The Python module scfm._native. Three layers: checks here, work in the core, nothing of Python below this
/// folder.
#include <pybind11/pybind11.h>

namespace scfm {
void bind_cpu(pybind11::module_& module);
void bind_counts(pybind11::module_& module);
void bind_embed_norm(pybind11::module_& module);
void bind_favor(pybind11::module_& module);
void bind_graph(pybind11::module_& module);
void bind_log_bins(pybind11::module_& module);
void bind_read_depth(pybind11::module_& module);
void bind_stream(pybind11::module_& module);
void bind_tokenize(pybind11::module_& module);
void bind_value_bins(pybind11::module_& module);
void bind_varlen(pybind11::module_& module);
void bind_varlen_backward(pybind11::module_& module);
}  // namespace scfm

PYBIND11_MODULE(_native, module, pybind11::mod_gil_not_used()) {
  module.doc() =
      "scfm's C++ core. Arguments are numpy arrays, taken without copies; the GIL is released while it "
      "works.";
  scfm::bind_cpu(module);
  scfm::bind_counts(module);
  scfm::bind_embed_norm(module);
  scfm::bind_favor(module);
  scfm::bind_graph(module);
  scfm::bind_log_bins(module);
  scfm::bind_read_depth(module);
  scfm::bind_stream(module);
  scfm::bind_tokenize(module);
  scfm::bind_value_bins(module);
  scfm::bind_varlen(module);
  scfm::bind_varlen_backward(module);
}
