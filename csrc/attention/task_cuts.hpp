/// How the heads of a pack's cells are handed to threads: a long one alone, short ones several at a time. The
/// heads of a short cell then stay with one core, which has their rows in its cache and can fetch the next
/// ones while it computes. How tasks are cut never shows in a result.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace scfm {

/// Where each task begins among pieces of so much `work` (pairs of tokens), in their order, and their end.
template <class Piece>
std::vector<std::size_t> task_cuts(const std::vector<Piece>& pieces) {
  constexpr std::int64_t kTaskWork = std::int64_t{1} << 18;  // about a fifth of a millisecond
  std::vector<std::size_t> cuts;
  std::int64_t work = kTaskWork;
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    if (work >= kTaskWork) {
      cuts.push_back(i);
      work = 0;
    }
    work += pieces[i].work;
  }
  cuts.push_back(pieces.size());
  return cuts;
}

}  // namespace scfm
