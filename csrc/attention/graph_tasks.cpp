#include "attention/graph_tasks.hpp"

#include <algorithm>
#include <limits>
#include <string>

#include "base/errors.hpp"
#include "cpu/isa.hpp"
#include "cpu/thread_pool.hpp"

namespace scfm {
namespace {

#ifdef SCFM_X86_SIMD
constexpr TablePerIsa<GraphKernels> kTables = {&graph_generic, &graph_avx2, &graph_avx512,
                                               &graph_avx512_bf16};
#else
constexpr TablePerIsa<GraphKernels> kTables = {&graph_generic, &graph_generic, &graph_generic,
                                               &graph_generic};
#endif

constexpr std::int64_t kRowsPerCheck = 4096;
constexpr std::int64_t kTokensTogether = 256;    // spans smaller than this share a task
constexpr std::int64_t kEdgesPerTask = 65536;    // and spans with many more are shared out
constexpr std::int64_t kEdgesPerPackedRow = 32;  // packing two rows costs about as much as one edge

/// Lowest and highest position that a row's edges, or itself, lead to.
struct Extents {
  std::vector<std::int32_t> lowest;
  std::vector<std::int32_t> highest;
};

void check_offsets(const GraphPairs& pairs, std::int64_t num_tokens, const char* function) {
  const auto fail = [&](const std::string& message) {
    throw InvalidArgument(std::string(function) + ": " + pairs.offsets_name + message);
  };
  if (static_cast<std::int64_t>(pairs.offsets.size()) != num_tokens + 1) {
    fail(" has " + std::to_string(pairs.offsets.size()) + " entries, expected " +
         std::to_string(num_tokens + 1) + " for " + std::to_string(num_tokens) + " tokens");
  }
  if (pairs.offsets.front() != 0) fail("[0] = " + std::to_string(pairs.offsets.front()) + ", expected 0");
  for (std::size_t row = 1; row < pairs.offsets.size(); ++row) {
    if (pairs.offsets[row] < pairs.offsets[row - 1]) {
      fail(" falls from " + std::to_string(pairs.offsets[row - 1]) + " to " +
           std::to_string(pairs.offsets[row]) + " at token " + std::to_string(row - 1));
    }
  }
  if (pairs.offsets.back() != static_cast<std::int64_t>(pairs.positions.size())) {
    fail(" ends at " + std::to_string(pairs.offsets.back()) + ", expected " +
         std::to_string(pairs.positions.size()) + ", the number of " + pairs.positions_name);
  }
}

Extents extents_of(const GraphPairs& pairs, std::int64_t num_tokens, const char* function) {
  const auto size = static_cast<std::size_t>(num_tokens);
  Extents extents{std::vector<std::int32_t>(size), std::vector<std::int32_t>(size)};
  const std::int64_t num_checks = (num_tokens + kRowsPerCheck - 1) / kRowsPerCheck;
  parallel_for(num_checks, num_threads(), [&](std::int64_t check, int) {
    const std::int64_t last = std::min((check + 1) * kRowsPerCheck, num_tokens);
    for (std::int64_t row = check * kRowsPerCheck; row < last; ++row) {
      const auto here = static_cast<std::size_t>(row);
      auto lowest = static_cast<std::int32_t>(row);
      auto highest = lowest;
      for (std::int64_t e = pairs.offsets[here]; e < pairs.offsets[here + 1]; ++e) {
        const std::int32_t position = pairs.positions[static_cast<std::size_t>(e)];
        lowest = std::min(lowest, position);
        highest = std::max(highest, position);
      }
      if (lowest < 0 || highest >= num_tokens) {
        throw InvalidArgument(std::string(function) + ": token " + std::to_string(row) + ": " +
                              pairs.positions_name + " run from " + std::to_string(lowest) + " to " +
                              std::to_string(highest) + ", expected 0 to " + std::to_string(num_tokens - 1));
      }
      extents.lowest[here] = lowest;
      extents.highest[here] = highest;
    }
  });
  return extents;
}

/// Where spans begin, and num_tokens: cuts that no edge crosses, with at least kTokensTogether between two.
std::vector<std::int64_t> cuts_of(Extents extents, std::int64_t num_tokens) {
  for (std::size_t row = extents.lowest.size(); row-- > 1;) {
    extents.lowest[row - 1] = std::min(extents.lowest[row - 1], extents.lowest[row]);
  }
  std::vector<std::int64_t> cuts = {0};
  std::int64_t reach = 0;
  for (std::int64_t row = 0; row < num_tokens; ++row) {
    const auto here = static_cast<std::size_t>(row);
    if (row - cuts.back() >= kTokensTogether && reach <= row && extents.lowest[here] >= row)
      cuts.push_back(row);
    reach = std::max(reach, std::int64_t{extents.highest[here]} + 1);
  }
  if (num_tokens > 0) cuts.push_back(num_tokens);
  return cuts;
}

}  // namespace

const GraphKernels& graph_kernels() { return active_table(kTables); }

GraphRows GraphTensor::rows_of(std::int64_t head, std::int64_t row) const {
  const std::int64_t element = head * head_stride + row * row_stride;
  return {static_cast<char*>(data) + element * (is_bf16 ? 2 : 4), row_stride, is_bf16};
}

std::vector<GraphTask> graph_tasks(const GraphPairs& pairs, std::int64_t num_tokens, const char* function) {
  check_offsets(pairs, num_tokens, function);
  const std::vector<std::int64_t> cuts = cuts_of(extents_of(pairs, num_tokens, function), num_tokens);
  std::vector<GraphTask> tasks;
  for (std::size_t i = 1; i < cuts.size(); ++i) {
    const std::int64_t begin = cuts[i - 1];
    const std::int64_t end = cuts[i];
    const std::int64_t* offsets = pairs.offsets.data();
    const std::int64_t num_edges = offsets[end] - offsets[begin];
    const std::int64_t wanted = std::max(kEdgesPerTask, kEdgesPerPackedRow * (end - begin));
    const std::int64_t num_pieces = std::max<std::int64_t>(1, num_edges / wanted);
    std::int64_t row = begin;
    for (std::int64_t piece = 1; piece <= num_pieces; ++piece) {
      const std::int64_t edges_before = offsets[begin] + num_edges / num_pieces * piece;
      const std::int64_t until =
          piece == num_pieces ? end : std::lower_bound(offsets + row, offsets + end, edges_before) - offsets;
      if (until > row) tasks.push_back({begin, end, row, until});
      row = until;
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(), [&](const GraphTask& a, const GraphTask& b) {
    const std::int64_t* offsets = pairs.offsets.data();
    return offsets[a.row_end] - offsets[a.row_begin] > offsets[b.row_end] - offsets[b.row_begin];
  });
  return tasks;
}

GraphEdges graph_edges(const GraphPairs& pairs, const GraphTask& task) {
  return {pairs.offsets.data() + task.row_begin, pairs.positions.data(),
          static_cast<std::int32_t>(task.span_begin), task.row_end - task.row_begin};
}

std::int64_t longest_row(const GraphPairs& pairs, const GraphTask& task) {
  std::int64_t longest = 0;
  for (std::int64_t row = task.row_begin; row < task.row_end; ++row) {
    longest = std::max(longest, pairs.offsets[static_cast<std::size_t>(row + 1)] -
                                    pairs.offsets[static_cast<std::size_t>(row)]);
  }
  return longest;
}

void check_graph_shape(const GraphShape& shape, const char* function) {
  if (shape.num_tokens > std::numeric_limits<std::int32_t>::max()) {
    throw InvalidArgument(std::string(function) + ": " + std::to_string(shape.num_tokens) +
                          " tokens, expected fewer than 2^31");
  }
  if (shape.head_dim < 1 || shape.head_dim > kMaxGraphHeadDim) {
    throw InvalidArgument(std::string(function) + ": head_dim = " + std::to_string(shape.head_dim) +
                          ", expected 1 to " + std::to_string(kMaxGraphHeadDim));
  }
}

}  // namespace scfm
