#include "attention/varlen_backward.hpp"

#include <algorithm>
#include <vector>

#include "attention/task_cuts.hpp"
#include "attention/varlen_backward_kernels.hpp"
#include "base/aligned_buffer.hpp"
#include "cpu/isa.hpp"
#include "cpu/thread_pool.hpp"

namespace scfm {
namespace {

const VarlenBackwardKernels& kernels() {
#ifdef SCFM_X86_SIMD
  static constexpr TablePerIsa<VarlenBackwardKernels> kTables = {
      &varlen_backward_generic, &varlen_backward_avx2, &varlen_backward_avx512, &varlen_backward_avx512_bf16};
#else
  static constexpr TablePerIsa<VarlenBackwardKernels> kTables = {
      &varlen_backward_generic, &varlen_backward_generic, &varlen_backward_generic, &varlen_backward_generic};
#endif
  return active_table(kTables);
}

/// The heads of a cell are its tasks: dq is summed over keys and dk over queries, each by one thread in one
/// order.
struct CellHead {
  std::int64_t cell;
  std::int64_t head;
  std::int64_t num_queries;
  std::int64_t work;
};

std::vector<CellHead> cell_heads(const VarlenProblem& problem) {
  std::vector<CellHead> tasks;
  for (std::int64_t cell = 0; cell < problem.num_cells; ++cell) {
    const std::int64_t queries = problem.cu_seqlens_q[cell + 1] - problem.cu_seqlens_q[cell];
    const std::int64_t keys = problem.cu_seqlens_k[cell + 1] - problem.cu_seqlens_k[cell];
    if (queries == 0 && keys == 0) continue;
    for (std::int64_t head = 0; head < problem.num_heads; ++head) {
      tasks.push_back({cell, head, queries, (queries + 32) * (keys + 32)});
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const CellHead& a, const CellHead& b) { return a.work > b.work; });
  return tasks;
}

VarlenGradientTask describe(const VarlenProblem& problem, const VarlenTensor& grad_out,
                            const VarlenForwardResult& result, const VarlenGradients& gradients,
                            const CellHead& task, float* scratch) {
  const std::int64_t size = problem.is_bf16 ? 2 : 4;
  const std::int64_t first_query = problem.cu_seqlens_q[task.cell];
  const std::int64_t first_key = problem.cu_seqlens_k[task.cell];
  const std::int64_t key_rows = problem.cu_seqlens_k[task.cell + 1] - first_key;
  const auto at = [&](const VarlenTensor& tensor, std::int64_t row) {
    return static_cast<char*>(tensor.data) +
           (row * tensor.row_stride + task.head * tensor.head_stride) * size;
  };
  const auto rows = [&](const VarlenTensor& tensor, std::int64_t row) {
    return AttentionRows{at(tensor, row), tensor.row_stride};
  };
  const auto written = [&](const VarlenTensor& tensor, std::int64_t row) {
    return GradientRows{at(tensor, row), tensor.row_stride};
  };
  return {rows(grad_out, first_query),
          rows(problem.q, first_query),
          rows(problem.k, first_key),
          rows(problem.v, first_key),
          rows(result.out, first_query),
          result.lse + first_query * problem.num_heads + task.head,
          problem.num_heads,
          written(gradients.dq, first_query),
          written(gradients.dk, first_key),
          written(gradients.dv, first_key),
          task.num_queries,
          problem.num_known != nullptr ? problem.num_known[task.cell] : key_rows,
          key_rows,
          static_cast<int>(problem.head_dim),
          problem.scale,
          scratch,
          nullptr};
}

}  // namespace

void varlen_backward(const VarlenProblem& problem, const VarlenTensor& grad_out,
                     const VarlenForwardResult& result, const VarlenGradients& gradients) {
  check_varlen(problem, "varlen_backward");
  const VarlenBackwardKernels& table = kernels();
  const std::vector<CellHead> tasks = cell_heads(problem);
  std::int64_t longest = 0;
  for (const CellHead& task : tasks) longest = std::max(longest, task.num_queries);
  const std::int64_t size = table.scratch_size(longest, static_cast<int>(problem.head_dim)) + 64;
  const std::vector<std::size_t> cuts = task_cuts(tasks);
  const auto num_tasks = static_cast<std::int64_t>(cuts.size()) - 1;
  const int workers =
      static_cast<int>(std::min<std::int64_t>(num_threads(), std::max<std::int64_t>(num_tasks, 1)));
  AlignedBuffer<float> scratch;
  scratch.reserve(size * workers);
  parallel_for(num_tasks, workers, [&](std::int64_t cut, int worker) {
    const std::size_t last = cuts[static_cast<std::size_t>(cut) + 1];
    const auto described = [&](std::size_t i) {
      return describe(problem, grad_out, result, gradients, tasks[i], scratch.data() + size * worker);
    };
    VarlenGradientTask task = described(cuts[static_cast<std::size_t>(cut)]);
    for (std::size_t i = cuts[static_cast<std::size_t>(cut)]; i < last; ++i) {
      const bool more = i + 1 < last;
      const VarlenGradientTask next = described(more ? i + 1 : i);
      task.next = more ? &next : nullptr;
      (problem.is_bf16 ? table.task_bf16 : table.task_f32)(task);
      task = next;
    }
  });
}

}  // namespace scfm
