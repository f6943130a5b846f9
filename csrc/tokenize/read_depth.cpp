#include "tokenize/read_depth.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <memory>
#include <string>

#include "cpu/thread_pool.hpp"
#include "tokenize/rank_dispatch.hpp"
#include "tokenize/row_reader.hpp"

namespace scfm {
namespace {

constexpr std::int64_t kEntriesPerTask = 1 << 15;
constexpr std::int64_t kNumDepthTokens = 2;
// The last two tokens are read as S and T, so a cell needs one more.
constexpr std::int64_t kFewestTokens = 3;
// Most counts are small whole numbers, and equal counts of a cell have equal logarithms.
constexpr std::size_t kRemembered = 1024;
constexpr const char* kFunction = "read_depth";

[[noreturn]] void fail(const std::string& message) {
  throw InvalidArgument(std::string(kFunction) + ": " + message);
}

void check(const CsrView& csr, std::span<const std::int32_t> column_position, std::int64_t num_positions,
           const ReadDepthOptions& options) {
  if (csr.num_columns != csr.num_data) {
    fail("indices has " + std::to_string(csr.num_columns) + " entries, expected " +
         std::to_string(csr.num_data) + " as in data");
  }
  require_indptr(csr.indptr, csr.num_data, kFunction);
  if (num_positions < 1 || num_positions > (1 << 24)) {
    fail("num_positions = " + std::to_string(num_positions) + ", expected 1 to 2^24");
  }
  for (std::size_t column = 0; column < column_position.size(); ++column) {
    const std::int64_t position = column_position[column];
    if (position >= -1 && position < num_positions) continue;
    fail("column_position[" + std::to_string(column) + "] = " + std::to_string(position) +
         ", expected -1 to " + std::to_string(num_positions - 1));
  }
  if (options.total == DepthTotal::listed) {
    if (static_cast<std::int64_t>(options.totals.size()) != csr.num_rows()) {
      fail("totals has " + std::to_string(options.totals.size()) + " entries, expected " +
           std::to_string(csr.num_rows()) + ", one per cell");
    }
    for (std::size_t row = 0; row < options.totals.size(); ++row) {
      if (options.totals[row] >= 0.0 && std::isfinite(options.totals[row])) continue;
      fail("totals[" + std::to_string(row) + "] = " + std::to_string(options.totals[row]) +
           ", expected a number from 0");
    }
  }
  if (!(options.target_sum > 0.0) || !std::isfinite(options.target_sum)) {
    fail("target_sum = " + std::to_string(options.target_sum) + ", expected a number above 0");
  }
  if (!std::isfinite(options.target_number)) fail("target_number is not finite");
}

/// The arithmetic of one cell. Real: what quotients and products are rounded to.
template <class Real>
class CellArithmetic {
 public:
  explicit CellArithmetic(const ReadDepthOptions& options) : options_(options) {}

  /// Begins a cell whose values sum to `total`.
  void begin(double total) {
    total_ = static_cast<Real>(total);
    per_median_ = total_ / static_cast<Real>(options_.target_sum);
    ++cell_;
    if (cell_ == 0) {  // the counter went round: what older cells left could look current
      stamps_.fill(0);
      cell_ = 1;
    }
  }

  double value(double x) {
    if (options_.values == DepthValues::given) return x;
    const auto whole = static_cast<std::size_t>(std::min(x, static_cast<double>(kRemembered)));
    if (whole >= kRemembered || static_cast<double>(whole) != x) return logged(x);
    if (stamps_[whole] != cell_) {
      stamps_[whole] = cell_;
      logs_[whole] = logged(x);
    }
    return logs_[whole];
  }

  float source(double total) const { return static_cast<float>(depth(static_cast<Real>(total))); }

  float target(double total) const {
    const auto sum = static_cast<Real>(total);
    const auto number = static_cast<Real>(options_.target_number);
    switch (options_.target) {
      case DepthTarget::fixed:
        return static_cast<float>(options_.target_number);
      case DepthTarget::times:
        return static_cast<float>(std::log10(static_cast<double>(sum * number)));
      case DepthTarget::plus:
        return static_cast<float>(static_cast<Real>(std::log10(static_cast<double>(sum))) + number);
      case DepthTarget::same:
        break;
    }
    return source(total);
  }

