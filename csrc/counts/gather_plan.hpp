/// Which pieces of which chunks make up the requested rows, and where each goes.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace scfm {

/// Values [from, from + count) of a chunk go to position `to` of the block.
struct Piece {
  std::int64_t chunk;
  std::int64_t from;
  std::int64_t count;
  std::int64_t to;
};

/// A stretch of consecutive stored values that stays together in the block.
struct Run {
  std::int64_t from;  // in the array
  std::int64_t count;
  std::int64_t to;
};

struct RowPlan {
  std::vector<std::int64_t> indptr;  // of the block
  std::vector<Run> runs;
};

/// Row pointers of the block that holds `rows` in this order, and its runs. Throws InvalidArgument for rows
/// outside indptr and row pointers that fall or exceed num_values.
RowPlan plan_rows(std::span<const std::int64_t> indptr, std::int64_t num_values,
                  std::span<const std::int64_t> rows);

/// The runs cut at chunk boundaries, in the order in which they are stored.
std::vector<Piece> cut_into_pieces(const std::vector<Run>& runs, std::int64_t chunk_values);

/// Pieces (of a plain array) cut further, so that none is longer than `longest`.
std::vector<Piece> cut_long_pieces(const std::vector<Piece>& pieces, std::int64_t longest);

}  // namespace scfm
