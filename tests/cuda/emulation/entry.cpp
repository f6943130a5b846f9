/// The launchers of csrc/cuda as plain C functions for ctypes: every struct spelled out as arguments.
#include <algorithm>
#include <cstring>
#include <string>

#include "cuda/device_gene_table.hpp"
#include "cuda/graph_attention.hpp"
#include "cuda/rank_value.hpp"
#include "fibers.hpp"

using namespace scfm;
using namespace scfm::cuda;

namespace {

std::string message;

/// What became of a call: null, or the reason that it failed.
const char* verdict(cudaError_t error) {
  const char* failure = emulation::take_failure();
  if (failure != nullptr) return failure;
  if (error == cudaSuccess) return nullptr;
  message = "error " + std::to_string(static_cast<int>(error));
  return message.c_str();
}

}  // namespace

extern "C" {

void emulated_order(std::uint64_t order) { emulation::set_order(order); }

/// tensors: data, row stride and head stride of each, as integers.
const char* emulated_graph_forward(std::int64_t num_tokens, std::int64_t num_heads, int head_dim, int storage,
                                   float scale, const std::int64_t* tensors, float* lse,
                                   const std::int64_t* offsets, const std::int32_t* positions) {
  const GraphShape shape{num_tokens, num_heads, head_dim, static_cast<Storage>(storage), scale};
  const auto tensor = [&](int i) {
    return GraphTensor{reinterpret_cast<void*>(tensors[3 * i]), tensors[3 * i + 1], tensors[3 * i + 2]};
  };
  return verdict(
      graph_forward(shape, tensor(0), tensor(1), tensor(2), tensor(3), lse, {offsets, positions}, nullptr));
}

const char* emulated_graph_backward(std::int64_t num_tokens, std::int64_t num_heads, int head_dim,
                                    int storage, float scale, const std::int64_t* tensors, const float* lse,
                                    float* delta, const std::int64_t* row_offsets,
                                    const std::int32_t* columns, const std::int64_t* col_offsets,
                                    const std::int32_t* rows) {
  const GraphShape shape{num_tokens, num_heads, head_dim, static_cast<Storage>(storage), scale};
  const auto tensor = [&](int i) {
    return GraphTensor{reinterpret_cast<void*>(tensors[3 * i]), tensors[3 * i + 1], tensors[3 * i + 2]};
  };
  const GraphBackwardInputs inputs{tensor(0), tensor(1), tensor(2), tensor(3), tensor(4), lse};
  const GraphGradients gradients{tensor(5), tensor(6), tensor(7), delta};
  return verdict(
      graph_backward(shape, inputs, gradients, {row_offsets, columns}, {col_offsets, rows}, nullptr));
}

const char* emulated_check_rows(const std::int64_t* indptr, const void* columns, int column_type,
                                const void* data, int data_type, std::int64_t num_rows,
                                std::int64_t num_entries, std::int64_t num_genes, std::int64_t* found,
                                std::uint8_t* out_of_order) {
  const DeviceCsr csr{indptr,
                      columns,
                      static_cast<ColumnType>(column_type),
                      data,
                      static_cast<DataType>(data_type),
                      num_rows,
                      num_entries,
                      num_genes};
  return verdict(check_rows(csr, reinterpret_cast<RowCheck*>(found), out_of_order, nullptr));
}

const char* emulated_row_sums(const std::int64_t* indptr, const void* data, int data_type,
                              std::int64_t num_rows, double* sums) {
  const DeviceCsr csr{indptr, nullptr, ColumnType::i32, data, static_cast<DataType>(data_type), num_rows,
                      0,      0};
  return verdict(row_sums(csr, sums, nullptr));
}

std::int64_t emulated_num_long_row_blocks(std::int64_t num_rows, std::int64_t longest_row,
                                          std::int64_t num_summed) {
  return num_long_row_blocks(num_rows, longest_row, num_summed);
}

/// Writes the table's arrays, for as many columns and slots as there are; returns the arithmetic to be used.
int emulated_gene_table(const std::int32_t* column_slot, std::int64_t num_genes,
                        const std::int32_t* slot_token, const double* slot_median, std::int64_t num_slots,
                        std::int64_t num_single, int arithmetic, double* factors, std::int32_t* tokens,
                        double* summed_factors, std::int32_t* summed_offsets, std::int32_t* summed_columns) {
  const GeneSlots slots{{column_slot, static_cast<std::size_t>(num_genes)},
                        {slot_token, static_cast<std::size_t>(num_slots)},
                        {slot_median, static_cast<std::size_t>(num_slots)},
                        num_single};
  const GeneTable table = make_gene_table(slots, static_cast<RankArithmetic>(arithmetic));
  const SummedColumns summed = scfm::cuda::summed_columns(table);
  std::copy(table.factors.begin(), table.factors.end(), factors);
  std::copy(table.tokens.begin(), table.tokens.end(), tokens);
  std::copy(table.summed_factors.begin(), table.summed_factors.end(), summed_factors);
  std::copy(summed.offsets.begin(), summed.offsets.end(), summed_offsets);
  std::copy(summed.columns.begin(), summed.columns.end(), summed_columns);
  return static_cast<int>(table.arithmetic);
}

const char* emulated_rank_value(
    const std::int64_t* indptr, const void* columns, int column_type, const void* data, int data_type,
    std::int64_t num_rows, std::int64_t num_entries, const std::int64_t* checked,
    const std::uint8_t* out_of_order, const double* library_size, const double* factors,
    const std::int32_t* tokens, const double* summed_factors, const std::int32_t* summed_offsets,
    const std::int32_t* summed_columns, std::int64_t num_genes, std::int64_t num_summed, int arithmetic,
    int keep_zeros, std::int64_t max_tokens, std::int32_t prefix_token, std::int32_t suffix_token,
    std::int32_t* ordered_columns, double* ordered_values, std::int32_t* ordered_counts,
    std::uint64_t* long_keys, std::uint32_t* long_ids, std::int64_t num_blocks, std::int32_t* token_ids,
    double* counts, std::int64_t* cu_seqlens, std::int32_t* num_gene_tokens, double* mapped_counts,
    double* total_counts) {
  const DeviceCsr csr{indptr,
                      columns,
                      static_cast<ColumnType>(column_type),
                      data,
                      static_cast<DataType>(data_type),
                      num_rows,
                      num_entries,
                      num_genes};
  const DeviceGeneTable table{
      factors,        tokens,         num_genes,      num_summed,
      summed_factors, summed_offsets, summed_columns, static_cast<RankArithmetic>(arithmetic)};
  RowCheck check;
  std::memcpy(&check, checked, sizeof check);
  return verdict(rank_value(
      csr, check, out_of_order, library_size, table,
      {keep_zeros != 0, max_tokens, prefix_token, suffix_token},
      {ordered_columns, ordered_values, ordered_counts}, {long_keys, long_ids, check.longest_row, num_blocks},
      {token_ids, counts, cu_seqlens, num_gene_tokens, mapped_counts, total_counts}, nullptr));
}

}  // extern "C"
