#include "attention/graph_backward.hpp"

#include "base/aligned_buffer.hpp"
#include "cpu/thread_pool.hpp"

namespace scfm {
namespace {

constexpr float kLog2E = 1.44269504088896340736f;

struct Scratch {
  AlignedBuffer<char> first;   // packed keys, or queries
  AlignedBuffer<char> second;  // packed values, or gradients of the output
  AlignedBuffer<float> scores;
  AlignedBuffer<float> grads;
  AlignedBuffer<float> lse2;  // of one head, contiguous
  AlignedBuffer<float> deltas;
};

/// What the tasks of one call share.
struct Backward {
  const GraphShape& shape;
  const GraphInputs& inputs;
  float scale;
  const GraphKernels& kernels;
  int head_dim;
  std::int64_t row_bytes;
  float* deltas;  // (tokens, heads): written by rows, read by columns

  void pack(const GraphTensor& a, const GraphTensor& b, const GraphTask& task, std::int64_t head,
            std::int64_t longest, Scratch& scratch) const {
    const std::int64_t num_packed = task.span_end - task.span_begin;
    kernels.pack(a.rows_of(head, task.span_begin), num_packed, head_dim,
                 scratch.first.reserve(num_packed * row_bytes));
    kernels.pack(b.rows_of(head, task.span_begin), num_packed, head_dim,
                 scratch.second.reserve(num_packed * row_bytes));
    scratch.scores.reserve(score_room(longest));
    scratch.grads.reserve(score_room(longest));
  }

  void rows(const GraphPairs& pairs, const GraphTask& task, std::int64_t head, const GraphTensor& dq,
            Scratch& scratch) const {
    pack(inputs.k, inputs.v, task, head, longest_row(pairs, task), scratch);
    kernels.row_grads({.edges = graph_edges(pairs, task),
                       .head_dim = head_dim,
                       .scale = scale,
                       .q = inputs.q.rows_of(head, task.row_begin),
                       .grad_out = inputs.grad_out.rows_of(head, task.row_begin),
                       .dq = dq.rows_of(head, task.row_begin),
                       .keys = scratch.first.data(),
                       .values = scratch.second.data(),
                       .lse = inputs.lse + task.row_begin * shape.num_heads + head,
                       .deltas = deltas + task.row_begin * shape.num_heads + head,
                       .num_heads = shape.num_heads,
                       .scores = scratch.scores.data(),
                       .grads = scratch.grads.data()});
  }

  void columns(const GraphPairs& pairs, const GraphTask& task, std::int64_t head, const GraphTensor& dk,
               const GraphTensor& dv, Scratch& scratch) const {
    pack(inputs.q, inputs.grad_out, task, head, longest_row(pairs, task), scratch);
    const std::int64_t num_packed = task.span_end - task.span_begin;
    float* lse2 = scratch.lse2.reserve(num_packed);
    float* of_head = scratch.deltas.reserve(num_packed);
    for (std::int64_t i = 0; i < num_packed; ++i) {
      const std::int64_t place = (task.span_begin + i) * shape.num_heads + head;
      lse2[i] = inputs.lse[place] * kLog2E;
      of_head[i] = deltas[place];
    }
    kernels.column_grads({.edges = graph_edges(pairs, task),
                          .head_dim = head_dim,
                          .scale = scale,
                          .k = inputs.k.rows_of(head, task.row_begin),
                          .v = inputs.v.rows_of(head, task.row_begin),
                          .dk = dk.rows_of(head, task.row_begin),
                          .dv = dv.rows_of(head, task.row_begin),
                          .queries = scratch.first.data(),
                          .grad_outs = scratch.second.data(),
                          .lse2 = lse2,
                          .deltas = of_head,
                          .scores = scratch.scores.data(),
                          .grads = scratch.grads.data()});
  }
};

}  // namespace

void graph_backward(const GraphShape& shape, const GraphInputs& inputs, const GraphTensor& dq,
                    const GraphTensor& dk, const GraphTensor& dv, const GraphPairs& rows,
                    const GraphPairs& columns, float scale) {
  check_graph_shape(shape, "graph_backward");
  const std::vector<GraphTask> row_tasks = graph_tasks(rows, shape.num_tokens, "graph_backward");
  const std::vector<GraphTask> column_tasks = graph_tasks(columns, shape.num_tokens, "graph_backward");
  const GraphKernels& kernels = graph_kernels();
  const auto head_dim = static_cast<int>(shape.head_dim);
  AlignedBuffer<float> deltas;
  const Backward backward{.shape = shape,
                          .inputs = inputs,
                          .scale = scale,
                          .kernels = kernels,
                          .head_dim = head_dim,
                          .row_bytes = kernels.packed_row_bytes(head_dim, inputs.q.is_bf16),
                          .deltas = deltas.reserve(shape.num_tokens * shape.num_heads)};
  const int max_workers = num_threads();
  std::vector<Scratch> scratch(static_cast<std::size_t>(max_workers));
  const auto for_tasks = [&](const std::vector<GraphTask>& tasks, auto&& work) {
    const std::int64_t num_tasks = static_cast<std::int64_t>(tasks.size()) * shape.num_heads;
    parallel_for(num_tasks, max_workers, [&](std::int64_t number, int worker) {
      work(tasks[static_cast<std::size_t>(number / shape.num_heads)], number % shape.num_heads,
           scratch[static_cast<std::size_t>(worker)]);
    });
  };
  for_tasks(row_tasks, [&](const GraphTask& task, std::int64_t head, Scratch& mine) {
    backward.rows(rows, task, head, dq, mine);
  });
  for_tasks(column_tasks, [&](const GraphTask& task, std::int64_t head, Scratch& mine) {
    backward.columns(columns, task, head, dk, dv, mine);
  });
}

}  // namespace scfm
