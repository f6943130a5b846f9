#include "attention/embed_norm.hpp"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "base/aligned_buffer.hpp"
#include "base/errors.hpp"
#include "cpu/isa.hpp"
#include "cpu/thread_pool.hpp"

namespace scfm {
namespace {

#ifdef SCFM_X86_SIMD
constexpr TablePerIsa<EmbedNormKernels> kTables = {&embed_norm_generic, &embed_norm_avx2, &embed_norm_avx512,
                                                   &embed_norm_avx512};
#else
constexpr TablePerIsa<EmbedNormKernels> kTables = {&embed_norm_generic, &embed_norm_generic,
                                                   &embed_norm_generic, &embed_norm_generic};
#endif

constexpr std::int64_t kTokensPerTask = 64;
// The backward goes by chunks of tokens, whose gradients of x stay in the cache until they are added to the
// tables'; and, for weight and bias, by parts of a chunk.
constexpr std::int64_t kTokensPerPart = 128;
constexpr std::int64_t kPartsPerChunk = 32;
constexpr std::int64_t kTokensPerChunk = kTokensPerPart * kPartsPerChunk;
constexpr std::int64_t kRowsPerTask = 64;  // of tokens, that one task adds up
constexpr std::int64_t kValuesPerSlice = 64;
constexpr std::int64_t kValuesPerClear = std::int64_t{1} << 18;

std::int64_t id_at(const EmbedTable& table, std::int64_t token) {
  return table.ids_are_64 ? static_cast<const std::int64_t*>(table.ids)[token]
                          : static_cast<const std::int32_t*>(table.ids)[token];
}

void check_ids(const EmbedNormProblem& problem, const char* function) {
  for (std::size_t n = 0; n < problem.tables.size(); ++n) {
    for (std::int64_t token = 0; token < problem.num_tokens; ++token) {
      const std::int64_t id = id_at(problem.tables[n], token);
      if (id >= 0 && id < problem.table_rows[n]) continue;
      throw InvalidArgument(std::string(function) + ": ids[" + std::to_string(n) + "][" +
                            std::to_string(token) + "] = " + std::to_string(id) +
                            " is out of range for the " + std::to_string(problem.table_rows[n]) +
                            " rows of table " + std::to_string(n));
    }
  }
}

EmbedInputs inputs_of(const EmbedNormProblem& problem) {
  return {.tables = problem.tables.data(),
          .num_tables = static_cast<std::int64_t>(problem.tables.size()),
          .addend = problem.addend,
          .weight = problem.weight,
          .bias = problem.bias,
          .size = problem.size};
}

void clear(float* values, std::int64_t count) {
  parallel_for((count + kValuesPerClear - 1) / kValuesPerClear, num_threads(), [&](std::int64_t task, int) {
    const std::int64_t begin = task * kValuesPerClear;
    std::fill(values + begin, values + std::min(begin + kValuesPerClear, count), 0.0f);
  });
}

/// Some tokens of a table sorted by id, those of one id in their order.
struct TokensById {
  std::vector<std::int64_t> tokens;    // less `begin`
  std::vector<std::int64_t> starts{};  // of each id that occurs, and the end

