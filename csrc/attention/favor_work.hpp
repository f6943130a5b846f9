/// How a call of FAVOR+ attention is divided into tasks, and the memory they share: used by forward and
/// backward.
///
/// A (cell, head) is cut into spans of tokens, whose sums are formed apart and merged: a single long cell
/// occupies all threads, and the cut depends on the cell's length alone, so no result depends on the threads
/// or on other cells. Cells are worked on in groups, longest first, which bounds the memory of the sums.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numbers>
#include <string>
#include <vector>

#include "attention/favor_forward.hpp"
#include "attention/favor_kernels.hpp"
#include "base/aligned_buffer.hpp"
#include "base/errors.hpp"
#include "cpu/isa.hpp"
#include "cpu/thread_pool.hpp"

namespace scfm {

inline const FavorKernels& favor_kernels() {
#ifdef SCFM_X86_SIMD
  static constexpr TablePerIsa<FavorKernels> kTables = {&favor_kernels_generic, &favor_kernels_avx2,
                                                        &favor_kernels_avx512, &favor_kernels_avx512_bf16};
#else
  static constexpr TablePerIsa<FavorKernels> kTables = {&favor_kernels_generic, &favor_kernels_generic,
                                                        &favor_kernels_generic, &favor_kernels_generic};
#endif
  return active_table(kTables);
}

inline constexpr float kLog2E = std::numbers::log2e_v<float>;
inline constexpr float kLn2 = std::numbers::ln2_v<float>;

struct FavorCell {
  std::int64_t index;
  std::int64_t first_token;
  std::int64_t length;
  std::int64_t span_length;
  std::int64_t num_spans;    // of each head
  std::int64_t first_block;  // number in its group of the sums of head 0, span 0
  std::int64_t first_head;   // number in its group of (cell, head 0)
};

/// Tokens of one head of one cell. `block` numbers the sums of this span.
struct FavorTask {
  const FavorCell* cell;
  std::int64_t head;
  std::int64_t first;  // in the cell
  std::int64_t count;
  std::int64_t block;
};

/// Where a block's sums lie in one piece of memory.
struct FavorLayout {
  explicit FavorLayout(const FavorShape& shape, int width)
      : num_features(std::int64_t{shape.num_panels} * width),
        dim_padded(shape.dim_padded),
        products(num_features * shape.dim_padded),
        sums(products + num_features + shape.dim_padded + width),
        context(num_features * shape.head_dim + num_features + shape.dim_padded + width) {}

  FavorSums sums_at(float* memory) const {
    float* plain = memory + products + num_features;
    return {memory, memory + products, plain, plain + dim_padded};
  }
  FavorContext context_at(float* memory, int head_dim) const {
    float* norm = memory + num_features * head_dim;
    return {memory, norm, norm + num_features};
  }

  std::int64_t num_features;  // with padding
  std::int64_t dim_padded;
  std::int64_t products;
  std::int64_t sums;     // floats of one block's sums
  std::int64_t context;  // floats of one laid out context
};

class FavorWork {
 public:
  explicit FavorWork(const FavorProblem& problem)
      : problem_(problem),
        kernels_(favor_kernels()),
        shape_(shape_of(problem, kernels_.width)),
        layout_(shape_, kernels_.width),
        workers_(num_threads()) {
    pack_projection();
    order_cells();
    scratch_stride_ = kernels_.scratch_size(shape_) + kernels_.width;
    scratch_.reserve(scratch_stride_ * workers_);
  }

  const FavorKernels& kernels() const { return kernels_; }
  const FavorShape& shape() const { return shape_; }
  const FavorLayout& layout() const { return layout_; }
  const FavorProjection& projection() const { return projection_; }
  float* scratch(int worker) { return scratch_.data() + worker * scratch_stride_; }

  /// The row of a tensor where a task begins.
  FavorRows rows(const FavorTensor& tensor, const FavorTask& task) const {
    return row(tensor, task.cell->first_token + task.first, task.head);
  }
  FavorRows row(const FavorTensor& tensor, std::int64_t token, std::int64_t head) const {
    const std::int64_t offset = token * tensor.row_stride + head * tensor.head_stride;
    const std::int64_t size = problem_.is_bf16 ? 2 : 4;
    return {static_cast<char*>(tensor.data) + offset * size, tensor.row_stride, problem_.is_bf16};
  }

  /// The next cells whose sums fit into `kGroupFloats` (at least one); empty when all are done.
  std::vector<FavorCell> next_group() {
    std::vector<FavorCell> group;
    num_blocks_ = 0;
    num_cell_heads_ = 0;
    for (; position_ < cells_.size(); ++position_) {
      FavorCell cell = cells_[position_];
      const std::int64_t blocks = cell.num_spans * problem_.num_heads;
      if (!group.empty() && (num_blocks_ + blocks) * layout_.sums > kGroupFloats) break;
      cell.first_block = num_blocks_;
      cell.first_head = num_cell_heads_;
      num_blocks_ += blocks;
      num_cell_heads_ += problem_.num_heads;
      group.push_back(cell);
    }
    sums_.reserve(num_blocks_ * layout_.sums);
    return group;
  }
  std::int64_t num_blocks() const { return num_blocks_; }
  std::int64_t num_cell_heads() const { return num_cell_heads_; }
  float* sums(std::int64_t block) { return sums_.data() + block * layout_.sums; }

