#include "attention/graph_plan.hpp"

#include <algorithm>
#include <bit>
#include <string>

#include "base/errors.hpp"
#include "cpu/thread_pool.hpp"

namespace scfm {
namespace {

void check(const TokenIds& token_ids, const GeneGraphView& graph) {
  const auto fail = [](const std::string& message) { throw InvalidArgument("graph_plan: " + message); };
  const auto num_genes = static_cast<std::int64_t>(graph.is_global.size());
  const auto num_columns = static_cast<std::int64_t>(graph.columns.size());
  if (static_cast<std::int64_t>(graph.offsets.size()) != num_genes + 1) {
    fail("gene_offsets has " + std::to_string(graph.offsets.size()) + " entries, expected " +
         std::to_string(num_genes + 1) + " for " + std::to_string(num_genes) + " genes");
  }
  bool rises = graph.offsets.front() == 0 && graph.offsets.back() == num_columns;
  for (std::size_t gene = 1; gene < graph.offsets.size(); ++gene) {
    rises = rises && graph.offsets[gene - 1] <= graph.offsets[gene];
  }
  if (!rises) fail("gene_offsets must rise from 0 to " + std::to_string(num_columns));
  for (std::size_t edge = 0; edge < graph.columns.size(); ++edge) {
    if (graph.columns[edge] < 0 || graph.columns[edge] >= num_genes) {
      fail("gene_columns[" + std::to_string(edge) + "] = " + std::to_string(graph.columns[edge]) +
           " is out of range for " + std::to_string(num_genes) + " genes");
    }
  }
  for (std::int64_t token = 0; token < token_ids.count; ++token) {
    if (token_ids[token] < 0 || token_ids[token] >= num_genes) {
      fail("token_ids[" + std::to_string(token) + "] = " + std::to_string(token_ids[token]) +
           " is out of range for " + std::to_string(num_genes) + " genes");
    }
  }
}

/// A set of tokens of a cell that is filled in any order, and emptied in rising order. A second level of bits
/// says which words hold any, so that emptying it costs what is in it, not the length of the cell.
class TokenSet {
 public:
  void resize(std::int64_t num_tokens) {
    const auto num_words = static_cast<std::size_t>((num_tokens + 63) / 64);
    if (words_.size() < num_words) words_.resize(num_words);
    if (occupied_.size() < (num_words + 63) / 64) occupied_.resize((num_words + 63) / 64);
    used_ = (num_words + 63) / 64;
  }

  void insert(std::int64_t token) {
    const auto at = static_cast<std::size_t>(token);
    words_[at / 64] |= std::uint64_t{1} << (at % 64);
    occupied_[at / 4096] |= std::uint64_t{1} << (at / 64 % 64);
  }

  template <class Take>
  void empty_into(Take&& take) {
    for (std::size_t group = 0; group < used_; ++group) {
      for (std::uint64_t left = occupied_[group]; left != 0; left &= left - 1) {
        const std::size_t word = group * 64 + static_cast<std::size_t>(std::countr_zero(left));
        for (std::uint64_t bits = words_[word]; bits != 0; bits &= bits - 1) {
          take(static_cast<std::int32_t>(word * 64 + static_cast<std::size_t>(std::countr_zero(bits))));
        }
        words_[word] = 0;
      }
      occupied_[group] = 0;
    }
  }

 private:
  std::vector<std::uint64_t> words_;
  std::vector<std::uint64_t> occupied_;
  std::size_t used_ = 0;
};

/// Finds the pairs of one cell after another.
class CellPlanner {
 public:
  CellPlanner(const TokenIds& token_ids, const GeneGraphView& graph)
      : token_ids_(token_ids), graph_(graph), first_token_(graph.is_global.size(), kNone) {}

  /// Appends the columns of the cell's tokens to `columns`; counts[i] becomes how many token i of the cell
  /// has.
  void plan(std::int64_t begin, std::int64_t end, std::vector<std::int32_t>& columns, std::int64_t* counts) {
    begin_ = begin;
    length_ = end - begin;
    enter();
    for (std::int64_t i = 0; i < length_; ++i) {
      const std::size_t before = columns.size();
      append_row(gene_of(i), columns);
      counts[i] = static_cast<std::int64_t>(columns.size() - before);
    }
    for (std::int64_t i = 0; i < length_; ++i) first_token_[gene_of(i)] = kNone;
  }

 private:
  static constexpr std::int32_t kNone = -1;

  std::size_t gene_of(std::int64_t i) const { return static_cast<std::size_t>(token_ids_[begin_ + i]); }

  /// Chains the tokens of each gene, and lists the global ones.
  void enter() {
    const auto length = static_cast<std::size_t>(length_);
    next_token_.resize(length);
    globals_.clear();
    seen_.resize(length_);
    for (std::int64_t i = 0; i < length_; ++i) {
      const std::size_t gene = gene_of(i);
      next_token_[static_cast<std::size_t>(i)] = first_token_[gene];
      first_token_[gene] = static_cast<std::int32_t>(i);
      if (graph_.is_global[gene] != 0) globals_.push_back(static_cast<std::int32_t>(i));
    }
  }

