/// Sparse graph attention, written once against the vector vocabulary of simd_<isa>.hpp, which the including
/// file has included before. All in an unnamed namespace: no two copies can be mistaken for one another by
/// the linker.
///
/// Some hundred rows at once go through three sweeps: scores of their edges (four at a time, so that their
/// sums share the shuffles), softmax, weighted sums. So one packed tensor at a time is gathered from the
/// cache, and what one sweep stores has long arrived when the next one reads it in wider pieces. A row's sums
/// run in the order of its edges. What a packed row is, and how rows are multiplied, is the policy `Rows`.
#pragma once

#include <math.h>
#include <stdint.h>

#include "attention/graph_kernels.hpp"

namespace scfm {
namespace {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;
constexpr int kMaxVecs = 8;  // of a row, held in registers at once

inline Vec load_stored(const GraphRows& rows, int64_t row, int at, int n) {
  if (rows.is_bf16) {
    const uint16_t* p = static_cast<const uint16_t*>(rows.data) + row * rows.row_stride + at;
    return n == Vec::width ? load_bf16(p) : load_bf16_partial(p, n);
  }
  const float* p = static_cast<const float*>(rows.data) + row * rows.row_stride + at;
  return n == Vec::width ? load(p) : load_partial(p, n);
}

inline void store_stored(const GraphRows& rows, int64_t row, int at, int n, Vec x) {
  if (rows.is_bf16) {
    uint16_t* p = static_cast<uint16_t*>(rows.data) + row * rows.row_stride + at;
    n == Vec::width ? store_bf16(p, x) : store_bf16_partial(p, x, n);
  } else {
    float* p = static_cast<float*>(rows.data) + row * rows.row_stride + at;
    n == Vec::width ? store(p, x) : store_partial(p, x, n);
  }
}

inline int lanes_at(int64_t at, int64_t size) {
  return size - at < Vec::width ? static_cast<int>(size - at) : Vec::width;
}

/// Calls one of eight instances of a block of 1 to 8 vectors.
template <template <int> class Block, class... Arguments>
inline void for_vecs(int num_vecs, Arguments&&... arguments) {
  switch (num_vecs) {
    case 1:
      return Block<1>::run(arguments...);
    case 2:
      return Block<2>::run(arguments...);
    case 3:
      return Block<3>::run(arguments...);
    case 4:
      return Block<4>::run(arguments...);
    case 5:
      return Block<5>::run(arguments...);
    case 6:
      return Block<6>::run(arguments...);
    case 7:
      return Block<7>::run(arguments...);
    default:
      return Block<8>::run(arguments...);
  }
}

/// Some consecutive rows of a task, with room for their scores: each row's begin at a multiple of a vector.
struct RowBlock {
  const GraphEdges& edges;
  int64_t begin;
  int64_t end;

  /// Calls each(row, its positions, their number, where its scores begin).
  template <class Each>
  void for_rows(Each each) const {
    int64_t at = 0;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t count = edges.offsets[row + 1] - edges.offsets[row];
      each(row, edges.positions + edges.offsets[row], count, at);
      at += padded_scores(count);
    }
  }
};

/// Calls each(block) for blocks of rows that fit the scratch space: kScoresAtOnce scores, or one longer row.
template <class Each>
inline void for_blocks(const GraphEdges& edges, Each each) {
  int64_t begin = 0;
  while (begin < edges.num_rows) {
    int64_t end = begin;
    int64_t size = 0;
    do {
      size += padded_scores(edges.offsets[end + 1] - edges.offsets[end]);
      ++end;
    } while (end < edges.num_rows && end - begin < kRowsAtOnce &&
             size + padded_scores(edges.offsets[end + 1] - edges.offsets[end]) <= kScoresAtOnce);
    each(RowBlock{edges, begin, end});
    begin = end;
  }
}

/// Packed rows, by position.
template <class Element>
struct Packed {
  const Element* rows;
  int64_t width;
  int32_t origin;

