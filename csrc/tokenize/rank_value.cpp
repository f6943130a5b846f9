#include "tokenize/rank_value.hpp"

#include <algorithm>
#include <string>

#include "cpu/thread_pool.hpp"
#include "tokenize/rank_dispatch.hpp"
#include "tokenize/rank_order.hpp"
#include "tokenize/row_reader.hpp"

namespace scfm {
namespace {

// 16 cells of 2,000 genes: 256 KB in, 128 KB out, so that a piece stays in the second-level cache until it is
// copied.
constexpr std::int64_t kEntriesPerTask = 1 << 15;

std::int64_t num_specials(const RankValueOptions& options) noexcept {
  return (options.prefix_token >= 0 ? 1 : 0) + (options.suffix_token >= 0 ? 1 : 0);
}

void check(const CsrView& csr, std::span<const double> library_size, const RankValueOptions& options) {
  const auto fail = [](const std::string& message) { throw InvalidArgument("rank_value: " + message); };
  if (csr.num_columns != csr.num_data) {
    fail("indices has " + std::to_string(csr.num_columns) + " entries, expected " +
         std::to_string(csr.num_data) + " as in data");
  }
  require_indptr(csr.indptr, csr.num_data, "rank_value");
  if (static_cast<std::int64_t>(library_size.size()) != csr.num_rows()) {
    fail("library_size has " + std::to_string(library_size.size()) + " entries, expected " +
         std::to_string(csr.num_rows()) + ", one per cell");
  }
  if (options.max_tokens != -1 && options.max_tokens <= num_specials(options)) {
    fail("max_tokens = " + std::to_string(options.max_tokens) + ", expected -1 or more than the " +
         std::to_string(num_specials(options)) + " special tokens");
  }
  if (options.prefix_token < -1 || options.suffix_token < -1) {
    fail("prefix_token = " + std::to_string(options.prefix_token) + " and suffix_token = " +
         std::to_string(options.suffix_token) + ", expected token ids, or -1 for none");
  }
}

std::int64_t genes_kept(std::int64_t num_genes, const RankValueOptions& options) noexcept {
  return options.max_tokens < 0 ? num_genes : std::min(num_genes, options.max_tokens - num_specials(options));
}

/// The longest that a row of `entries` entries can become. Summed slots need an entry each, so they add
/// nothing.
std::int64_t longest(std::int64_t entries, const RankValueOptions& options) noexcept {
  return entries == 0 ? 0 : genes_kept(entries, options) + num_specials(options);
}

/// Turns rows into tokens, one at a time; a thread has its own, for the scratch space in it.
class RowTokenizer {
 public:
  RowTokenizer(const CsrView& csr, const GeneTable& table, const RankKernels& kernels,
               const RankValueOptions& options)
      : table_(table),
        kernels_(kernels),
        options_(options),
        reader_(csr, kernels, "rank_value"),
        sums_(table.summed_factors.size()) {}

  /// Writes the row's tokens (and counts, unless null); returns how many.
  std::int64_t tokenize(std::int64_t row, double library_size, std::int32_t* tokens, double* counts,
                        RankValueResult& result);

 private:
  KeySummary find_keys(const Row& row, double library_size);
  void append_sums(const Row& row, double library_size, KeySummary& keys);
  std::int64_t write(const KeySummary& keys, std::int64_t num_kept, std::int32_t* tokens,
                     double* counts) const;

