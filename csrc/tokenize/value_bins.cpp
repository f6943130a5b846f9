#include "tokenize/value_bins.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "cpu/thread_pool.hpp"
#include "tokenize/rank_dispatch.hpp"
#include "tokenize/row_reader.hpp"
#include "tokenize/value_bins_dispatch.hpp"
#include "tokenize/value_bins_edges.hpp"

namespace scfm {
namespace {

// 16 cells of 2,000 genes: what a task reads and writes stays in the second-level cache.
constexpr std::int64_t kEntriesPerTask = 1 << 15;
constexpr const char* kFunction = "value_bins";

[[noreturn]] void fail(const std::string& message) {
  throw InvalidArgument(std::string(kFunction) + ": " + message);
}

void check(const CsrView& csr, const TokenSlots& slots, const ValueBinsOptions& options) {
  if (csr.num_columns != csr.num_data) {
    fail("indices has " + std::to_string(csr.num_columns) + " entries, expected " +
         std::to_string(csr.num_data) + " as in data");
  }
  require_indptr(csr.indptr, csr.num_data, kFunction);
  const auto num_slots = static_cast<std::int64_t>(slots.slot_token.size());
  if (num_slots > std::numeric_limits<std::int32_t>::max() - 1)
    fail("slot_token has more than 2^31 - 2 entries");
  for (std::size_t column = 0; column < slots.column_slot.size(); ++column) {
    const std::int64_t slot = slots.column_slot[column];
    if (slot >= -1 && slot < num_slots) continue;
    fail("column_slot[" + std::to_string(column) + "] = " + std::to_string(slot) + ", expected -1 to " +
         std::to_string(num_slots - 1));
  }
  for (std::size_t slot = 0; slot < slots.slot_token.size(); ++slot) {
    if (slots.slot_token[slot] >= 0) continue;
    fail("slot_token[" + std::to_string(slot) + "] = " + std::to_string(slots.slot_token[slot]) +
         ", expected a token id");
  }
  require_quantiles(options.quantiles, kFunction);
  const std::int64_t least = options.prefix_token >= 0 ? 2 : 1;
  if (options.max_tokens != -1 && options.max_tokens < least) {
    fail("max_tokens = " + std::to_string(options.max_tokens) + ", expected -1 or at least " +
         std::to_string(least));
  }
  if (options.rule == BinRule::given) {
    if (options.draw_offsets.size() != csr.indptr.size()) {
      fail("draw_offsets has " + std::to_string(options.draw_offsets.size()) + " entries, expected " +
           std::to_string(csr.indptr.size()) + ", one per cell and one more");
    }
    require_indptr(options.draw_offsets, static_cast<std::int64_t>(options.draws.size()),
                   "value_bins: draw_offsets");
    require_draws(options.draws, kFunction);
  }
  if (options.prefix_token < -1) {
    fail("prefix_token = " + std::to_string(options.prefix_token) + ", expected a token id, or -1 for none");
  }
}

/// Turns rows into tokens and values, one at a time; a thread has its own, for the scratch space in it.
class RowTokenizer {
 public:
  RowTokenizer(const CsrView& csr, const TokenSlots& slots, std::span<const std::int32_t> column_token,
               const ValueBinsOptions& options)
      : slots_(slots),
        column_token_(column_token),
        options_(options),
        kernels_(active_value_bins_kernels()),
        reader_(csr, active_rank_kernels(), kFunction),
        edges_(options.quantiles, active_rank_kernels(), kernels_),
        words_(options.key, kernels_),
        sums_(column_token.empty() ? slots.slot_token.size() : 0) {}

  /// Writes the row's tokens and values, of which there is room for one more; returns how many.
  std::int64_t tokenize(std::int64_t row, std::int32_t* tokens, float* values, ValueBinsResult& result);

 private:
  MatchSummary match(const Row& row, const std::int32_t* token_of);
  MatchSummary match_slots(const Row& row);
  const float* bin(std::int64_t row, const MatchSummary& found);
  const float* spread(const MatchSummary& found, const float* values);
  const std::int32_t* choose(const MatchSummary& found, const float* expressed, std::int64_t count,
                             std::int64_t num_kept);