 private:
  double depth(Real total) const {
    return options_.total_is_logged ? std::log10(static_cast<double>(total)) : static_cast<double>(total);
  }

  double logged(double x) const {
    const auto count = static_cast<Real>(x);
    const Real scaled = options_.values == DepthValues::per_median ? count / per_median_
                                                                   : count / total_ * static_cast<Real>(1e4);
    return std::log1p(static_cast<double>(scaled));
  }

  const ReadDepthOptions& options_;
  Real total_ = 0;
  Real per_median_ = 0;
  std::uint32_t cell_ = 0;
  std::array<std::uint32_t, kRemembered> stamps_{};
  std::array<double, kRemembered> logs_{};
};

/// Turns rows into tokens and values, one at a time; a thread has its own, for the scratch space in it.
template <class Real>
class RowTokenizer {
 public:
  RowTokenizer(const CsrView& csr, std::span<const std::int32_t> column_position, std::int64_t num_positions,
               const ReadDepthOptions& options)
      : column_position_(column_position),
        num_positions_(num_positions),
        options_(options),
        reader_(csr, active_rank_kernels(), kFunction),
        arithmetic_(options),
        sums_(static_cast<std::size_t>(num_positions)),
        expressed_(static_cast<std::size_t>((num_positions + 63) / 64)) {}

  /// Writes the row's tokens and values, of which there is room for two more than entries; returns how many.
  std::int64_t tokenize(std::int64_t row_number, std::int32_t* tokens, float* values,
                        ReadDepthResult& result);

 private:
  template <class Value>
  bool scatter(const Row& row, double& total);
  std::int64_t gather(std::int64_t count, std::int32_t* tokens, double& mapped);

