#include "attention/favor_backward.hpp"

#include <tuple>

#include "attention/favor_work.hpp"

namespace scfm {
namespace {

/// The element of a_k that is a cell's maximum.
struct Winner {
  std::int64_t token = -1;  // in the cell
  std::int64_t head = 0;
  int feature = 0;
};

class Backward {
 public:
  Backward(const FavorProblem& problem, const FavorTensor& grad_out, const FavorGradients& gradients,
           const float* key_max, float* key_max_grad)
      : problem_(problem),
        grad_out_(grad_out),
        gradients_(gradients),
        key_max_(key_max),
        key_max_grad_(key_max_grad),
        work_(problem) {}

  void run() {
    std::fill(key_max_grad_, key_max_grad_ + problem_.num_cells, 0.0f);
    for (auto group = work_.next_group(); !group.empty(); group = work_.next_group()) {
      contexts_.reserve(work_.num_cell_heads() * work_.layout().context);
      kept_.reserve(static_cast<std::int64_t>(group.size()) * work_.layout().dim_padded);
      ones_.assign(static_cast<std::size_t>(work_.num_blocks()), 1.0f);
      const auto spans = work_.tasks(group, 0);
      const auto heads = work_.cell_heads(group);
      find_winners(group, sum_keys(spans));
      lay_out(heads);
      differentiate_queries(spans);
      lay_out(heads);
      differentiate_keys(group, spans);
    }
  }

 private:
  float maximum(const FavorTask& task) const { return key_max_[task.cell->index] * kLog2E; }
  FavorContext context(const FavorTask& task) {
    return work_.layout().context_at(
        contexts_.data() + (task.cell->first_head + task.head) * work_.layout().context,
        work_.shape().head_dim);
  }
  FavorSums sums(const FavorTask& task) { return work_.layout().sums_at(work_.sums(task.block)); }

  /// The forward's context, in sums of spans; returns each span's largest a_k.
  std::vector<FavorLargest> sum_keys(const std::vector<FavorTask>& spans) {
    std::vector<FavorLargest> largest(spans.size());
    work_.for_each(spans, [&](const FavorTask& task, float* scratch) {
      largest[static_cast<std::size_t>(task.block)] = work_.kernels().key_span(
          {work_.shape(), work_.projection(), work_.rows(problem_.k, task), work_.rows(problem_.v, task),
           task.count, true, !problem_.given_max, false, maximum(task), sums(task), scratch});
    });
    return largest;
  }

  void find_winners(const std::vector<FavorCell>& group, const std::vector<FavorLargest>& largest) {
    winners_.assign(group.size(), Winner{});
    for (std::size_t i = 0; i < group.size(); ++i) {
      const FavorCell& cell = group[i];
      float best = -std::numeric_limits<float>::infinity();
      for (std::int64_t block = 0; block < cell.num_spans * problem_.num_heads; ++block) {
        const FavorLargest& of = largest[static_cast<std::size_t>(cell.first_block + block)];
        if (of.token < 0) continue;
        const Winner candidate{block % cell.num_spans * cell.span_length + of.token, block / cell.num_spans,
                               of.feature};
        Winner& winner = winners_[i];
        const bool earlier = std::tie(candidate.token, candidate.head) < std::tie(winner.token, winner.head);
        if (winner.token < 0 || of.value > best || (of.value == best && earlier)) {
          best = of.value;
          winner = candidate;
        }
      }
    }
  }

  /// Merges the spans' sums and lays the result out for the products that use it.
  void lay_out(const std::vector<FavorTask>& heads) {
    work_.for_each(heads, [&](const FavorTask& task, float*) {
      work_.merge(task, ones_.data());
      const FavorSums merged = sums(task);
      work_.kernels().lay_out_context(work_.shape(), merged.products, merged.weighted, context(task));
    });
  }

  /// dq, and the sums that make the gradient of the context.
  void differentiate_queries(const std::vector<FavorTask>& spans) {
    work_.for_each(spans, [&](const FavorTask& task, float* scratch) {
      work_.kernels().query_gradient_span({work_.shape(), work_.projection(), work_.rows(problem_.q, task),
                                           work_.rows(grad_out_, task), work_.rows(gradients_.q, task),
                                           task.count, context(task), sums(task), scratch});
    });
  }

  /// dk and dv; then the gradients of the maxima.
  void differentiate_keys(const std::vector<FavorCell>& group, const std::vector<FavorTask>& spans) {
    std::vector<double> d_maximum(spans.size());
    work_.for_each(spans, [&](const FavorTask& task, float* scratch) {
      const FavorCell& cell = *task.cell;
      const auto i = static_cast<std::size_t>(&cell - group.data());
      const Winner& winner = winners_[i];
      const bool here = winner.token >= task.first && winner.head == task.head;
      d_maximum[static_cast<std::size_t>(task.block)] = work_.kernels().key_gradient_span(
          {work_.shape(), work_.projection(), work_.rows(problem_.k, task), work_.rows(problem_.v, task),
           work_.rows(gradients_.k, task), work_.rows(gradients_.v, task), task.count, maximum(task),
           context(task), work_.sums(cell.first_block + task.head * cell.num_spans),
           here ? winner.token - task.first : -1, kept(i), scratch});
    });
    for (std::size_t i = 0; i < group.size(); ++i) {
      const FavorCell& cell = group[i];
      double total = 0.0;
      for (std::int64_t block = 0; block < cell.num_spans * problem_.num_heads; ++block) {
        total += d_maximum[static_cast<std::size_t>(cell.first_block + block)];
      }
      key_max_grad_[cell.index] = static_cast<float>(total);
      const Winner& winner = winners_[i];
      if (winner.token < 0) continue;
      work_.kernels().store_row(
          work_.row(gradients_.k, cell.first_token + winner.token, winner.head), work_.shape(), kept(i),
          work_.projection().rows + winner.feature * work_.layout().dim_padded, static_cast<float>(total));
    }
  }

  float* kept(std::size_t i) {
    return kept_.data() + static_cast<std::int64_t>(i) * work_.layout().dim_padded;
  }

  const FavorProblem& problem_;
  const FavorTensor& grad_out_;
  const FavorGradients& gradients_;
  const float* key_max_;
  float* key_max_grad_;
  FavorWork work_;
  AlignedBuffer<float> contexts_;  // of the keys, later its gradient: one a (cell, head)
  AlignedBuffer<float> kept_;      // by cell: dk of the winner before the maximum's share, not yet rounded
  std::vector<float> ones_;
  std::vector<Winner> winners_;  // by cell of the group
};

}  // namespace

void favor_backward(const FavorProblem& problem, const FavorTensor& grad_out, const FavorGradients& gradients,
                    const float* key_max, float* key_max_grad) {
  Backward(problem, grad_out, gradients, key_max, key_max_grad).run();
}

}  // namespace scfm
