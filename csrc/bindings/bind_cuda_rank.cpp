/// Rank-value tokenization on a GPU, as Python sees it.
#include <pybind11/pybind11.h>

#include <optional>

#include "bindings/array_arguments.hpp"
#include "bindings/cuda_calls.hpp"
#include "bindings/dlpack_arguments.hpp"
#include "cuda/device_gene_table.hpp"
#include "cuda/rank_value.hpp"

namespace py = pybind11;

namespace scfm {
namespace {

constexpr const char* kArithmetics[] = {"multiply64", "multiply32", "divide64", "divide32"};

RankArithmetic arithmetic_of(const std::string& name, const char* function) {
  for (int i = 0; i < 4; ++i) {
    if (name == kArithmetics[i]) return static_cast<RankArithmetic>(i);
  }
  throw InvalidArgument(std::string(function) + ": arithmetic = \"" + name +
                        "\", expected multiply64, multiply32, divide64 or divide32");
}

/// The gene table in arrays to be copied to a GPU, and the arithmetic that it asks for.
py::tuple gene_table(const py::object& column_slot, const py::object& slot_token,
                     const py::object& slot_median, std::int64_t num_single, const std::string& arithmetic) {
  constexpr const char* kName = "gene_table";
  const GeneSlots slots{array_of<std::int32_t>(column_slot, kName, "column_slot"),
                        array_of<std::int32_t>(slot_token, kName, "slot_token"),
                        array_of<double>(slot_median, kName, "slot_median"), num_single};
  GeneTable table = make_gene_table(slots, arithmetic_of(arithmetic, kName));
  cuda::SummedColumns summed = cuda::summed_columns(table);
  return py::make_tuple(to_array(std::move(table.factors)), to_array(std::move(table.tokens)),
                        to_array(std::move(table.summed_factors)), to_array(std::move(summed.offsets)),
                        to_array(std::move(summed.columns)),
                        kArithmetics[static_cast<int>(table.arithmetic)]);
}

DataType data_type_of(const DeviceArguments& arguments, const DeviceArray& data) {
  const std::string name = data.type_name();
  constexpr const char* kNames[] = {"float32", "float64", "int8",   "int16",  "int32",
                                    "int64",   "uint8",   "uint16", "uint32", "uint64"};
  for (int i = 0; i < kNumDataTypes; ++i) {
    if (name == kNames[i]) return static_cast<DataType>(i);
  }
  arguments.fail("data is " + name + ", expected float32, float64 or an integer type");
}

DeviceArray flat_of_any_type(DeviceArguments& arguments, const py::object& object, const char* argument,
                             std::int64_t size) {
  const DeviceArray found = arguments.array(object, argument);
  return arguments.flat(object, argument, found.kind, found.bits, size);
}

cuda::DeviceCsr csr_of(DeviceArguments& arguments, const py::object& indptr, const py::object& indices,
                       const py::object& data, std::int64_t num_genes) {
  const DeviceArray offsets = arguments.flat(indptr, "indptr", 'i', 64, -1);
  if (offsets.shape[0] < 1) arguments.fail("indptr is empty, expected num_cells + 1 entries");
  const DeviceArray values = flat_of_any_type(arguments, data, "data", -1);
  const std::int64_t num_entries = values.shape[0];
  DeviceArray columns{};
  if (!indices.is_none()) columns = flat_of_any_type(arguments, indices, "indices", num_entries);
  if (!indices.is_none() && (columns.kind != 'i' || (columns.bits != 32 && columns.bits != 64))) {
    arguments.fail("indices is " + columns.type_name() + ", expected int32 or int64");
  }
  return {static_cast<const std::int64_t*>(offsets.data),
          columns.data,
          columns.bits == 64 ? ColumnType::i64 : ColumnType::i32,
          values.data,
          data_type_of(arguments, values),
          offsets.shape[0] - 1,
          num_entries,
          num_genes};
}

void check_rows(const py::object& indptr, const py::object& indices, const py::object& data,
                std::int64_t num_genes, const py::object& found, const py::object& out_of_order,
                std::uintptr_t stream) {
  constexpr const char* kName = "check_rows";
  DeviceArguments arguments(kName);
  const cuda::DeviceCsr csr = csr_of(arguments, indptr, indices, data, num_genes);
  auto* check = static_cast<cuda::RowCheck*>(arguments.flat(found, "found", 'i', 64, 4).data);
  auto* flags =
      static_cast<std::uint8_t*>(arguments.flat(out_of_order, "out_of_order", 'u', 8, csr.num_rows).data);
  call_on_device(kName, arguments.device(), stream,
                 [&](cudaStream_t queue) { return cuda::check_rows(csr, check, flags, queue); });
}

void row_sums(const py::object& indptr, const py::object& data, const py::object& sums,
              std::uintptr_t stream) {
  constexpr const char* kName = "row_sums";
  DeviceArguments arguments(kName);
  const cuda::DeviceCsr csr = csr_of(arguments, indptr, py::none(), data, 0);
  auto* to = static_cast<double*>(arguments.flat(sums, "sums", 'f', 64, csr.num_rows).data);
  call_on_device(kName, arguments.device(), stream,
                 [&](cudaStream_t queue) { return cuda::row_sums(csr, to, queue); });
}

template <class Value>
Value* flat(DeviceArguments& arguments, const py::handle& object, const char* argument, std::int64_t size) {
  constexpr char kKind = std::is_floating_point_v<Value> ? 'f' : std::is_signed_v<Value> ? 'i' : 'u';
  const auto held = py::reinterpret_borrow<py::object>(object);
  return static_cast<Value*>(arguments.flat(held, argument, kKind, sizeof(Value) * 8, size).data);
}

/// A tuple's parts, by number; InvalidArgument unless there are so many.
void require_parts(const DeviceArguments& arguments, const py::tuple& parts, std::size_t count,
                   const char* name) {
  if (parts.size() == count) return;
  arguments.fail(std::string(name) + " has " + std::to_string(parts.size()) + " parts, expected " +
                 std::to_string(count));
}

cuda::DeviceGeneTable table_of(DeviceArguments& arguments, const py::tuple& parts,
                               const std::string& arithmetic) {
  require_parts(arguments, parts, 5, "table");
  const std::int64_t num_genes =
      arguments.flat(py::reinterpret_borrow<py::object>(parts[0]), "factors", 'f', 64, -1).shape[0];
  const std::int64_t num_summed =
      arguments.flat(py::reinterpret_borrow<py::object>(parts[2]), "summed_factors", 'f', 64, -1).shape[0];
  return {flat<double>(arguments, parts[0], "factors", num_genes),
          flat<std::int32_t>(arguments, parts[1], "tokens", num_genes + num_summed),
          num_genes,
          num_summed,
          flat<double>(arguments, parts[2], "summed_factors", num_summed),
          flat<std::int32_t>(arguments, parts[3], "summed_offsets", num_summed + 1),
          flat<std::int32_t>(arguments, parts[4], "summed_columns", -1),
          arithmetic_of(arithmetic, "rank_value")};
}

struct Room {
  cuda::OrderedRows ordered;
  cuda::LongRows long_rows;
};

Room room_of(DeviceArguments& arguments, const py::tuple& parts, const cuda::DeviceCsr& csr,
             const cuda::RowCheck& checked, std::int64_t num_summed) {
  require_parts(arguments, parts, 5, "room");
  Room room{};
  if (checked.num_unsorted > 0) {
    room.ordered = {flat<std::int32_t>(arguments, parts[0], "ordered_columns", csr.num_entries),
                    flat<double>(arguments, parts[1], "ordered_values", csr.num_entries),
                    flat<std::int32_t>(arguments, parts[2], "ordered_counts", csr.num_rows)};
  }
  room.long_rows.longest_row = checked.longest_row;
  room.long_rows.num_blocks = cuda::num_long_row_blocks(csr.num_rows, checked.longest_row, num_summed);
  if (room.long_rows.num_blocks > 0) {
    const std::int64_t size = room.long_rows.num_blocks * checked.longest_row;
    room.long_rows.keys =
        reinterpret_cast<std::uint64_t*>(flat<std::int64_t>(arguments, parts[3], "long_keys", size));
    room.long_rows.ids =
        reinterpret_cast<std::uint32_t*>(flat<std::int32_t>(arguments, parts[4], "long_ids", size));
  }
  return room;
}

/// As many tokens as there can be.
std::int64_t capacity(std::int64_t num_rows, std::int64_t num_entries, std::int64_t max_tokens,
                      std::int32_t prefix_token, std::int32_t suffix_token) {
  const std::int64_t specials = (prefix_token >= 0 ? 1 : 0) + (suffix_token >= 0 ? 1 : 0);
  const std::int64_t uncut = num_entries + num_rows * specials;
  if (max_tokens < 0 || (num_rows > 0 && max_tokens > uncut / num_rows)) return uncut;
  return num_rows * max_tokens < uncut ? num_rows * max_tokens : uncut;
}

cuda::RankResult result_of(DeviceArguments& arguments, const py::tuple& parts, std::int64_t num_rows,
                           std::int64_t num_tokens) {
  require_parts(arguments, parts, 6, "result");
  return {flat<std::int32_t>(arguments, parts[0], "token_ids", num_tokens),
          parts[1].is_none() ? nullptr : flat<double>(arguments, parts[1], "counts", num_tokens),
          flat<std::int64_t>(arguments, parts[2], "cu_seqlens", num_rows + 1),
          flat<std::int32_t>(arguments, parts[3], "num_gene_tokens", num_rows),
          flat<double>(arguments, parts[4], "mapped_counts", num_rows),
          flat<double>(arguments, parts[5], "total_counts", num_rows)};
}

/// checked: what check_rows found, read back. It and the table are trusted.
void rank(const py::object& indptr, const py::object& indices, const py::object& data,
          const py::tuple& checked, const py::object& out_of_order, const py::object& library_size,
          const py::tuple& table, const std::string& arithmetic, bool keep_zeros, std::int64_t max_tokens,
          std::int32_t prefix_token, std::int32_t suffix_token, const py::tuple& room,
          const py::tuple& result, std::uintptr_t stream) {
  constexpr const char* kName = "rank_value";
  DeviceArguments arguments(kName);
  require_parts(arguments, checked, 4, "checked");
  const cuda::RowCheck check{checked[0].cast<std::int64_t>(), checked[1].cast<std::int64_t>(),
                             checked[2].cast<std::int64_t>(), checked[3].cast<std::int64_t>()};
  if (check.bad_offset != -1 || check.bad_entry != -1) arguments.fail("checked names a fault, expected none");
  if (check.longest_row > 0x7FFFFFFF) {
    arguments.fail("a row has " + std::to_string(check.longest_row) + " entries, more than 2^31 - 1");
  }
  const cuda::DeviceRankOptions options{keep_zeros, max_tokens, prefix_token, suffix_token};
  const std::int64_t specials = (prefix_token >= 0 ? 1 : 0) + (suffix_token >= 0 ? 1 : 0);
  if (max_tokens != -1 && max_tokens <= specials) {
    arguments.fail("max_tokens = " + std::to_string(max_tokens) + ", expected -1 or more than the " +
                   std::to_string(specials) + " special tokens");
  }
  const cuda::DeviceGeneTable genes = table_of(arguments, table, arithmetic);
  const cuda::DeviceCsr csr = csr_of(arguments, indptr, indices, data, genes.num_genes);
  const auto* flags = flat<std::uint8_t>(arguments, out_of_order, "out_of_order", csr.num_rows);
  const auto* sizes = flat<double>(arguments, library_size, "library_size", csr.num_rows);
  const Room rooms = room_of(arguments, room, csr, check, genes.num_summed);
  const cuda::RankResult to =
      result_of(arguments, result, csr.num_rows,
                capacity(csr.num_rows, csr.num_entries, max_tokens, prefix_token, suffix_token));
  call_on_device(kName, arguments.device(), stream, [&](cudaStream_t queue) {
    return cuda::rank_value(csr, check, flags, sizes, genes, options, rooms.ordered, rooms.long_rows, to,
                            queue);
  });
}

}  // namespace

void bind_cuda_rank(py::module_& module) {
  using py::arg;
  module.def("gene_table", &gene_table, arg("column_slot"), arg("slot_token"), arg("slot_median"),
             arg("num_single"), arg("arithmetic"),
             "(factors, tokens, summed_factors, summed_offsets, summed_columns, arithmetic), on the host.");
  module.def("check_rows", &check_rows, arg("indptr"), arg("indices"), arg("data"), arg("num_genes"),
             arg("found"), arg("out_of_order"), arg("stream"));
  module.def("row_sums", &row_sums, arg("indptr"), arg("data"), arg("sums"), arg("stream"));
  module.def("num_long_row_blocks", &cuda::num_long_row_blocks, arg("num_rows"), arg("longest_row"),
             arg("num_summed"), "How many rows at once must have room outside shared memory.");
  module.def("num_tokens_at_most", &capacity, arg("num_rows"), arg("num_entries"), arg("max_tokens"),
             arg("prefix_token"), arg("suffix_token"), "The size of token_ids that rank_value asks for.");
  module.def("rank_value", &rank, arg("indptr"), arg("indices"), arg("data"), arg("checked"),
             arg("out_of_order"), arg("library_size"), arg("table"), arg("arithmetic"), arg("keep_zeros"),
             arg("max_tokens"), arg("prefix_token"), arg("suffix_token"), arg("room"), arg("result"),
             arg("stream"));
}

}  // namespace scfm
