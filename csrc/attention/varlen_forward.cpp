#include "attention/varlen_forward.hpp"

#include <algorithm>
#include <string>
#include <vector>

#include "attention/task_cuts.hpp"
#include "attention/varlen_forward_kernels.hpp"
#include "base/aligned_buffer.hpp"
#include "base/errors.hpp"
#include "cpu/isa.hpp"
#include "cpu/thread_pool.hpp"

namespace scfm {
namespace {

constexpr std::int64_t kSpanQueries = 768;  // of one span, at most

const VarlenForwardKernels& kernels() {
#ifdef SCFM_X86_SIMD
  static constexpr TablePerIsa<VarlenForwardKernels> kTables = {
      &varlen_forward_generic, &varlen_forward_avx2, &varlen_forward_avx512, &varlen_forward_avx512_bf16};
#else
  static constexpr TablePerIsa<VarlenForwardKernels> kTables = {
      &varlen_forward_generic, &varlen_forward_generic, &varlen_forward_generic, &varlen_forward_generic};
#endif
  return active_table(kTables);
}

/// Queries of one head of one cell. Their cut depends on the cell's length alone.
struct Span {
  std::int64_t cell;
  std::int64_t head;
  std::int64_t first;  // row of q
  std::int64_t count;
  std::int64_t work;
};

std::int64_t keys_of(const VarlenProblem& problem, std::int64_t cell) {
  if (problem.num_known != nullptr) return problem.num_known[cell];
  return problem.cu_seqlens_k[cell + 1] - problem.cu_seqlens_k[cell];
}

std::vector<Span> spans_of(const VarlenProblem& problem) {
  std::vector<Span> spans;
  for (std::int64_t cell = 0; cell < problem.num_cells; ++cell) {
    const std::int64_t begin = problem.cu_seqlens_q[cell];
    const std::int64_t length = problem.cu_seqlens_q[cell + 1] - begin;
    if (length == 0) continue;
    const std::int64_t parts = (length + kSpanQueries - 1) / kSpanQueries;
    const std::int64_t each = (length + parts - 1) / parts;
    for (std::int64_t first = 0; first < length; first += each) {
      const std::int64_t count = std::min(each, length - first);
      for (std::int64_t head = 0; head < problem.num_heads; ++head) {
        spans.push_back({cell, head, begin + first, count, count * (keys_of(problem, cell) + 64)});
      }
    }
  }
  std::stable_sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.work > b.work; });
  return spans;
}

const void* at(const VarlenProblem& problem, const VarlenTensor& tensor, std::int64_t row,
               std::int64_t head) {
  const std::int64_t offset = row * tensor.row_stride + head * tensor.head_stride;
  return static_cast<const char*>(tensor.data) + offset * (problem.is_bf16 ? 2 : 4);
}

VarlenSpan describe(const VarlenProblem& problem, const Span& span, const VarlenTensor& out, float* lse,
                    float* scratch) {
  const std::int64_t first_key = problem.cu_seqlens_k[span.cell];
  const std::int64_t num_keys = keys_of(problem, span.cell);
  const auto rows = [&](const VarlenTensor& tensor, std::int64_t row) {
    return AttentionRows{at(problem, tensor, row, span.head), tensor.row_stride};
  };
  const bool generative = problem.num_known != nullptr;
  const std::int64_t known_here =
      first_key + num_keys - span.first;  // queries of this span before the unknown ones
  const std::int64_t own_row = generative ? span.first : first_key;
  return {rows(problem.q, span.first),
          rows(problem.k, first_key),
          rows(problem.v, first_key),
          rows(problem.k, own_row),
          rows(problem.v, own_row),
          const_cast<void*>(at(problem, out, span.first, span.head)),
          out.row_stride,
          lse + span.first * problem.num_heads + span.head,
          problem.num_heads,
          span.count,
          num_keys,
          generative ? std::clamp<std::int64_t>(known_here, 0, span.count) : span.count,
          static_cast<int>(problem.head_dim),
          problem.scale,
          scratch,
          nullptr};
}

}  // namespace

void check_varlen(const VarlenProblem& problem, const char* function) {
  const std::string name(function);
  if (problem.head_dim < 1 || problem.head_dim > 256) {
    throw InvalidArgument(name + ": head_dim = " + std::to_string(problem.head_dim) + ", expected 1 to 256");
  }
  for (std::int64_t cell = 0; problem.num_known != nullptr && cell < problem.num_cells; ++cell) {
    const std::int64_t length = problem.cu_seqlens_k[cell + 1] - problem.cu_seqlens_k[cell];
    if (problem.num_known[cell] < 0 || problem.num_known[cell] > length) {
      throw InvalidArgument(name + ": num_known[" + std::to_string(cell) +
                            "] = " + std::to_string(problem.num_known[cell]) + ", the cell has " +
                            std::to_string(length) + " tokens");
    }
    if (problem.cu_seqlens_q[cell + 1] != problem.cu_seqlens_k[cell + 1]) {
      throw InvalidArgument(name + ": with num_known, cu_seqlens_q and cu_seqlens_k must be the same");
    }
  }
}

void varlen_forward(const VarlenProblem& problem, const VarlenTensor& out, float* lse) {
  check_varlen(problem, "varlen_forward");
  const VarlenForwardKernels& table = kernels();
  const std::vector<Span> spans = spans_of(problem);
  std::int64_t longest = 0;
  for (const Span& span : spans) longest = std::max(longest, span.count);
  const std::int64_t size = table.scratch_size(longest, static_cast<int>(problem.head_dim)) + 64;
  const std::vector<std::size_t> cuts = task_cuts(spans);
  const auto num_tasks = static_cast<std::int64_t>(cuts.size()) - 1;
  const int workers =
      static_cast<int>(std::min<std::int64_t>(num_threads(), std::max<std::int64_t>(num_tasks, 1)));
  AlignedBuffer<float> scratch;
  scratch.reserve(size * workers);
  parallel_for(num_tasks, workers, [&](std::int64_t task, int worker) {
    const std::size_t first = cuts[static_cast<std::size_t>(task)];
    const std::size_t last = cuts[static_cast<std::size_t>(task) + 1];
    const auto described = [&](std::size_t i) {
      return describe(problem, spans[i], out, lse, scratch.data() + size * worker);
    };
    VarlenSpan span = described(first);
    for (std::size_t i = first; i < last; ++i) {
      const bool more = i + 1 < last;
      const VarlenSpan next = described(more ? i + 1 : i);
      span.next = more ? &next : nullptr;
      (problem.is_bf16 ? table.span_bf16 : table.span_f32)(span);
      span = next;
    }
  });
}

}  // namespace scfm
