#include "counts/gather_plan.hpp"

#include <algorithm>
#include <string>

#include "base/errors.hpp"

namespace scfm {

RowPlan plan_rows(std::span<const std::int64_t> indptr, std::int64_t num_values,
                  std::span<const std::int64_t> rows) {
  RowPlan plan;
  plan.indptr.reserve(rows.size() + 1);
  plan.indptr.push_back(0);
  const auto num_rows = static_cast<std::int64_t>(indptr.size()) - 1;
  for (const std::int64_t row : rows) {
    if (row < 0 || row >= num_rows) {
      throw InvalidArgument("CsrStream: row " + std::to_string(row) + " is out of range for " +
                            std::to_string(num_rows) + " rows");
    }
    const std::int64_t start = indptr[static_cast<std::size_t>(row)];
    const std::int64_t stop = indptr[static_cast<std::size_t>(row) + 1];
    if (start < 0 || stop < start || stop > num_values) {
      throw InvalidArgument("CsrStream: row " + std::to_string(row) + " is said to lie at " +
                            std::to_string(start) + " to " + std::to_string(stop) + " of " +
                            std::to_string(num_values) + " values");
    }
    const std::int64_t to = plan.indptr.back();
    if (stop > start) {
      if (!plan.runs.empty() && plan.runs.back().from + plan.runs.back().count == start) {
        plan.runs.back().count += stop - start;
      } else {
        plan.runs.push_back({start, stop - start, to});
      }
    }
    plan.indptr.push_back(to + (stop - start));
  }
  return plan;
}

std::vector<Piece> cut_into_pieces(const std::vector<Run>& runs, std::int64_t chunk_values) {
  std::vector<Piece> pieces;
  for (const Run& run : runs) {
    std::int64_t done = 0;
    while (done < run.count) {
      const std::int64_t at = run.from + done;
      const std::int64_t inside = at % chunk_values;
      const std::int64_t count = std::min(run.count - done, chunk_values - inside);
      pieces.push_back({at / chunk_values, inside, count, run.to + done});
      done += count;
    }
  }
  const auto by_place = [](const Piece& a, const Piece& b) {
    return a.chunk != b.chunk ? a.chunk < b.chunk : a.from < b.from;
  };
  if (!std::is_sorted(pieces.begin(), pieces.end(), by_place)) {
    std::stable_sort(pieces.begin(), pieces.end(), by_place);
  }
  return pieces;
}

std::vector<Piece> cut_long_pieces(const std::vector<Piece>& pieces, std::int64_t longest) {
  std::vector<Piece> cut;
  cut.reserve(pieces.size());
  for (const Piece& piece : pieces) {
    for (std::int64_t done = 0; done < piece.count; done += longest) {
      cut.push_back({piece.chunk, piece.from + done, std::min(longest, piece.count - done), piece.to + done});
    }
  }
  return cut;
}

}  // namespace scfm