  /// Every head of every cell in spans of this many tokens; 0 for the cell's own spans.
  std::vector<FavorTask> tasks(const std::vector<FavorCell>& group, std::int64_t span_length) const {
    std::vector<FavorTask> list;
    for (const FavorCell& cell : group) {
      const std::int64_t length = span_length == 0 ? cell.span_length : span_length;
      for (std::int64_t head = 0; head < problem_.num_heads; ++head) {
        std::int64_t block = cell.first_block + head * cell.num_spans;
        for (std::int64_t first = 0; first < cell.length; first += length, ++block) {
          list.push_back({&cell, head, first, std::min(length, cell.length - first), block});
        }
      }
    }
    return list;
  }

  /// Calls body(task, scratch) for each, on all threads.
  template <class Task, class Body>
  void for_each(const std::vector<Task>& list, Body&& body) {
    parallel_for(static_cast<std::int64_t>(list.size()), workers_, [&](std::int64_t i, int worker) {
      body(list[static_cast<std::size_t>(i)], scratch(worker));
    });
  }

  /// Merges the spans of a (cell, head), scaled, into the sums of its first span: rows and norm.
  void merge(const FavorTask& whole, const float* scales) {
    float* first = sums(whole.block);
    const FavorSums merged = layout_.sums_at(first);
    kernels_.merge({shape_, first, layout_.sums, scales, static_cast<int>(whole.cell->num_spans)},
                   merged.products, merged.weighted);
  }

  /// One task for each head of each cell, from its first block.
  std::vector<FavorTask> cell_heads(const std::vector<FavorCell>& group) const {
    return tasks(group, std::numeric_limits<std::int64_t>::max() / 2);
  }

 private:
  static constexpr std::int64_t kGroupFloats = std::int64_t{4} << 20;  // 16 MiB
  static constexpr std::int64_t kSpanTokens = 4096;
  static constexpr std::int64_t kMostSpans = 16;

  static FavorShape shape_of(const FavorProblem& problem, int width) {
    if (problem.head_dim < 1 || problem.head_dim > 256) {
      throw InvalidArgument("favor_attention: head_dim = " + std::to_string(problem.head_dim) +
                            ", expected 1 to 256");
    }
    if (problem.num_features < 1 || problem.num_features > (1 << 20)) {
      throw InvalidArgument("favor_attention: projection has " + std::to_string(problem.num_features) +
                            " features, expected 1 to 1048576");
    }
    const auto dim = static_cast<int>(problem.head_dim);
    const auto features = static_cast<int>(problem.num_features);
    const float square = 1.0f / std::sqrt(static_cast<float>(dim));
    return {dim,         (dim + width - 1) / width * width,
            features,    (features + width - 1) / width,
            problem.eps, 0.5f * square * kLog2E,
            square};
  }

  void pack_projection() {
    const int width = kernels_.width;
    const std::int64_t dim = shape_.head_dim;
    const std::int64_t panels_size = layout_.num_features * dim;
    float* panels = packed_.reserve(panels_size + layout_.num_features + layout_.products);
    float* bias = panels + panels_size;
    float* way_back = bias + layout_.num_features;
    std::fill(panels, bias, 0.0f);
    std::fill(way_back, way_back + layout_.products, 0.0f);
    const double scale = 1.0 / std::sqrt(std::sqrt(static_cast<double>(dim)));
    for (std::int64_t f = 0; f < layout_.num_features; ++f) {
      const bool real = f < shape_.num_features;
      bias[f] = real ? 0.0f : -std::numeric_limits<float>::infinity();
      for (std::int64_t d = 0; real && d < dim; ++d) {
        const double weight = scale * static_cast<double>(problem_.projection[f * dim + d]);
        panels[(f / width * dim + d) * width + f % width] = static_cast<float>(weight * std::numbers::log2e);
        way_back[f * layout_.dim_padded + d] = static_cast<float>(weight);
      }
    }
    projection_ = {panels, bias, way_back};
  }

  void order_cells() {
    const std::int64_t block = kernels_.tokens_at_once;
    for (std::int64_t i = 0; i < problem_.num_cells; ++i) {
      const std::int64_t first = problem_.cu_seqlens[i];
      const std::int64_t length = problem_.cu_seqlens[i + 1] - first;
      if (length == 0) continue;
      const std::int64_t wanted = std::min(kMostSpans, (length + kSpanTokens - 1) / kSpanTokens);
      const std::int64_t span = ((length + wanted - 1) / wanted + block - 1) / block * block;
      cells_.push_back({i, first, length, span, (length + span - 1) / span, 0, 0});
    }
    std::stable_sort(cells_.begin(), cells_.end(),
                     [](const FavorCell& a, const FavorCell& b) { return a.length > b.length; });
  }

  const FavorProblem& problem_;
  const FavorKernels& kernels_;
  FavorShape shape_;
  FavorLayout layout_;
  int workers_;
  FavorProjection projection_{};
  std::vector<FavorCell> cells_;
  std::size_t position_ = 0;
  std::int64_t num_blocks_ = 0;
  std::int64_t num_cell_heads_ = 0;
  std::int64_t scratch_stride_ = 0;
  AlignedBuffer<float> packed_;
  AlignedBuffer<float> scratch_;
  AlignedBuffer<float> sums_;
};

}  // namespace scfm
