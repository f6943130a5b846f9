/// The inner loops of sparse graph attention, one table per instruction set.
///
/// A task is one head of some consecutive tokens (of a span, see graph_tasks.hpp) and works on packed copies
/// of that head's rows: contiguous, widened to what the loops multiply and padded with zeros to whole
/// vectors. Gathering 64 floats from a row of 12 heads would touch a cache whose sets repeat every few rows;
/// the copy of one head of a cell of 2,000 genes fits the second-level cache, and every edge then finds its
/// row there.
#pragma once

#include <stdint.h>

namespace scfm {

inline constexpr int kMaxGraphHeadDim = 256;

/// One head of some consecutive rows of a (tokens, heads, head_dim) tensor.
struct GraphRows {
  void* data;          // float, or uint16_t holding bfloat16
  int64_t row_stride;  // in elements
  bool is_bf16;
};

/// Whom each of some consecutive tokens sees, or is seen by.
struct GraphEdges {
  const int64_t* offsets;  // num_rows + 1, into positions
  const int32_t* positions;
  int32_t origin;    // position of the first packed row
  int64_t num_rows;  // of this task
};

// Rows are worked on in blocks of this many at most, with this many scores, or a single longer row.
inline constexpr int64_t kRowsAtOnce = 512;
inline constexpr int64_t kScoresAtOnce = 16384;

/// Every row's scores begin at a multiple of the widest vector.
constexpr int64_t padded_scores(int64_t count) { return (count + 15) / 16 * 16; }
constexpr int64_t score_room(int64_t longest_row) {
  return padded_scores(longest_row) > kScoresAtOnce ? padded_scores(longest_row) : kScoresAtOnce;
}

struct GraphForwardTask {
  GraphEdges edges;
  int head_dim;
  float scale;
  GraphRows q, out;  // at the task's first row
  const void* keys;  // packed rows of the span
  const void* values;
  float* lse;  // of the task's first row and head; num_heads to the next row
  int64_t num_heads;
  float* scores;  // scratch of score_room(longest row)
};

/// dq of some rows, and delta, the sum of weight times its gradient over a row's edges. (The sum of out * dO
/// is the same, but less exact where out has been rounded to bfloat16.)
struct GraphRowGradTask {
  GraphEdges edges;
  int head_dim;
  float scale;
  GraphRows q, grad_out, dq;  // at the task's first row
  const void* keys;
  const void* values;
  const float* lse;  // of the task's first row and head; num_heads to the next row
  float* deltas;     // likewise
  int64_t num_heads;
  float* scores;  // two scratches of score_room(longest row)
  float* grads;
};

/// dk and dv of some rows, from those that see them.
struct GraphColumnGradTask {
  GraphEdges edges;
  int head_dim;
  float scale;
  GraphRows k, v, dk, dv;  // at the task's first row
  const void* queries;     // packed rows of the span
  const void* grad_outs;
  const float* lse2;    // of the span's rows, in base 2, contiguous
  const float* deltas;  // likewise
  float* scores;
  float* grads;
};

struct GraphKernels {
  /// Bytes of one packed row.
  int64_t (*packed_row_bytes)(int head_dim, bool is_bf16) noexcept;
  void (*pack)(const GraphRows& rows, int64_t num_rows, int head_dim, void* packed) noexcept;
  void (*forward)(const GraphForwardTask& task) noexcept;
  void (*row_grads)(const GraphRowGradTask& task) noexcept;
  void (*column_grads)(const GraphColumnGradTask& task) noexcept;
};

extern const GraphKernels graph_generic;
extern const GraphKernels graph_avx2;
extern const GraphKernels graph_avx512;
extern const GraphKernels graph_avx512_bf16;

/// The table of the instruction set in use.
const GraphKernels& graph_kernels();

}  // namespace scfm
