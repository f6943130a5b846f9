#include "tokenize/log_bins.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

#include "cpu/thread_pool.hpp"
#include "tokenize/rank_dispatch.hpp"
#include "tokenize/row_reader.hpp"

namespace scfm {
namespace {

constexpr std::int64_t kEntriesPerTask = 1 << 15;
constexpr const char* kFunction = "log_bins";
constexpr double kTarget = 10'000.0;

[[noreturn]] void fail(const std::string& message) {
  throw InvalidArgument(std::string(kFunction) + ": " + message);
}

void check(const CsrView& csr, const LogBinsOptions& options) {
  if (csr.num_columns != csr.num_data) {
    fail("indices has " + std::to_string(csr.num_columns) + " entries, expected " +
         std::to_string(csr.num_data) + " as in data");
  }
  require_indptr(csr.indptr, csr.num_data, kFunction);
  if (options.panel_size < 1) {
    fail("panel_size = " + std::to_string(options.panel_size) + ", expected at least 1");
  }
  std::vector<bool> taken(static_cast<std::size_t>(options.panel_size));
  for (std::size_t column = 0; column < options.column_position.size(); ++column) {
    const std::int32_t position = options.column_position[column];
    if (position == -1) continue;
    const std::string where = "column_position[" + std::to_string(column) + "] = " + std::to_string(position);
    if (position < -1 || position >= options.panel_size) {
      fail(where + ", expected -1 to " + std::to_string(options.panel_size - 1));
    }
    if (taken[static_cast<std::size_t>(position)]) fail(where + ", which an earlier column has already");
    taken[static_cast<std::size_t>(position)] = true;
  }
}

/// The authors' float32 arithmetic: normalize_total(1e4), log1p, / ln 2, then the integer below.
struct FloatBins {
  float per_ten_thousand;
  int operator()(double value) const noexcept {
    return truncated(std::log1p(static_cast<float>(value) / per_ten_thousand) / 0.693147180559945309417f);
  }
  static int truncated(float logged) noexcept {
    return static_cast<int>(std::min(logged, static_cast<float>(kHighestLogBin)));
  }
};

struct LoggedBins {
  int operator()(double value) const noexcept { return FloatBins::truncated(static_cast<float>(value)); }
};

/// Exact for whole counts: both sides of each comparison are whole numbers below 2^53.
struct CountBins {
  double total;
  int operator()(double count) const noexcept {
    const double scaled = count * kTarget;
    return (scaled >= total) + (scaled >= 3 * total) + (scaled >= 7 * total) + (scaled >= 15 * total) +
           (scaled >= 31 * total);
  }
};

/// Turns rows into tokens, one at a time; a thread has its own, for the scratch space in it.
class RowTokenizer {
 public:
  RowTokenizer(const CsrView& csr, const LogBinsOptions& options)
      : options_(options),
        reader_(csr, active_rank_kernels(), kFunction),
        on_panel_(static_cast<std::size_t>(options.panel_size)),
        present_(static_cast<std::size_t>(options.panel_size) / 64 + 1) {}

  /// Writes the row's positions and bins; returns how many.
  std::int64_t tokenize(std::int64_t row, std::int32_t* tokens, float* bins, LogBinsResult& result);

 private:
  template <class Value>
  void place(const Row& row, const Value* values);
  template <class Bin>
  std::int64_t write(Bin bin, std::int32_t* tokens, float* bins);