  const TokenSlots& slots_;
  std::span<const std::int32_t> column_token_;  // empty: rows go through slots
  const ValueBinsOptions& options_;
  const ValueBinsKernels& kernels_;
  RowReader reader_;
  CellEdges<float> edges_;
  CellWords words_;
  std::vector<double> sums_;  // per slot
  std::vector<std::int32_t> touched_;
  AlignedBuffer<double> slot_values_;
  AlignedBuffer<std::int32_t> tokens_;
  AlignedBuffer<float> kept_;
  AlignedBuffer<float> bins_;
  AlignedBuffer<float> dense_;
  AlignedBuffer<float> dense_kept_;
  AlignedBuffer<float> scratch_;
  AlignedBuffer<std::int32_t> places_;
};

MatchSummary RowTokenizer::match(const Row& row, const std::int32_t* token_of) {
  MatchArguments arguments{};
  arguments.columns = row.columns;
  arguments.values = row.values;
  arguments.values_are_f64 = row.values_are_f64;
  arguments.count = row.count;
  arguments.column_token = token_of;
  arguments.tokens = tokens_.reserve(row.count + 1);
  arguments.kept = kept_.reserve(row.count + 1);
  return kernels_.match(arguments);
}

/// The row as entries of slots, columns of one slot summed, then matched like any row.
MatchSummary RowTokenizer::match_slots(const Row& row) {
  touched_.clear();
  double total = 0.0;
  bool possible = true;
  for (std::int64_t i = 0; i < row.count; ++i) {
    const double value = row.value(i);
    total += value;
    possible &= value >= 0;
    const std::int32_t slot = slots_.column_slot[static_cast<std::size_t>(row.columns[i])];
    if (slot < 0) continue;
    touched_.push_back(slot);
    sums_[static_cast<std::size_t>(slot)] += value;
  }
  std::sort(touched_.begin(), touched_.end());
  touched_.erase(std::unique(touched_.begin(), touched_.end()), touched_.end());
  const auto count = static_cast<std::int64_t>(touched_.size());
  double* values = slot_values_.reserve(count);
  for (std::int64_t i = 0; i < count; ++i) {
    double& sum = sums_[static_cast<std::size_t>(touched_[static_cast<std::size_t>(i)])];
    values[i] = sum;
    sum = 0.0;
  }
  MatchSummary found = match({touched_.data(), values, true, count}, slots_.slot_token.data());
  found.total = total;
  found.possible = found.possible && possible;
  return found;
}

/// The bins of the tokens that match() kept, or their values where none are asked for.
const float* RowTokenizer::bin(std::int64_t row, const MatchSummary& found) {
  if (options_.quantiles.empty()) return kept_.data();
  const std::int64_t count = found.num_kept;
  const BinRange* ranges = edges_.find(kept_.data(), count, found.highest, found.whole);
  float* bins = bins_.reserve(count);
  switch (options_.rule) {
    case BinRule::left:
      for (std::int64_t i = 0; i < count; ++i) bins[i] = static_cast<float>(ranges[i] >> 16);
      break;
    case BinRule::seeded:
      kernels_.draw(ranges, words_.draw(kDrawBins, found.fingerprint, count), count, bins);
      break;
    case BinRule::given: {
      const std::int64_t first = options_.draw_offsets[static_cast<std::size_t>(row)];
      const std::int64_t given = options_.draw_offsets[static_cast<std::size_t>(row) + 1] - first;
      if (given != count) {
        fail("row " + std::to_string(row) + " has " + std::to_string(given) + " draws, expected " +
             std::to_string(count) + ", one for each value that is binned");
      }
      for (std::int64_t i = 0; i < count; ++i) {
        bins[i] =
            static_cast<float>(given_bin(ranges[i], options_.draws[static_cast<std::size_t>(first + i)]));
      }
      break;
    }
  }
  return bins;
}

/// One value a slot: those of the tokens kept, in the order of their slots, and 0 for all others.
const float* RowTokenizer::spread(const MatchSummary& found, const float* values) {
  const auto num_slots = static_cast<std::int64_t>(slots_.slot_token.size());
  float* dense = dense_.reserve(num_slots);
  float* expressed = dense_kept_.reserve(num_slots);
  std::fill(dense, dense + num_slots, 0.0f);
  std::fill(expressed, expressed + num_slots, 0.0f);
  std::int64_t next = 0;
  const double* sums = slot_values_.data();
  for (std::size_t i = 0; i < touched_.size() && next < found.num_kept; ++i) {
    if (static_cast<float>(sums[i]) == 0) continue;
    dense[touched_[i]] = values[next];
    expressed[touched_[i]] = kept_.data()[next];
    ++next;
  }
  return dense;
}

/// Places of the tokens that stay, of `count`; null where all do. expressed: their values before binning.
const std::int32_t* RowTokenizer::choose(const MatchSummary& found, const float* expressed,
                                         std::int64_t count, std::int64_t num_kept) {
  if (num_kept == count) return nullptr;
  std::int32_t* places = places_.reserve(count + 1);
  if (options_.kept == KeptTokens::any) {
    choose_any(words_.draw(kDrawKept, found.fingerprint, count), count, num_kept, places);
  } else {
    choose_largest(expressed, count, num_kept, scratch_, places);
  }
  return places;
}

std::int64_t RowTokenizer::tokenize(std::int64_t row_number, std::int32_t* tokens, float* values,
                                    ValueBinsResult& result) {
  const Row row = reader_.read(row_number);
  const MatchSummary found = column_token_.empty() ? match_slots(row) : match(row, column_token_.data());
  if (!found.possible) {
    fail("row " + std::to_string(row_number) + " has a value that is negative or not finite as float32");
  }
  const bool dense = options_.with_zeros;
  const std::int64_t count = dense ? static_cast<std::int64_t>(slots_.slot_token.size()) : found.num_kept;
  const auto r = static_cast<std::size_t>(row_number);
  result.num_gene_tokens[r] = static_cast<std::int32_t>(count);
  result.mapped_counts[r] = found.mapped;
  result.total_counts[r] = found.total;
  if (count == 0) return 0;
  const float* all = bin(row_number, found);
  if (dense) all = spread(found, all);
  const std::int32_t* all_tokens = dense ? slots_.slot_token.data() : tokens_.data();
  const std::int64_t num_prefix = options_.prefix_token >= 0 ? 1 : 0;
  const std::int64_t num_kept =
      options_.max_tokens < 0 ? count : std::min(count, options_.max_tokens - num_prefix);
  const std::int32_t* places = choose(found, dense ? dense_kept_.data() : kept_.data(), count, num_kept);
  if (num_prefix > 0) {
    *tokens++ = options_.prefix_token;
    *values++ = options_.prefix_value;
  }
  if (places == nullptr) {
    std::copy(all_tokens, all_tokens + count, tokens);
    std::copy(all, all + count, values);
  } else {
    for (std::int64_t i = 0; i < num_kept; ++i) tokens[i] = all_tokens[places[i]];
    for (std::int64_t i = 0; i < num_kept; ++i) values[i] = all[places[i]];
  }
  return num_prefix + num_kept;
}

/// Per column its token or -1, where that says all there is: no slot is fed twice or out of order, and zeros
/// are no tokens. Empty where it does not.
std::vector<std::int32_t> plain_tokens(const TokenSlots& slots, bool with_zeros) {
  std::vector<std::int32_t> tokens;
  if (with_zeros || slots.column_slot.empty()) return tokens;
  tokens.reserve(slots.column_slot.size());
  std::int32_t last = -1;
  for (const std::int32_t slot : slots.column_slot) {
    if (slot >= 0 && slot <= last) return {};
    last = std::max(last, slot);
    tokens.push_back(slot < 0 ? -1 : slots.slot_token[static_cast<std::size_t>(slot)]);
  }
  return tokens;
}

}  // namespace

ValueBinsResult value_bins(const CsrView& csr, const TokenSlots& slots, const ValueBinsOptions& options) {
  check(csr, slots, options);
  const std::vector<std::int32_t> column_token = plain_tokens(slots, options.with_zeros);
  const std::int64_t num_rows = csr.num_rows();
  const auto n = static_cast<std::size_t>(num_rows);
  ValueBinsResult result;
  result.cu_seqlens.resize(n + 1);
  result.num_gene_tokens.resize(n);
  result.mapped_counts.resize(n);
  result.total_counts.resize(n);

  const auto num_slots = static_cast<std::int64_t>(slots.slot_token.size());
  const auto longest = [&](std::int64_t row) {
    const auto r = static_cast<std::size_t>(row);
    std::int64_t tokens = options.with_zeros ? num_slots : csr.indptr[r + 1] - csr.indptr[r];
    tokens += options.prefix_token >= 0 ? 1 : 0;
    return options.max_tokens < 0 ? tokens : std::min(tokens, options.max_tokens);
  };
  std::int64_t capacity = 0;
  for (std::int64_t row = 0; row < num_rows; ++row) capacity += longest(row);
  const std::int64_t rows = options.with_zeros
                                ? std::clamp<std::int64_t>(kEntriesPerTask / (num_slots + 1), 1, 1024)
                                : rows_per_task(csr, kEntriesPerTask);
  const std::int64_t num_tasks = (num_rows + rows - 1) / rows;
  PackedWriter<float> writer(num_tasks, capacity, true);
  const int max_workers = num_threads();
  std::vector<std::unique_ptr<RowTokenizer>> tokenizers(static_cast<std::size_t>(max_workers));

  parallel_for(num_tasks, max_workers, [&](std::int64_t task, int worker) {
    auto& tokenizer = tokenizers[static_cast<std::size_t>(worker)];
    if (!tokenizer) tokenizer = std::make_unique<RowTokenizer>(csr, slots, column_token, options);
    const std::int64_t first = task * rows;
    const std::int64_t last = std::min(first + rows, num_rows);
    std::int64_t piece_capacity = 0;
    for (std::int64_t row = first; row < last; ++row) piece_capacity += longest(row);
    std::unique_ptr<PackedPiece<float>> piece = writer.take_piece();
    std::int32_t* tokens = piece->tokens.reserve(piece_capacity);
    float* values = piece->values.reserve(piece_capacity);
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

}  // namespace scfm