  std::span<const std::int32_t> column_position_;
  std::int64_t num_positions_;
  const ReadDepthOptions& options_;
  RowReader reader_;
  CellArithmetic<Real> arithmetic_;
  std::vector<double> sums_;              // per position; all 0 between two rows
  std::vector<std::uint64_t> expressed_;  // a bit a position
  AlignedBuffer<double> inputs_;
};

/// Adds the row's entries to their positions; false if a value is impossible.
template <class Real>
template <class Value>
bool RowTokenizer<Real>::scatter(const Row& row, double& total) {
  const auto* values = static_cast<const Value*>(row.values);
  constexpr double kHighest = std::numeric_limits<float>::max();
  bool possible = true;
  for (std::int64_t i = 0; i < row.count; ++i) {
    const auto value = static_cast<double>(values[i]);
    total += value;
    possible &= value >= 0.0 && value <= kHighest;
    const std::int32_t position = column_position_[static_cast<std::size_t>(row.columns[i])];
    if (position < 0) continue;
    const auto p = static_cast<std::size_t>(position);
    expressed_[p / 64] |= std::uint64_t{1} << (p % 64);
    sums_[p] += value;
  }
  return possible;
}

/// Takes what scatter added out again, in the order of positions; returns how many are not zero.
template <class Real>
std::int64_t RowTokenizer<Real>::gather(std::int64_t count, std::int32_t* tokens, double& mapped) {
  double* inputs = inputs_.reserve(count + 1);
  std::int64_t found = 0;
  for (std::size_t word = 0; word < expressed_.size(); ++word) {
    std::uint64_t bits = expressed_[word];
    if (bits == 0) continue;
    expressed_[word] = 0;
    for (; bits != 0; bits &= bits - 1) {
      const std::size_t position = word * 64 + static_cast<std::size_t>(std::countr_zero(bits));
      const double input = sums_[position];
      sums_[position] = 0.0;
      mapped += input;
      if (input == 0.0) continue;
      tokens[found] = static_cast<std::int32_t>(position);
      inputs[found++] = input;
    }
  }
  return found;
}

template <class Real>
std::int64_t RowTokenizer<Real>::tokenize(std::int64_t row_number, std::int32_t* tokens, float* values,
                                          ReadDepthResult& result) {
  const auto r = static_cast<std::size_t>(row_number);
  const Row row = reader_.read(row_number);
  double all = 0.0;
  double mapped = 0.0;
  const bool possible = row.values_are_f64 ? scatter<double>(row, all) : scatter<float>(row, all);
  const std::int64_t count = gather(row.count, tokens, mapped);
  if (!possible) {
    fail("row " + std::to_string(row_number) + " has a value that is negative or not finite as float32");
  }
  arithmetic_.begin(mapped);
  const double* inputs = inputs_.data();
  std::int64_t size = 0;
  double outputs = 0.0;
  for (std::int64_t i = 0; i < count; ++i) {
    const double value = arithmetic_.value(inputs[i]);
    outputs += value;
    const auto rounded = static_cast<float>(value);
    tokens[size] = tokens[i];
    values[size] = rounded;
    size += rounded > 0.0f ? 1 : 0;
  }
  const std::int64_t num_genes = size;
  const double total = options_.total == DepthTotal::listed    ? options_.totals[r]
                       : options_.total == DepthTotal::outputs ? outputs
                                                               : mapped;
  const std::array<float, kNumDepthTokens> depths = {arithmetic_.target(total), arithmetic_.source(total)};
  for (std::size_t i = 0; i < depths.size(); ++i) {
    if (!(depths[i] > 0.0f)) continue;
    tokens[size] = static_cast<std::int32_t>(num_positions_ + static_cast<std::int64_t>(i));
    values[size++] = depths[i];
  }
  const bool enough = num_genes > 0 && size >= kFewestTokens;
  result.num_gene_tokens[r] = enough ? static_cast<std::int32_t>(num_genes) : 0;
  result.mapped_counts[r] = mapped;
  result.total_counts[r] = all;
  result.target_depth[r] = depths[0];
  result.source_depth[r] = depths[1];
  return enough ? size : 0;
}

template <class Real>
ReadDepthResult tokenize_rows(const CsrView& csr, std::span<const std::int32_t> column_position,
                              std::int64_t num_positions, const ReadDepthOptions& options) {
  const std::int64_t num_rows = csr.num_rows();
  const auto n = static_cast<std::size_t>(num_rows);
  ReadDepthResult result;
  result.cu_seqlens.resize(n + 1);
  result.num_gene_tokens.resize(n);
  result.mapped_counts.resize(n);
  result.total_counts.resize(n);
  result.target_depth.resize(n);
  result.source_depth.resize(n);
  const auto longest = [&csr](std::int64_t first, std::int64_t last) {
    return csr.indptr[static_cast<std::size_t>(last)] - csr.indptr[static_cast<std::size_t>(first)] +
           kNumDepthTokens * (last - first);
  };
  const std::int64_t rows = rows_per_task(csr, kEntriesPerTask);
  const std::int64_t num_tasks = (num_rows + rows - 1) / rows;
  PackedWriter<float> writer(num_tasks, longest(0, num_rows), true);
  const int max_workers = num_threads();
  std::vector<std::unique_ptr<RowTokenizer<Real>>> tokenizers(static_cast<std::size_t>(max_workers));

  parallel_for(num_tasks, max_workers, [&](std::int64_t task, int worker) {
    auto& tokenizer = tokenizers[static_cast<std::size_t>(worker)];
    if (!tokenizer) {
      tokenizer = std::make_unique<RowTokenizer<Real>>(csr, column_position, num_positions, options);
    }
    const std::int64_t first = task * rows;
    const std::int64_t last = std::min(first + rows, num_rows);
    std::unique_ptr<PackedPiece<float>> piece = writer.take_piece();
    std::int32_t* tokens = piece->tokens.reserve(longest(first, last));
    float* values = piece->values.reserve(longest(first, last));
    std::int64_t size = 0;
    for (std::int64_t row = first; row < last; ++row) {
      const std::int64_t length = tokenizer->tokenize(row, tokens + size, values + size, result);
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

}  // namespace

ReadDepthResult read_depth(const CsrView& csr, std::span<const std::int32_t> column_position,
                           std::int64_t num_positions, const ReadDepthOptions& options) {
  check(csr, column_position, num_positions, options);
  return options.single ? tokenize_rows<float>(csr, column_position, num_positions, options)
                        : tokenize_rows<double>(csr, column_position, num_positions, options);
}

}  // namespace scfm
