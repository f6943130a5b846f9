#include "attention/favor_forward.hpp"

#include "attention/favor_work.hpp"

namespace scfm {
namespace {

constexpr std::int64_t kQueryTokens = 960;  // of a task; whole blocks

/// Sums of the keys, each span relative to its own maximum (or the given one); returns the maxima in base 2.
std::vector<float> sum_keys(const FavorProblem& problem, FavorWork& work, const std::vector<FavorCell>& group,
                            const float* key_max) {
  std::vector<float> maxima(static_cast<std::size_t>(work.num_blocks()));
  work.for_each(work.tasks(group, 0), [&](const FavorTask& task, float* scratch) {
    const float given = problem.given_max ? key_max[task.cell->index] * kLog2E : 0.0f;
    const FavorLargest largest = work.kernels().key_span(
        {work.shape(), work.projection(), work.rows(problem.k, task), work.rows(problem.v, task), task.count,
         problem.given_max, false, true, given, work.layout().sums_at(work.sums(task.block)), scratch});
    maxima[static_cast<std::size_t>(task.block)] = problem.given_max ? given : largest.value;
  });
  return maxima;
}

/// Turns each cell's maxima into the factors that make its sums relative to the largest of them.
void scales_of(const FavorProblem& problem, const std::vector<FavorCell>& group, std::vector<float>& maxima,
               float* key_max) {
  for (const FavorCell& cell : group) {
    const auto begin = maxima.begin() + cell.first_block;
    const auto end = begin + cell.num_spans * problem.num_heads;
    const float largest = *std::max_element(begin, end);
    if (!problem.given_max) key_max[cell.index] = largest * kLn2;
    std::transform(begin, end, begin, [largest](float maximum) { return std::exp2(maximum - largest); });
  }
}

}  // namespace

void favor_forward(const FavorProblem& problem, const FavorTensor& out, float* key_max) {
  FavorWork work(problem);
  if (!problem.given_max) {
    std::fill(key_max, key_max + problem.num_cells, -std::numeric_limits<float>::infinity());
  }
  for (auto group = work.next_group(); !group.empty(); group = work.next_group()) {
    std::vector<float> scales = sum_keys(problem, work, group, key_max);
    scales_of(problem, group, scales, key_max);
    work.for_each(work.cell_heads(group),
                  [&](const FavorTask& task, float*) { work.merge(task, scales.data() + task.block); });
    work.for_each(work.tasks(group, kQueryTokens), [&](const FavorTask& task, float* scratch) {
      const FavorSums merged =
          work.layout().sums_at(work.sums(task.cell->first_block + task.head * task.cell->num_spans));
      work.kernels().query_span({work.shape(), work.projection(), work.rows(problem.q, task),
                                 work.rows(out, task), task.count, merged.products, merged.weighted,
                                 scratch});
    });
  }
}

}  // namespace scfm
