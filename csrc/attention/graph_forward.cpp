#include "attention/graph_forward.hpp"

#include "base/aligned_buffer.hpp"
#include "cpu/thread_pool.hpp"

namespace scfm {
namespace {

struct Scratch {
  AlignedBuffer<char> keys;
  AlignedBuffer<char> values;
  AlignedBuffer<float> scores;
};

}  // namespace

void graph_forward(const GraphShape& shape, const GraphTensor& q, const GraphTensor& k, const GraphTensor& v,
                   const GraphTensor& out, float* lse, const GraphPairs& rows, float scale) {
  check_graph_shape(shape, "graph_forward");
  const std::vector<GraphTask> tasks = graph_tasks(rows, shape.num_tokens, "graph_forward");
  const GraphKernels& kernels = graph_kernels();
  const auto head_dim = static_cast<int>(shape.head_dim);
  const std::int64_t row_bytes = kernels.packed_row_bytes(head_dim, q.is_bf16);
  const int max_workers = num_threads();
  std::vector<Scratch> scratch(static_cast<std::size_t>(max_workers));
  const std::int64_t num_tasks = static_cast<std::int64_t>(tasks.size()) * shape.num_heads;
  parallel_for(num_tasks, max_workers, [&](std::int64_t number, int worker) {
    const GraphTask& task = tasks[static_cast<std::size_t>(number / shape.num_heads)];
    const std::int64_t head = number % shape.num_heads;
    const std::int64_t num_packed = task.span_end - task.span_begin;
    Scratch& mine = scratch[static_cast<std::size_t>(worker)];
    char* keys = mine.keys.reserve(num_packed * row_bytes);
    char* values = mine.values.reserve(num_packed * row_bytes);
    float* scores = mine.scores.reserve(score_room(longest_row(rows, task)));
    kernels.pack(k.rows_of(head, task.span_begin), num_packed, head_dim, keys);
    kernels.pack(v.rows_of(head, task.span_begin), num_packed, head_dim, values);
    kernels.forward({.edges = graph_edges(rows, task),
                     .head_dim = head_dim,
                     .scale = scale,
                     .q = q.rows_of(head, task.row_begin),
                     .out = out.rows_of(head, task.row_begin),
                     .keys = keys,
                     .values = values,
                     .lse = lse + task.row_begin * shape.num_heads + head,
                     .num_heads = shape.num_heads,
                     .scores = scores});
  });
}

}  // namespace scfm