  const GeneTable& table_;
  const RankKernels& kernels_;
  const RankValueOptions& options_;
  RowReader reader_;
  RankOrder order_;
  std::vector<double> sums_;
  AlignedBuffer<std::uint64_t> keys_;
  AlignedBuffer<std::int32_t> genes_;
  AlignedBuffer<double> counts_;
  AlignedBuffer<std::int32_t> tail_genes_;
  AlignedBuffer<double> tail_counts_;
};

KeySummary RowTokenizer::find_keys(const Row& row, double library_size) {
  KeyArguments arguments{};
  arguments.columns = row.columns;
  arguments.values = row.values;
  arguments.values_are_f64 = row.values_are_f64;
  arguments.count = row.count;
  arguments.factors = table_.factors.data();
  arguments.library_size = library_size;
  arguments.arithmetic = table_.arithmetic;
  arguments.keep_zeros = options_.keep_zeros;
  arguments.keys = keys_.reserve(row.count);
  arguments.genes = genes_.reserve(row.count);
  arguments.tail_genes = tail_genes_.reserve(row.count);
  if (options_.with_counts) {
    arguments.counts = counts_.reserve(row.count);
    arguments.tail_counts = tail_counts_.reserve(row.count);
  }
  KeySummary keys = kernels_.make_keys(arguments);
  if (table_.num_summed > 0) append_sums(row, library_size, keys);
  return keys;
}

/// Adds the slots that several columns feed. Every slot with a sum has an entry that made no key of its own,
/// so there is room.
void RowTokenizer::append_sums(const Row& row, double library_size, KeySummary& keys) {
  std::fill(sums_.begin(), sums_.end(), 0.0);
  for (std::int64_t i = 0; i < row.count; ++i) {
    const std::int64_t slot = table_.column_slot[static_cast<std::size_t>(row.columns[i])];
    if (slot >= table_.num_single) sums_[static_cast<std::size_t>(slot - table_.num_single)] += row.value(i);
  }
  const bool divides = table_.arithmetic == RankArithmetic::divide64;
  const double scale = divides ? library_size : 1.0 / library_size;
  for (std::size_t j = 0; j < sums_.size(); ++j) {
    keys.mapped_counts += sums_[j];
    if (sums_[j] == 0.0) continue;
    const double count = (divides ? sums_[j] / scale : sums_[j] * scale) * 10000.0;
    const double ranked = divides ? count / table_.summed_factors[j] : count * table_.summed_factors[j];
    const auto gene = static_cast<std::int32_t>(table_.num_genes + static_cast<std::int64_t>(j));
    if (ranked > 0.0) {
      const auto key = __builtin_bit_cast(std::uint64_t, ranked);
      keys.lowest = keys.num_keys > 0 ? std::min(keys.lowest, key) : key;
      keys.highest = keys.num_keys > 0 ? std::max(keys.highest, key) : key;
      keys_.data()[keys.num_keys] = key;
      genes_.data()[keys.num_keys] = gene;
      if (options_.with_counts) counts_.data()[keys.num_keys] = count;
      ++keys.num_keys;
    } else {
      tail_genes_.data()[keys.num_tail] = gene;
      if (options_.with_counts) tail_counts_.data()[keys.num_tail] = count;
      ++keys.num_tail;
    }
  }
}

std::int64_t RowTokenizer::write(const KeySummary& keys, std::int64_t num_kept, std::int32_t* tokens,
                                 double* counts) const {
  const std::int32_t* genes = genes_.data();
  const std::int32_t* tail = tail_genes_.data();
  const std::int32_t* token_of = table_.tokens.data();
  const std::int64_t num_sorted = std::min(num_kept, keys.num_keys);
  std::int64_t length = 0;
  if (options_.prefix_token >= 0) {
    if (counts != nullptr) counts[length] = 0.0;
    tokens[length++] = options_.prefix_token;
  }
  if (counts != nullptr) {
    for (std::int64_t rank = 0; rank < num_sorted; ++rank)
      counts[length + rank] = counts_.data()[order_.index(rank)];
    for (std::int64_t i = 0; i < num_kept - num_sorted; ++i)
      counts[length + num_sorted + i] = tail_counts_.data()[i];
  }
  for (std::int64_t rank = 0; rank < num_sorted; ++rank)
    tokens[length++] = token_of[genes[order_.index(rank)]];
  for (std::int64_t i = 0; i < num_kept - num_sorted; ++i) tokens[length++] = token_of[tail[i]];
  if (options_.suffix_token >= 0) {
    if (counts != nullptr) counts[length] = 0.0;
    tokens[length++] = options_.suffix_token;
  }
  return length;
}

std::int64_t RowTokenizer::tokenize(std::int64_t row_number, double library_size, std::int32_t* tokens,
                                    double* counts, RankValueResult& result) {
  const Row row = reader_.read(row_number);
  const KeySummary keys = find_keys(row, library_size);
  const std::int64_t num_tokens = keys.num_keys + keys.num_tail;
  const auto r = static_cast<std::size_t>(row_number);
  result.num_gene_tokens[r] = static_cast<std::int32_t>(num_tokens);
  result.mapped_counts[r] = keys.mapped_counts;
  result.total_counts[r] = keys.total_counts;
  if (num_tokens == 0) return 0;
  order_.sort(kernels_, keys_.data(), keys.num_keys, keys.lowest, keys.highest);
  return write(keys, genes_kept(num_tokens, options_), tokens, counts);
}

}  // namespace

RankValueResult rank_value(const CsrView& csr, std::span<const double> library_size, const GeneSlots& slots,
                           const RankValueOptions& options) {
  check(csr, library_size, options);
  const GeneTable table = make_gene_table(slots, options.arithmetic);
  if (csr.num_genes != table.num_genes) {
    throw InvalidArgument("rank_value: column_slot has " + std::to_string(table.num_genes) +
                          " entries, expected " + std::to_string(csr.num_genes) + ", one per gene");
  }
  const RankKernels& kernels = active_rank_kernels();
  const std::int64_t num_rows = csr.num_rows();
  const auto n = static_cast<std::size_t>(num_rows);
  RankValueResult result;
  result.cu_seqlens.resize(n + 1);
  result.num_gene_tokens.resize(n);
  result.mapped_counts.resize(n);
  result.total_counts.resize(n);

  const auto entries = [&csr](std::int64_t row) {
    return csr.indptr[static_cast<std::size_t>(row) + 1] - csr.indptr[static_cast<std::size_t>(row)];
  };
  std::int64_t capacity = 0;
  for (std::int64_t row = 0; row < num_rows; ++row) capacity += longest(entries(row), options);
  const std::int64_t rows = rows_per_task(csr, kEntriesPerTask);
  const std::int64_t num_tasks = (num_rows + rows - 1) / rows;
  PackedWriter<double> writer(num_tasks, capacity, options.with_counts);
  const int max_workers = num_threads();
  std::vector<std::unique_ptr<RowTokenizer>> tokenizers(static_cast<std::size_t>(max_workers));

  parallel_for(num_tasks, max_workers, [&](std::int64_t task, int worker) {
    auto& tokenizer = tokenizers[static_cast<std::size_t>(worker)];
    if (!tokenizer) tokenizer = std::make_unique<RowTokenizer>(csr, table, kernels, options);
    const std::int64_t first = task * rows;
    const std::int64_t last = std::min(first + rows, num_rows);
    std::int64_t piece_capacity = 0;
    for (std::int64_t row = first; row < last; ++row) piece_capacity += longest(entries(row), options);
    std::unique_ptr<PackedPiece<double>> piece = writer.take_piece();
    std::int32_t* tokens = piece->tokens.reserve(piece_capacity);
    double* counts = options.with_counts ? piece->values.reserve(piece_capacity) : nullptr;
    std::int64_t size = 0;
    for (std::int64_t row = first; row < last; ++row) {
      const std::int64_t length =
          tokenizer->tokenize(row, library_size[static_cast<std::size_t>(row)], tokens + size,
                              counts == nullptr ? nullptr : counts + size, result);
      result.cu_seqlens[static_cast<std::size_t>(row) + 1] = length;
      size += length;
    }
    piece->size = size;
    writer.finish(task, std::move(piece));
  });

  writer.cut_to_size();
  for (std::size_t row = 0; row < n; ++row) result.cu_seqlens[row + 1] += result.cu_seqlens[row];
  result.token_ids = std::move(writer.tokens);
  result.counts = std::move(writer.values);
  return result;
}

}  // namespace scfm