  const Element* at(int32_t position) const { return rows + static_cast<int64_t>(position - origin) * width; }
};

/// The packed rows of four edges from e on; past the last edge the last one again.
template <class Element>
inline void next_four(const Packed<Element>& packed, const int32_t* positions, int64_t e, int64_t count,
                      const Element* out[4]) {
  if (e + 4 <= count) {
    for (int i = 0; i < 4; ++i) out[i] = packed.at(positions[e + i]);
  } else {
    for (int i = 0; i < 4; ++i) out[i] = packed.at(positions[e + i < count ? e + i : count - 1]);
  }
}

template <int kVecs>
struct FloatDots {
  static void run(const RowBlock& block, const GraphRows& left, int from, int head_dim,
                  const Packed<float>& packed, float* scores) {
    block.for_rows([&](int64_t row, const int32_t* positions, int64_t count, int64_t at) {
      Vec a[kVecs];
      for (int v = 0; v < kVecs; ++v) {
        const int d = from + v * Vec::width;
        a[v] = load_stored(left, row, d, lanes_at(d, head_dim));
      }
      float* out = scores + at;
      for (int64_t e = 0; e < count; e += 4) {
        const float* b[4];
        next_four(packed, positions, e, count, b);
        Vec sum[4];
        for (int i = 0; i < 4; ++i) sum[i] = mul(a[0], load(b[i] + from));
        for (int v = 1; v < kVecs; ++v) {
          for (int i = 0; i < 4; ++i) sum[i] = fmadd(a[v], load(b[i] + from + v * Vec::width), sum[i]);
        }
        if (from == 0) {
          store_sums4(out + e, sum[0], sum[1], sum[2], sum[3]);
        } else {
          float more[4];
          store_sums4(more, sum[0], sum[1], sum[2], sum[3]);
          for (int i = 0; i < 4; ++i) out[e + i] += more[i];
        }
      }
    });
  }
};

template <int kVecs>
struct FloatMix {
  static void run(const RowBlock& block, const float* weights, const Packed<float>& packed, int from,
                  int head_dim, const float* factors, const GraphRows& out) {
    block.for_rows([&](int64_t row, const int32_t* positions, int64_t count, int64_t at) {
      const float* weight = weights + at;
      // Two sets of sums, of even and odd edges: one alone would wait for its own additions.
      Vec even[kVecs];
      Vec odd[kVecs];
      for (int v = 0; v < kVecs; ++v) even[v] = odd[v] = zero_vec();
      for (int64_t e = 0; e + 1 < count; e += 2) {
        const float* first = packed.at(positions[e]) + from;
        const float* second = packed.at(positions[e + 1]) + from;
        const Vec w0 = broadcast(weight[e]);
        const Vec w1 = broadcast(weight[e + 1]);
        for (int v = 0; v < kVecs; ++v) {
          even[v] = fmadd(w0, load(first + v * Vec::width), even[v]);
          odd[v] = fmadd(w1, load(second + v * Vec::width), odd[v]);
        }
      }
      const float* last = count % 2 != 0 ? packed.at(positions[count - 1]) + from : nullptr;
      const Vec w = broadcast(last != nullptr ? weight[count - 1] : 0.0f);
      const Vec factor = broadcast(factors[row - block.begin]);
      for (int v = 0; v < kVecs; ++v) {
        const int d = from + v * Vec::width;
        if (last != nullptr) even[v] = fmadd(w, load(last + v * Vec::width), even[v]);
        store_stored(out, row, d, lanes_at(d, head_dim), mul(add(even[v], odd[v]), factor));
      }
    });
  }
};

/// Packed rows of floats, whatever the tensors store.
struct FloatRows {
  using Element = float;

  static int width(int head_dim) { return (head_dim + Vec::width - 1) / Vec::width * Vec::width; }

  static void pack(const GraphRows& rows, int64_t num_rows, int head_dim, float* packed) {
    const int wide = width(head_dim);
    for (int64_t row = 0; row < num_rows; ++row) {
      for (int at = 0; at < head_dim; at += Vec::width) {
        store(packed + row * wide + at, load_stored(rows, row, at, lanes_at(at, head_dim)));
      }
    }
  }

  /// scores = <left[row], packed[position]> for every edge of the block; writes up to three more a row.
  static void dots(const RowBlock& block, const GraphRows& left, int head_dim, const Packed<float>& packed,
                   float* scores) {
    for (int from = 0; from < head_dim; from += kMaxVecs * Vec::width) {
      for_vecs<FloatDots>(vecs_from(from, head_dim), block, left, from, head_dim, packed, scores);
    }
  }