  TokensById(const EmbedTable& table, std::int64_t num_ids, std::int64_t begin, std::int64_t end)
      : tokens(static_cast<std::size_t>(end - begin)) {
    std::vector<std::int64_t> next(static_cast<std::size_t>(num_ids), 0);
    for (std::int64_t token = begin; token < end; ++token)
      ++next[static_cast<std::size_t>(id_at(table, token))];
    std::int64_t size = 0;
    for (std::int64_t& place : next) {
      if (place != 0) starts.push_back(size);
      size += std::exchange(place, size);
    }
    starts.push_back(size);
    for (std::int64_t token = begin; token < end; ++token) {
      tokens[static_cast<std::size_t>(next[static_cast<std::size_t>(id_at(table, token))]++)] = token - begin;
    }
  }
};

/// Some of the ids that occur, or some values of the row of one that many tokens have.
struct TableTask {
  std::size_t first, last;  // into TokensById::starts
  std::int64_t begin, end;
};

std::vector<TableTask> table_tasks(const TokensById& sorted, std::int64_t size) {
  const std::vector<std::int64_t>& starts = sorted.starts;
  std::vector<TableTask> tasks;
  std::size_t next = 0;
  while (next + 1 < starts.size()) {
    const std::size_t first = next++;
    if (starts[next] - starts[first] > kRowsPerTask) {
      for (std::int64_t at = 0; at < size; at += kValuesPerSlice) {
        tasks.push_back({first, next, at, std::min(at + kValuesPerSlice, size)});
      }
      continue;
    }
    while (next + 1 < starts.size() && starts[next + 1] - starts[first] <= kRowsPerTask) ++next;
    tasks.push_back({first, next, 0, size});
  }
  return tasks;
}

/// Adds the gradients of the tokens from begin on, rows of grad_sums, to their ids' rows of a table's
/// gradient.
void add_to_table(const EmbedNormKernels& kernels, const EmbedNormProblem& problem, std::size_t table,
                  std::int64_t begin, std::int64_t end, const EmbedRows& grad_sums, float* gradient) {
  const EmbedTable& rows = problem.tables[table];
  const TokensById sorted(rows, problem.table_rows[table], begin, end);
  const std::vector<TableTask> tasks = table_tasks(sorted, problem.size);
  parallel_for(static_cast<std::int64_t>(tasks.size()), num_threads(), [&](std::int64_t number, int) {
    const TableTask& task = tasks[static_cast<std::size_t>(number)];
    for (std::size_t i = task.first; i < task.last; ++i) {
      const std::int64_t* tokens = sorted.tokens.data() + sorted.starts[i];
      kernels.add_rows({.rows = grad_sums,
                        .row_size = problem.size,
                        .order = tokens,
                        .count = sorted.starts[i + 1] - sorted.starts[i],
                        .begin = task.begin,
                        .end = task.end,
                        .out = gradient + id_at(rows, begin + *tokens) * problem.size});
    }
  });
}

/// The part of the backward that goes through the LayerNorm, chunk by chunk.
class NormBackward {
 public:
  NormBackward(const EmbedNormKernels& kernels, const EmbedNormProblem& problem, const EmbedRows& grad_out,
               const float* mean, const float* rstd, const EmbedNormGradients& gradients)
      : kernels_(kernels),
        problem_(problem),
        grad_out_(grad_out),
        mean_(mean),
        rstd_(rstd),
        gradients_(gradients),
        padded_(padded_size(problem.size)),
        scratch_(static_cast<std::size_t>(max_workers_)) {
    clear(gradients.weight, problem.size);
    clear(gradients.bias, problem.size);
    parts_.reserve(kPartsPerChunk * 2 * padded_);
  }

  /// Gradients of the addend, weight and bias, and those of x, which it returns, for a chunk of tokens.
  EmbedRows chunk(std::int64_t begin, std::int64_t end) {
    const EmbedRows& addend = gradients_.addend;
    const bool addend_holds = addend.data != nullptr && !addend.is_bf16;  // what would be written twice
    float* sums = addend_holds
                      ? static_cast<float*>(addend.data) + begin * problem_.size
                      : sums_.reserve(std::min(problem_.num_tokens, kTokensPerChunk) * problem_.size);
    const std::int64_t num_parts = (end - begin + kTokensPerPart - 1) / kTokensPerPart;
    parallel_for(num_parts, max_workers_, [&](std::int64_t part, int worker) {
      float* mine = parts_.data() + part * 2 * padded_;
      kernels_.backward({.inputs = inputs_of(problem_),
                         .begin = begin + part * kTokensPerPart,
                         .end = std::min(begin + (part + 1) * kTokensPerPart, end),
                         .grad_out = grad_out_,
                         .mean = mean_,
                         .rstd = rstd_,
                         .grad_sums = sums,
                         .origin = begin,
                         .grad_addend = addend_holds ? EmbedRows{nullptr, false} : addend,
                         .grad_weight = mine,
                         .grad_bias = mine + padded_,
                         .scratch = scratch_[static_cast<std::size_t>(worker)].reserve(padded_)});
    });
    add_parts(0, num_parts, gradients_.weight);
    add_parts(padded_, num_parts, gradients_.bias);
    return {sums, false};
  }

