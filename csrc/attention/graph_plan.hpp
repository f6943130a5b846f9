/// Who sees whom in a pack of cells, by a gene graph.
///
/// Token i sees every token of its cell whose gene is a neighbour of its own gene, is its own gene, or is
/// global; a global token sees its whole cell. Positions are sorted and unique for each token. The transpose
/// (by whom a token is seen) comes with it, in the same order, for the backward.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace scfm {

/// CSR over the vocabulary: gene g attends to columns[offsets[g] .. offsets[g + 1]).
struct GeneGraphView {
  std::span<const std::int64_t> offsets;  // V + 1
  std::span<const std::int32_t> columns;
  std::span<const std::uint8_t> is_global;  // V
};

/// Token ids of either width.
struct TokenIds {
  const void* data;
  bool is_64;
  std::int64_t count;

  std::int64_t operator[](std::int64_t i) const {
    return is_64 ? static_cast<const std::int64_t*>(data)[i] : static_cast<const std::int32_t*>(data)[i];
  }
};

struct GraphPlan {
  std::vector<std::int64_t> row_offsets;    // T + 1
  std::unique_ptr<std::int32_t[]> columns;  // row_offsets.back()
  std::vector<std::int64_t> col_offsets;    // T + 1
  std::unique_ptr<std::int32_t[]> rows;     // as many
};

/// cu_seqlens rises from 0 to token_ids.count. Throws InvalidArgument for an id outside the vocabulary
/// (naming the token) or a graph that is no CSR over it.
GraphPlan graph_plan(std::span<const std::int32_t> cu_seqlens, const TokenIds& token_ids,
                     const GeneGraphView& graph);

}  // namespace scfm