  /// out[row] = factors[row] * sum of weight * packed[position] over the row's edges.
  static void mix(const RowBlock& block, const float* weights, const Packed<float>& packed, int head_dim,
                  const float* factors, const GraphRows& out) {
    for (int from = 0; from < head_dim; from += kMaxVecs * Vec::width) {
      for_vecs<FloatMix>(vecs_from(from, head_dim), block, weights, packed, from, head_dim, factors, out);
    }
  }

 private:
  static int vecs_from(int from, int head_dim) {
    const int left = (head_dim - from + Vec::width - 1) / Vec::width;
    return left < kMaxVecs ? left : kMaxVecs;
  }
};

/// Makes softmax's numerators 2^(factor * score - top) of a row's scores; their sum and top (base 2) come
/// back. A NaN score makes the sum NaN (exp2_vec would hide it).
inline float weigh(float* scores, int64_t count, float factor, float* top) {
  const Vec by = broadcast(factor);
  const Vec lowest = broadcast(-INFINITY);
  Vec most = lowest;
  Vec poison = zero_vec();
  for (int64_t e = 0; e < count; e += Vec::width) {
    const int n = lanes_at(e, count);
    const Vec x = mul(first_lanes(n, load(scores + e), zero_vec()), by);
    poison = fmadd(x, zero_vec(), poison);
    const Vec inside = first_lanes(n, x, lowest);
    most = max(most, inside);
    store(scores + e, inside);
  }
  *top = reduce_max(most);
  const Vec highest = broadcast(*top);
  Vec sum = poison;
  for (int64_t e = 0; e < count; e += Vec::width) {
    const Vec weight = exp2_vec(sub(load(scores + e), highest));
    sum = add(sum, weight);
    store(scores + e, weight);
  }
  return reduce_add(sum);
}

template <class Rows>
void forward_rows(const GraphForwardTask& task) {
  using Element = typename Rows::Element;
  const int width = Rows::width(task.head_dim);
  const Packed<Element> keys{static_cast<const Element*>(task.keys), width, task.edges.origin};
  const Packed<Element> values{static_cast<const Element*>(task.values), width, task.edges.origin};
  for_blocks(task.edges, [&](const RowBlock& block) {
    float shares[kRowsAtOnce];  // 1 / sum of the row's weights
    Rows::dots(block, task.q, task.head_dim, keys, task.scores);
    block.for_rows([&](int64_t row, const int32_t*, int64_t count, int64_t at) {
      float top;
      const float sum = weigh(task.scores + at, count, task.scale * kLog2E, &top);
      shares[row - block.begin] = count == 0 ? 0.0f : 1.0f / sum;
      task.lse[row * task.num_heads] = count == 0 ? -INFINITY : (top + log2f(sum)) * kLn2;
    });
    Rows::mix(block, task.scores, values, task.head_dim, shares, task.out);
  });
}

/// scores become softmax's weights, given their log-sum-exp.
inline Vec weights_of(Vec scores, Vec factor, Vec lse2) { return exp2_vec(sub(mul(scores, factor), lse2)); }

/// Of a row's scores and the gradients of its weights makes the gradients of its scores (in their place), and
/// returns delta, the weighted mean of the weights' gradients. (Mean, not sum: weights made again from a
/// rounded log-sum-exp do not quite add up to 1, and the scores' gradients should add up to 0.)
inline float softmax_backward(float* scores, float* grads, int64_t count, float scale, float lse2) {
  const Vec factor = broadcast(scale * kLog2E);
  const Vec top = broadcast(lse2);
  Vec sum = zero_vec();
  Vec total = zero_vec();
  for (int64_t e = 0; e < count; e += Vec::width) {
    const int n = lanes_at(e, count);
    const Vec weight = first_lanes(n, weights_of(load(scores + e), factor, top), zero_vec());
    const Vec grad = first_lanes(n, load(grads + e), zero_vec());
    sum = fmadd(weight, grad, sum);
    total = add(total, weight);
    store(scores + e, weight);
    store(grads + e, grad);
  }
  const float delta = reduce_add(sum) / reduce_add(total);
  for (int64_t e = 0; e < count; e += Vec::width) {
    const Vec centred = sub(load(grads + e), broadcast(delta));
    store(grads + e, mul(mul(load(scores + e), broadcast(scale)), centred));
  }
  return delta;
}

struct Ones {
  float values[kRowsAtOnce];
  Ones() {
    for (float& value : values) value = 1.0f;
  }
};

template <class Rows>
void row_grads(const GraphRowGradTask& task) {
  using Element = typename Rows::Element;
  const int width = Rows::width(task.head_dim);
  const Packed<Element> keys{static_cast<const Element*>(task.keys), width, task.edges.origin};
  const Packed<Element> values{static_cast<const Element*>(task.values), width, task.edges.origin};
  const Ones ones;
  for_blocks(task.edges, [&](const RowBlock& block) {
    Rows::dots(block, task.q, task.head_dim, keys, task.scores);
    Rows::dots(block, task.grad_out, task.head_dim, values, task.grads);
    block.for_rows([&](int64_t row, const int32_t*, int64_t count, int64_t at) {
      const int64_t place = row * task.num_heads;
      task.deltas[place] =
          softmax_backward(task.scores + at, task.grads + at, count, task.scale, task.lse[place] * kLog2E);
    });
    Rows::mix(block, task.grads, keys, task.head_dim, ones.values, task.dq);
  });
}

template <class Rows>
void column_grads(const GraphColumnGradTask& task) {
  using Element = typename Rows::Element;
  const int width = Rows::width(task.head_dim);
  const int32_t origin = task.edges.origin;
  const Packed<Element> queries{static_cast<const Element*>(task.queries), width, origin};
  const Packed<Element> upstream{static_cast<const Element*>(task.grad_outs), width, origin};
  const Vec factor = broadcast(task.scale * kLog2E);
  const Vec scale = broadcast(task.scale);
  const Ones ones;
  for_blocks(task.edges, [&](const RowBlock& block) {
    Rows::dots(block, task.k, task.head_dim, queries, task.scores);
    Rows::dots(block, task.v, task.head_dim, upstream, task.grads);
    block.for_rows([&](int64_t, const int32_t* positions, int64_t count, int64_t at) {
      for (int64_t e = 0; e < count; e += Vec::width) {
        const int n = lanes_at(e, count);
        float* grads = task.grads + at + e;
        const Vec lse2 = gather(task.lse2, positions + e, origin, n);
        const Vec weight = weights_of(load(task.scores + at + e), factor, lse2);
        const Vec delta = gather(task.deltas, positions + e, origin, n);
        store(task.scores + at + e, weight);
        store(grads, mul(mul(weight, scale), sub(load(grads), delta)));
      }
    });
    Rows::mix(block, task.scores, upstream, task.head_dim, ones.values, task.dv);
    Rows::mix(block, task.grads, queries, task.head_dim, ones.values, task.dk);
  });
}

template <class Rows>
void pack_rows(const GraphRows& rows, int64_t num_rows, int head_dim, void* packed) {
  Rows::pack(rows, num_rows, head_dim, static_cast<typename Rows::Element*>(packed));
}

/// The table of an instruction set: float32 tensors by FloatRows, bfloat16 ones by Bf16.
template <class Bf16>
struct GraphTable {
  static int64_t packed_row_bytes(int head_dim, bool is_bf16) noexcept {
    return is_bf16 ? Bf16::width(head_dim) * static_cast<int64_t>(sizeof(typename Bf16::Element))
                   : FloatRows::width(head_dim) * static_cast<int64_t>(sizeof(float));
  }
  static void pack(const GraphRows& rows, int64_t num_rows, int head_dim, void* packed) noexcept {
    rows.is_bf16 ? pack_rows<Bf16>(rows, num_rows, head_dim, packed)
                 : pack_rows<FloatRows>(rows, num_rows, head_dim, packed);
  }
  static void forward(const GraphForwardTask& task) noexcept {
    task.q.is_bf16 ? forward_rows<Bf16>(task) : forward_rows<FloatRows>(task);
  }
  static void rows(const GraphRowGradTask& task) noexcept {
    task.q.is_bf16 ? row_grads<Bf16>(task) : row_grads<FloatRows>(task);
  }
  static void columns(const GraphColumnGradTask& task) noexcept {
    task.k.is_bf16 ? column_grads<Bf16>(task) : column_grads<FloatRows>(task);
  }
  static constexpr GraphKernels kKernels = {packed_row_bytes, pack, forward, rows, columns};
};

}  // namespace
}  // namespace scfm