  const LogBinsOptions& options_;
  RowReader reader_;
  std::vector<double> on_panel_;        // values by position, valid where present
  std::vector<std::uint64_t> present_;  // a bit a position; cleared as it is read
  double total_ = 0.0;
  double panel_total_ = 0.0;
  std::int32_t num_genes_ = 0;
  bool possible_ = true;
  bool whole_ = true;
};

/// Puts the row's values at their panel positions, so that they come out in ascending order without a sort.
template <class Value>
void RowTokenizer::place(const Row& row, const Value* values) {
  total_ = panel_total_ = 0.0;
  num_genes_ = 0;
  possible_ = whole_ = true;
  for (std::int64_t i = 0; i < row.count; ++i) {
    const auto value = static_cast<double>(values[i]);
    possible_ &= value >= 0 && value <= std::numeric_limits<float>::max();
    total_ += value;
    const std::int32_t position = options_.column_position[static_cast<std::size_t>(row.columns[i])];
    if (position < 0 || !(value > 0)) continue;
    panel_total_ += value;
    whole_ &= value == std::trunc(value);
    ++num_genes_;
    on_panel_[static_cast<std::size_t>(position)] = value;
    present_[static_cast<std::size_t>(position) / 64] |= std::uint64_t{1} << (position % 64);
  }
}

template <class Bin>
std::int64_t RowTokenizer::write(Bin bin, std::int32_t* tokens, float* bins) {
  std::int64_t length = 0;
  for (std::size_t word = 0; word < present_.size(); ++word) {
    for (std::uint64_t bits = std::exchange(present_[word], 0); bits != 0; bits &= bits - 1) {
      const std::size_t position = word * 64 + static_cast<std::size_t>(std::countr_zero(bits));
      const int found = bin(on_panel_[position]);
      tokens[length] = static_cast<std::int32_t>(position);
      bins[length] = static_cast<float>(found);
      length += found > 0;
    }
  }
  return length;
}

std::int64_t RowTokenizer::tokenize(std::int64_t row_number, std::int32_t* tokens, float* bins,
                                    LogBinsResult& result) {
  const Row row = reader_.read(row_number);
  if (row.values_are_f64) {
    place(row, static_cast<const double*>(row.values));
  } else {
    place(row, static_cast<const float*>(row.values));
  }
  if (!possible_) {
    fail("row " + std::to_string(row_number) + " has a value that is negative or not finite as float32");
  }
  const auto r = static_cast<std::size_t>(row_number);
  result.num_panel_genes[r] = num_genes_;
  result.mapped_counts[r] = panel_total_;
  result.total_counts[r] = total_;
  if (options_.already_logged) return write(LoggedBins{}, tokens, bins);
  if (whole_) return write(CountBins{panel_total_}, tokens, bins);
  return write(FloatBins{static_cast<float>(panel_total_) / static_cast<float>(kTarget)}, tokens, bins);
}

}  // namespace

LogBinsResult log_bins(const CsrView& csr, const LogBinsOptions& options) {
  check(csr, options);
  const std::int64_t num_rows = csr.num_rows();
  const auto n = static_cast<std::size_t>(num_rows);
  LogBinsResult result;
  result.cu_seqlens.resize(n + 1);
  result.num_panel_genes.resize(n);
  result.mapped_counts.resize(n);
  result.total_counts.resize(n);

  const std::int64_t rows = rows_per_task(csr, kEntriesPerTask);
  const std::int64_t num_tasks = (num_rows + rows - 1) / rows;
  PackedWriter<float> writer(num_tasks, csr.num_data, true);
  const int max_workers = num_threads();
  std::vector<std::unique_ptr<RowTokenizer>> tokenizers(static_cast<std::size_t>(max_workers));

  parallel_for(num_tasks, max_workers, [&](std::int64_t task, int worker) {
    auto& tokenizer = tokenizers[static_cast<std::size_t>(worker)];
    if (!tokenizer) tokenizer = std::make_unique<RowTokenizer>(csr, options);
    const std::int64_t first = task * rows;
    const std::int64_t last = std::min(first + rows, num_rows);
    const std::int64_t capacity =
        csr.indptr[static_cast<std::size_t>(last)] - csr.indptr[static_cast<std::size_t>(first)];
    std::unique_ptr<PackedPiece<float>> piece = writer.take_piece();
    std::int32_t* tokens = piece->tokens.reserve(capacity + 1);  // one more is written before it is dropped
    float* bins = piece->values.reserve(capacity + 1);
    std::int64_t size = 0;
    for (std::int64_t row = first; row < last; ++row) {
      const std::int64_t length = tokenizer->tokenize(row, tokens + size, bins + size, result);
      result.cu_seqlens[static_cast<std::size_t>(row) + 1] = length;
      size += length;
    }
    piece->size = size;
    writer.finish(task, std::move(piece));
  });

  writer.cut_to_size();
  for (std::size_t row = 0; row < n; ++row) result.cu_seqlens[row + 1] += result.cu_seqlens[row];
  result.token_ids = std::move(writer.tokens);
  result.values = std::move(writer.values);
  return result;
}

}  // namespace scfm
