/// Codec libraries, stored arrays and row streams, as Python sees them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/array_arguments.hpp"
#include "counts/codec_libraries.hpp"
#include "counts/csr_stream.hpp"
#include "counts/stored_array.hpp"
#include "cpu/thread_pool.hpp"

namespace py = pybind11;

namespace scfm {
namespace {

DataType data_type_named(const std::string& code) {
  constexpr const char* kCodes[kNumDataTypes] = {"f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"};
  for (int i = 0; i < kNumDataTypes; ++i) {
    if (code == kCodes[i]) return static_cast<DataType>(i);
  }
  throw py::value_error("StoredArray: dtype = \"" + code + "\", expected f4, f8, i1 to i8 or u1 to u8");
}

py::dtype dtype_of(DataType type) {
  constexpr const char* kCodes[kNumDataTypes] = {"f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"};
  return py::dtype(std::string(kCodes[static_cast<int>(type)]));
}

template <class Value>
std::vector<Value> copy_of(const py::object& array, const char* argument) {
  if (array.is_none()) return {};
  const auto values = array_of<Value>(array, "StoredArray", argument);
  return {values.begin(), values.end()};
}

std::shared_ptr<StoredArray> stored_array(const std::string& name, const std::string& dtype,
                                          std::int64_t num_values, std::int64_t chunk_values,
                                          std::vector<std::string> paths, const py::object& file_of_chunk,
                                          const py::object& offsets, const py::object& sizes,
                                          const py::object& filter_masks,
                                          const std::vector<std::pair<std::string, std::int64_t>>& filters) {
  ChunkTable table;
  table.name = name;
  table.type = data_type_named(dtype);
  table.num_values = num_values;
  table.chunk_values = chunk_values;
  table.paths = std::move(paths);
  table.file_of_chunk = copy_of<std::int32_t>(file_of_chunk, "file_of_chunk");
  table.offsets = copy_of<std::int64_t>(offsets, "offsets");
  table.sizes = copy_of<std::int64_t>(sizes, "sizes");
  table.filter_masks = copy_of<std::uint32_t>(filter_masks, "filter_masks");
  for (const auto& [filter, element_size] : filters) {
    table.filters.push_back({filter_of(filter), element_size});
  }
  return std::make_shared<StoredArray>(std::move(table));
}

/// "" if the bytes decode to exactly `size` bytes, else why they do not.
std::string check_chunk(const py::bytes& stored,
                        const std::vector<std::pair<std::string, std::int64_t>>& filters,
                        std::uint32_t filter_mask, std::int64_t size) {
  if (size < 1)
    throw py::value_error("check_chunk: size = " + std::to_string(size) + ", expected at least 1");
  std::vector<FilterStep> steps;
  for (const auto& [filter, element_size] : filters) {
    if (filter == "shuffle" && element_size < 1) throw py::value_error("check_chunk: a shuffle of nothing");
    steps.push_back({filter_of(filter), element_size});
  }
  const std::string_view bytes = stored;
  const py::gil_scoped_release unlocked;
  ChunkScratch scratch;
  std::string reason;
  undo_filters(steps, filter_mask, Bytes(reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size()),
               static_cast<std::size_t>(size), scratch, reason);
  return reason;
}

/// A numpy array over pooled memory, which goes back to the pool with the array.
py::array pooled_array(const py::dtype& dtype, std::int64_t size, BufferPool::Block block) {
  if (size == 0) return py::array(dtype, std::vector<py::ssize_t>{0});
  auto* owned = new BufferPool::Block(std::move(block));
  const py::capsule owner(owned, [](void* pointer) { delete static_cast<BufferPool::Block*>(pointer); });
  return py::array(dtype, {static_cast<py::ssize_t>(size)}, {dtype.itemsize()}, owned->memory, owner);
}

class Stream {
 public:
  Stream(const std::shared_ptr<StoredArray>& data, const std::shared_ptr<StoredArray>& indices,
         py::object indptr, std::int64_t num_genes, int threads, bool validate)
      : indptr_(std::move(indptr)),
        data_type_(data->table().type),
        stream_(
            CsrStream::open(data, indices, array_of<std::int64_t>(indptr_, "CsrStream", "indptr"),
                            CsrStreamOptions{num_genes, threads > 0 ? threads : num_threads(), validate})) {}