  void insert_tokens_of(std::size_t gene) {
    for (std::int32_t i = first_token_[gene]; i != kNone; i = next_token_[static_cast<std::size_t>(i)]) {
      seen_.insert(i);
    }
  }

  void append_row(std::size_t gene, std::vector<std::int32_t>& columns) {
    if (graph_.is_global[gene] != 0) {
      for (std::int64_t i = 0; i < length_; ++i) columns.push_back(static_cast<std::int32_t>(begin_ + i));
      return;
    }
    insert_tokens_of(gene);
    for (const std::int32_t i : globals_) seen_.insert(i);
    for (std::int64_t e = graph_.offsets[gene]; e < graph_.offsets[gene + 1]; ++e) {
      insert_tokens_of(static_cast<std::size_t>(graph_.columns[static_cast<std::size_t>(e)]));
    }
    seen_.empty_into([&](std::int32_t i) { columns.push_back(static_cast<std::int32_t>(begin_) + i); });
  }

  const TokenIds& token_ids_;
  const GeneGraphView& graph_;
  std::vector<std::int32_t> first_token_;  // of each gene in the cell: the last one met, then by next_token_
  std::vector<std::int32_t> next_token_;
  std::vector<std::int32_t> globals_;
  TokenSet seen_;
  std::int64_t begin_ = 0;
  std::int64_t length_ = 0;
};

/// counts[1 ..] of one pass become offsets.
void accumulate(std::vector<std::int64_t>& offsets) {
  for (std::size_t i = 1; i < offsets.size(); ++i) offsets[i] += offsets[i - 1];
}

/// The transpose within one cell: rows come in rising order, so every column's rows do too.
void transpose(std::int64_t begin, std::int64_t end, const GraphPlan& plan,
               std::vector<std::int64_t>& places) {
  places.assign(plan.col_offsets.begin() + begin, plan.col_offsets.begin() + end);
  for (std::int64_t row = begin; row < end; ++row) {
    for (std::int64_t e = plan.row_offsets[static_cast<std::size_t>(row)];
         e < plan.row_offsets[static_cast<std::size_t>(row + 1)]; ++e) {
      const std::int64_t column = plan.columns[static_cast<std::size_t>(e)] - begin;
      plan.rows[static_cast<std::size_t>(places[static_cast<std::size_t>(column)]++)] =
          static_cast<std::int32_t>(row);
    }
  }
}

}  // namespace

GraphPlan graph_plan(std::span<const std::int32_t> cu_seqlens, const TokenIds& token_ids,
                     const GeneGraphView& graph) {
  check(token_ids, graph);
  const std::size_t num_cells = cu_seqlens.size() - 1;
  const int max_workers = num_threads();
  GraphPlan plan;
  plan.row_offsets.assign(static_cast<std::size_t>(token_ids.count) + 1, 0);
  plan.col_offsets.assign(static_cast<std::size_t>(token_ids.count) + 1, 0);
  std::vector<std::vector<std::int32_t>> columns_of(num_cells);
  std::vector<std::unique_ptr<CellPlanner>> planners(static_cast<std::size_t>(max_workers));
  parallel_for(static_cast<std::int64_t>(num_cells), max_workers, [&](std::int64_t task, int worker) {
    const auto cell = static_cast<std::size_t>(task);
    auto& planner = planners[static_cast<std::size_t>(worker)];
    if (!planner) planner = std::make_unique<CellPlanner>(token_ids, graph);
    planner->plan(cu_seqlens[cell], cu_seqlens[cell + 1], columns_of[cell],
                  plan.row_offsets.data() + cu_seqlens[cell] + 1);
    for (const std::int32_t column : columns_of[cell])
      ++plan.col_offsets[static_cast<std::size_t>(column) + 1];
  });
  accumulate(plan.row_offsets);
  accumulate(plan.col_offsets);
  const auto num_edges = static_cast<std::size_t>(plan.row_offsets.back());
  plan.columns = std::make_unique_for_overwrite<std::int32_t[]>(num_edges);
  plan.rows = std::make_unique_for_overwrite<std::int32_t[]>(num_edges);
  std::vector<std::vector<std::int64_t>> places(static_cast<std::size_t>(max_workers));
  parallel_for(static_cast<std::int64_t>(num_cells), max_workers, [&](std::int64_t task, int worker) {
    const auto cell = static_cast<std::size_t>(task);
    const std::int64_t begin = cu_seqlens[cell];
    std::copy(columns_of[cell].begin(), columns_of[cell].end(),
              plan.columns.get() + plan.row_offsets[static_cast<std::size_t>(begin)]);
    columns_of[cell] = {};
    transpose(begin, cu_seqlens[cell + 1], plan, places[static_cast<std::size_t>(worker)]);
  });
  return plan;
}

}  // namespace scfm
