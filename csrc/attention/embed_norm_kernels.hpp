/// The inner loops of embed_norm, one table per instruction set. Rows are M values of float or, as uint16_t,
/// of bfloat16, the same for all tensors of a call; everything between is float.
#pragma once

#include <stdint.h>

namespace scfm {

/// Contiguous rows of M values.
struct EmbedRows {
  void* data;  // null: none
  bool is_bf16;
};

/// One table, and which row of it every token adds.
struct EmbedTable {
  EmbedRows rows;
  const void* ids;
  bool ids_are_64;
};

/// What a token's sum x is made of, and its LayerNorm.
struct EmbedInputs {
  const EmbedTable* tables;
  int64_t num_tables;
  EmbedRows addend;
  const float* weight;  // null: the plain sum, without bias too
  const float* bias;
  int64_t size;  // M
};

struct EmbedForwardTask {
  EmbedInputs inputs;
  int64_t begin, end;  // tokens
  float eps;
  EmbedRows out;
  float* mean;
  float* rstd;
  float* scratch;  // padded_size(M)
};

/// Gradients of x, weight and bias over some tokens. inputs.weight is given.
struct EmbedBackwardTask {
  EmbedInputs inputs;
  int64_t begin, end;
  EmbedRows grad_out;
  const float* mean;
  const float* rstd;
  float* grad_sums;  // of x, a row of M for each token from origin on
  int64_t origin;
  EmbedRows grad_addend;  // a second place for them, or none
  float* grad_weight;     // of these tokens, padded_size(M)
  float* grad_bias;       // likewise
  float* scratch;         // padded_size(M)
};

/// out[i] += row[order[0]][i], then row[order[1]][i] and so on, for i in [begin, end).
struct SumRowsTask {
  EmbedRows rows;
  int64_t row_size;      // values from a row to the next
  const int64_t* order;  // null: rows 0, 1, ...
  int64_t count;
  int64_t begin, end;
  float* out;
};

/// Scratch rows end with a whole vector.
constexpr int64_t padded_size(int64_t size) { return (size + 15) / 16 * 16; }

struct EmbedNormKernels {
  void (*forward)(const EmbedForwardTask& task) noexcept;
  void (*backward)(const EmbedBackwardTask& task) noexcept;
  void (*add_rows)(const SumRowsTask& task) noexcept;
};

extern const EmbedNormKernels embed_norm_generic;
extern const EmbedNormKernels embed_norm_avx2;
extern const EmbedNormKernels embed_norm_avx512;

}  // namespace scfm
