/// A plan's pairs as the kernels take them: checked, then cut into tasks.
///
/// The tokens fall into spans that share no edge: the cells of the pack, found from the plan itself. A task
/// is some rows of one or several spans, with few enough edges that one cell with global tokens does not keep
/// the others waiting, and enough that packing its spans' rows (see graph_kernels.hpp) is cheap beside them.
/// A row is summed by one task in the order of its edges, so how tasks are cut never shows in the result.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "attention/graph_kernels.hpp"

namespace scfm {

/// A tensor (tokens, heads, head_dim); strides count elements.
struct GraphTensor {
  void* data;
  bool is_bf16;
  std::int64_t row_stride;
  std::int64_t head_stride;

  /// One head's rows from `row` on.
  GraphRows rows_of(std::int64_t head, std::int64_t row) const;
};

struct GraphShape {
  std::int64_t num_tokens;
  std::int64_t num_heads;
  std::int64_t head_dim;
};

/// For each token the positions of those it sees (rows of the plan), or of those that see it (its columns).
struct GraphPairs {
  std::span<const std::int64_t> offsets;
  std::span<const std::int32_t> positions;
  const char* offsets_name;  // for messages
  const char* positions_name;
};

struct GraphTask {
  std::int64_t span_begin, span_end;  // tokens that its edges lead to
  std::int64_t row_begin, row_end;    // its own
};

/// The tasks, most edges first. Throws InvalidArgument, naming `function`, unless offsets rise from 0 to the
/// number of positions and these are in [0, num_tokens).
std::vector<GraphTask> graph_tasks(const GraphPairs& pairs, std::int64_t num_tokens, const char* function);

/// A task's edges.
GraphEdges graph_edges(const GraphPairs& pairs, const GraphTask& task);

/// Edges of the longest row of a task.
std::int64_t longest_row(const GraphPairs& pairs, const GraphTask& task);

/// Throws InvalidArgument unless head_dim is 1 to kMaxGraphHeadDim (or there is nothing to compute).
void check_graph_shape(const GraphShape& shape, const char* function);

}  // namespace scfm