 private:
  void add_parts(std::int64_t offset, std::int64_t num_parts, float* out) {
    kernels_.add_rows({.rows = {parts_.data() + offset, false},
                       .row_size = 2 * padded_,
                       .order = nullptr,
                       .count = num_parts,
                       .begin = 0,
                       .end = problem_.size,
                       .out = out});
  }

  const EmbedNormKernels& kernels_;
  const EmbedNormProblem& problem_;
  const EmbedRows& grad_out_;
  const float* mean_;
  const float* rstd_;
  const EmbedNormGradients& gradients_;
  std::int64_t padded_;
  int max_workers_ = num_threads();
  std::vector<AlignedBuffer<float>> scratch_;
  AlignedBuffer<float> parts_;  // of weight and bias, side by side
  AlignedBuffer<float> sums_;
};

}  // namespace

void embed_norm_forward(const EmbedNormProblem& problem, const EmbedRows& out, float* mean, float* rstd,
                        float eps) {
  check_ids(problem, "embed_norm_forward");
  const EmbedNormKernels& kernels = active_table(kTables);
  const int max_workers = num_threads();
  std::vector<AlignedBuffer<float>> scratch(static_cast<std::size_t>(max_workers));
  const std::int64_t num_tasks = (problem.num_tokens + kTokensPerTask - 1) / kTokensPerTask;
  parallel_for(num_tasks, max_workers, [&](std::int64_t task, int worker) {
    kernels.forward(
        {.inputs = inputs_of(problem),
         .begin = task * kTokensPerTask,
         .end = std::min((task + 1) * kTokensPerTask, problem.num_tokens),
         .eps = eps,
         .out = out,
         .mean = mean,
         .rstd = rstd,
         .scratch = scratch[static_cast<std::size_t>(worker)].reserve(padded_size(problem.size))});
  });
}

void embed_norm_backward(const EmbedNormProblem& problem, const EmbedRows& grad_out, const float* mean,
                         const float* rstd, const EmbedNormGradients& gradients) {
  check_ids(problem, "embed_norm_backward");
  const EmbedNormKernels& kernels = active_table(kTables);
  const auto num_tables = problem.tables.size();
  for (std::size_t n = 0; n < num_tables; ++n)
    clear(gradients.tables[n], problem.table_rows[n] * problem.size);
  const auto add_to_tables = [&](std::int64_t begin, std::int64_t end, const EmbedRows& grad_sums) {
    for (std::size_t n = 0; n < num_tables; ++n) {
      add_to_table(kernels, problem, n, begin, end, grad_sums, gradients.tables[n]);
    }
  };
  if (problem.weight == nullptr) {  // the gradient passes through
    if (gradients.addend.data != nullptr) {
      std::memcpy(gradients.addend.data, grad_out.data,
                  static_cast<std::size_t>(problem.num_tokens * problem.size) * (grad_out.is_bf16 ? 2 : 4));
    }
    add_to_tables(0, problem.num_tokens, grad_out);
    return;
  }
  NormBackward norm(kernels, problem, grad_out, mean, rstd, gradients);
  for (std::int64_t begin = 0; begin < problem.num_tokens; begin += kTokensPerChunk) {
    const std::int64_t end = std::min(begin + kTokensPerChunk, problem.num_tokens);
    add_to_tables(begin, end, norm.chunk(begin, end));
  }
}

}  // namespace scfm