  void submit(const py::object& rows) {
    const auto wanted = array_of<std::int64_t>(rows, "CsrStream.submit", "rows");
    const std::shared_ptr<CsrStream> stream = open_stream();
    const py::gil_scoped_release unlocked;
    stream->submit(wanted);
  }

  /// Waits without the lock, but looks for Ctrl-C twenty times a second.
  py::tuple take() {
    const std::shared_ptr<CsrStream> stream = open_stream();
    for (bool done = false; !done;) {
      {
        const py::gil_scoped_release unlocked;
        done = stream->wait(std::chrono::milliseconds(50));
      }
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    }
    CsrRows rows = stream->take();
    const std::int64_t size = rows.indptr.back();
    py::object facts = py::none();
    if (rows.sound) facts = py::cast(rows.facts);
    py::array columns = pooled_array(py::dtype::of<std::int32_t>(), size, std::move(rows.columns));
    py::array data = pooled_array(dtype_of(data_type_), size, std::move(rows.data));
    return py::make_tuple(to_array(std::move(rows.indptr)), columns, data, facts, rows.columns_in_range);
  }

  std::int64_t num_waiting() { return open_stream()->num_waiting(); }

  void close() {
    std::shared_ptr<CsrStream> stream = std::move(stream_);
    const py::gil_scoped_release unlocked;
    stream.reset();
  }

 private:
  /// Shared, so that another thread's close cannot end it under a call.
  std::shared_ptr<CsrStream> open_stream() const {
    if (!stream_) throw py::value_error("CsrStream: it is closed");
    return stream_;
  }

  py::object indptr_;
  DataType data_type_;
  std::shared_ptr<CsrStream> stream_;
};

py::object chunk_error;  // the exception's class; lives as long as the module

}  // namespace

void bind_stream(py::module_& module) {
  module.def("load_codec_library", &load_codec_library, py::arg("library"), py::arg("path"),
             "Take a decompressor's functions from the shared library at path; False if they are not there.");
  module.def("has_codec_library", &has_codec_library, py::arg("library"),
             "Whether a decompressor's functions are in use.");
  module.def("check_chunk", &check_chunk, py::arg("stored"), py::arg("filters"), py::arg("filter_mask"),
             py::arg("size"), "Why a stored chunk does not decode to exactly size bytes; empty if it does.");
  py::class_<StoredArray, std::shared_ptr<StoredArray>>(
      module, "StoredArray", "Where the chunks of a one-dimensional array lie and how they are encoded.")
      .def(py::init(&stored_array), py::arg("name"), py::arg("dtype"), py::arg("num_values"),
           py::arg("chunk_values"), py::arg("paths"), py::arg("file_of_chunk"), py::arg("offsets"),
           py::arg("sizes"), py::arg("filter_masks"), py::arg("filters"));
  py::class_<Stream>(module, "CsrStream", "Rows of a CSR matrix in files, read ahead by threads of its own.")
      .def(py::init<const std::shared_ptr<StoredArray>&, const std::shared_ptr<StoredArray>&, py::object,
                    std::int64_t, int, bool>(),
           py::arg("data"), py::arg("indices"), py::arg("indptr"), py::arg("num_genes"),
           py::arg("threads") = 0, py::arg("validate") = true)
      .def("submit", &Stream::submit, py::arg("rows"), "Queue the reading of rows (int64).")
      .def("take", &Stream::take,
           "(indptr, indices, data, facts, columns_in_range) of the oldest request, waiting for it.")
      .def("num_waiting", &Stream::num_waiting, "Requests submitted and not yet taken.")
      .def("close", &Stream::close, "Stop the threads; what was not taken is dropped.");

  chunk_error = py::reinterpret_steal<py::object>(
      PyErr_NewException("scfm._native.ChunkError", PyExc_RuntimeError, nullptr));
  module.attr("ChunkError") = chunk_error;
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const ChunkError& error) {
      const py::tuple arguments =
          py::make_tuple(error.what(), error.array, error.chunk, error.path, error.offset, error.size);
      PyErr_SetObject(chunk_error.ptr(), arguments.ptr());
    }
  });
}

}  // namespace scfm
