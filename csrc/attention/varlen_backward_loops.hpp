/// Attention inside a cell, backward (see varlen_backward_kernels.hpp), written once against the vocabulary
/// of simd_*.hpp and the tiles of attention_tiles.hpp.
///
/// Blocks of kBlockKeys keys outside, whose gradients are summed up in scratch memory; inside, blocks of
/// kBlockRows queries stream by. The including file defines kPanelVectors, the width of a tile of scores;
/// kBlockKeys and kBlockRows are whole numbers of tiles.
#pragma once

#include <math.h>

#include "attention/attention_rows.hpp"
#include "attention/attention_tiles.hpp"
#include "attention/varlen_backward_kernels.hpp"

namespace scfm {
namespace {

constexpr int kPanelColumns = kPanelVectors * kWidth;
constexpr int kBlockKeys = 96;
constexpr int kBlockRows = 48;
static_assert(kBlockKeys % kTileRows == 0 && kBlockKeys % kPanelColumns == 0 &&
              kBlockKeys % (2 * kWidth) == 0);
static_assert(kBlockRows % kTileRows == 0);
constexpr float kLog2E = 1.44269504088896341f;

/// A block's probabilities and their gradients, as the products read them.
template <class Element>
struct BlockWeights {
  const Element* p_by_step;   // [query step][kBlockKeys]
  const Element* ds_by_step;  // the same
  const Element* ds_by_row;   // [query][kBlockKeys / terms]
};

/// float32 products of anything stored.
template <class StoredType>
struct FloatGradients {
  using Stored = StoredType;
  using Product = Floats;
  static int64_t depth(int head_dim) { return head_dim; }
  static int64_t row_size(int padded) { return padded; }

  static void pack_left(const Stored* x, int64_t stride, int64_t count, int64_t rows, int head_dim,
                        int padded, float* out) {
    pack_rows(x, stride, count, rows, head_dim, padded, 1.0f, out);
  }
  /// Rows as right-hand sides: the same rows.
  static const float* right_of(const float* left, float*) { return left; }
  static void pack_right(const Stored*, int64_t, int64_t, int64_t, int, int, float*) {}
  static void pack_keys(const Stored* x, int64_t stride, int64_t count, int head_dim, int padded,
                        float* panels, float* rows) {
    pack_panels<kPanelColumns>(x, stride, count, head_dim, panels);
    if (rows != nullptr) pack_rows(x, stride, count, kBlockKeys, head_dim, padded, 1.0f, rows);
  }
  static Vec exponential(Vec x) { return exp2_vec(x); }

  /// Where a tile's numbers are kept until the block is whole: at their place.
  struct Block {
    alignas(64) float p[kBlockRows * kBlockKeys];
    alignas(64) float ds[kBlockRows * kBlockKeys];
    float* tile_p(int row) { return p + row * kBlockKeys; }
    float* tile_ds(int row) { return ds + row * kBlockKeys; }
    void settle(int) {}
    BlockWeights<float> weights() const { return {p, ds, ds}; }
  };
};

/// sums += left right for a tile of kTileRows rows and `columns` columns of float32 sums in memory.
template <class Product>
inline void add_rows(const typename Product::Element* left, int64_t row_stride, int64_t step_stride,
                     const typename Product::Element* right, int64_t steps, int padded, float* sums) {
  for (int first = 0; first < padded; first += kTileColumns) {
    with_count<kTileVectors>(
        static_cast<int>(smaller(kTileVectors, (padded - first) / kWidth)), [&](auto count) {
          constexpr int kVectors = decltype(count)::value;
          Vec tile[kTileRows][kVectors];
          for (int r = 0; r < kTileRows; ++r) {
            for (int c = 0; c < kVectors; ++c)
              tile[r][c] = load(sums + int64_t{r} * padded + first + c * kWidth);
          }
          add_tile<Product, kVectors>(left, row_stride, step_stride, right + first, padded, steps, tile);
          for (int r = 0; r < kTileRows; ++r) {
            for (int c = 0; c < kVectors; ++c)
              store(sums + int64_t{r} * padded + first + c * kWidth, tile[r][c]);
          }
        });
  }
}

/// The sums of a tile of scores.
template <class Product, int kVectors>
inline void score_panel(const typename Product::Element* left, int64_t row_stride,
                        const typename Product::Element* panel, int64_t depth,
                        Vec (&sums)[kTileRows][kVectors]) {
  for (int r = 0; r < kTileRows; ++r) {
    for (int c = 0; c < kVectors; ++c) sums[r][c] = zero_vec();
  }
  add_tile<Product, kVectors>(left, row_stride, 1, panel, kPanelColumns, depth, sums);
}

/// What belongs to a query: in base 2, and negated, so that each enters by one addition.
struct RowFacts {
  const float* minus_lse;
  const float* minus_delta;
};

/// Probabilities and their gradients for a tile of queries and one panel of keys, or its first kVectors
/// vectors.
template <class Layout, int kVectors>
inline void differentiate_panel(const typename Layout::Product::Element* queries,
                                const typename Layout::Product::Element* upstream, int64_t row_size,
                                const typename Layout::Product::Element* key_panel,
                                const typename Layout::Product::Element* value_panel, int64_t depth,
                                int num_keys, float scale, RowFacts facts, float* p, float* ds) {
  const Vec base_2 = broadcast(scale * kLog2E);
  const Vec scaled = broadcast(scale);
  Vec sums[kTileRows][kVectors];
  score_panel<typename Layout::Product>(queries, row_size, key_panel, depth, sums);
  for (int r = 0; r < kTileRows; ++r) {
    const Vec minus_lse = broadcast(facts.minus_lse[r]);
    for (int c = 0; c < kVectors; ++c) {
      const int seen = num_keys - c * kWidth;
      Vec exponent = fmadd(sums[r][c], base_2, minus_lse);
      if (seen < kWidth) exponent = first_lanes(seen, exponent, broadcast(-INFINITY));
      store(p + r * kBlockKeys + c * kWidth, Layout::exponential(exponent));
    }
  }
  score_panel<typename Layout::Product>(upstream, row_size, value_panel, depth, sums);
  for (int r = 0; r < kTileRows; ++r) {
    const Vec minus_delta = broadcast(facts.minus_delta[r]);
    for (int c = 0; c < kVectors; ++c) {
      const int place = r * kBlockKeys + c * kWidth;
      store(ds + place, mul(mul(load(p + place), scaled), add(sums[r][c], minus_delta)));
    }
  }
}

inline int64_t padded_queries(int64_t num_queries) { return round_up(num_queries, kBlockRows); }
inline int padded_dim(int head_dim) { return static_cast<int>(round_up(head_dim, kWidth)); }

/// Where a task's parts lie in its scratch. Left and right are the same where the layout says so.
struct GradientScratch {
  GradientScratch(float* memory, int64_t num_queries, int head_dim) {
    const int64_t padded = padded_dim(head_dim);
    const int64_t rows = padded_queries(num_queries);
    float* next = memory;
    const auto take = [&next](int64_t count) {
      float* here = next;
      next += count;
      return here;
    };
    queries = take(rows * padded);
    upstream = take(rows * padded);
    right_queries = take(rows * padded);
    right_upstream = take(rows * padded);
    dq = take(rows * padded);
    minus_lse = take(rows);
    minus_delta = take(rows);
    key_panels = take(kBlockKeys * padded);
    value_panels = take(kBlockKeys * padded);
    key_rows = take(kBlockKeys * padded);
    dk = take(kBlockKeys * padded);
    dv = take(kBlockKeys * padded);
    size = next - memory;
  }
  float *queries, *upstream, *right_queries, *right_upstream, *dq, *minus_lse, *minus_delta;
  float *key_panels, *value_panels, *key_rows, *dk, *dv;
  int64_t size;
};

inline int64_t varlen_gradient_scratch_size(int64_t num_queries, int head_dim) {
  static float nowhere[1];
  return GradientScratch(nowhere, num_queries, head_dim).size;
}

template <class Stored>
inline float dot(const Stored* a, const Stored* b, int count) {
  Vec sum = zero_vec();
  for (int c = 0; c < count; c += kWidth)
    sum = fmadd(load_stored(a + c, count - c), load_stored(b + c, count - c), sum);
  return reduce_add(sum);
}

/// Writes rows of float32 sums.
template <class Stored>
inline void write_rows(const float* sums, int padded, int64_t count, int head_dim, const GradientRows& to,
                       int64_t first) {
  for (int64_t r = 0; r < count; ++r) {
    Stored* row = static_cast<Stored*>(to.data) + (first + r) * to.stride;
    for (int c = 0; c < head_dim; c += kWidth)
      store_stored(row + c, load(sums + r * padded + c), head_dim - c);
  }
}

/// A query's own key: adds to its dq and writes its dk and dv.
template <class Stored>
inline void own_key_gradients(const VarlenGradientTask& task, int64_t row, const GradientScratch& scratch,
                              int padded) {
  const int head_dim = task.head_dim;
  const Stored *q = row_of<Stored>(task.q, row), *upstream = row_of<Stored>(task.grad_out, row);
  const Stored *k = row_of<Stored>(task.k, row), *v = row_of<Stored>(task.v, row);
  const float p = exp2f(dot(q, k, head_dim) * task.scale * kLog2E + scratch.minus_lse[row]);
  const float ds = p * task.scale * (dot(upstream, v, head_dim) + scratch.minus_delta[row]);
  const Vec weight = broadcast(p);
  const Vec slope = broadcast(ds);
  Stored* dk = static_cast<Stored*>(task.dk.data) + row * task.dk.stride;
  Stored* dv = static_cast<Stored*>(task.dv.data) + row * task.dv.stride;
  float* dq = scratch.dq + row * padded;
  for (int c = 0; c < head_dim; c += kWidth) {
    const int left = head_dim - c;
    store(dq + c, fmadd(slope, load_stored(k + c, left), load(dq + c)));
    store_stored(dk + c, mul(slope, load_stored(q + c, left)), left);
    store_stored(dv + c, mul(weight, load_stored(upstream + c, left)), left);
  }
}

/// One block of queries against one block of keys: adds to their dq, dk and dv.
template <class Layout>
inline void add_block(const VarlenGradientTask& task, const GradientScratch& scratch, int64_t row,
                      int num_keys, typename Layout::Block& block) {
  using Product = typename Layout::Product;
  using Element = typename Product::Element;
  const int padded = padded_dim(task.head_dim);
  const int64_t row_size = Layout::row_size(padded);
  const int64_t depth = Layout::depth(task.head_dim);
  const auto* queries = reinterpret_cast<const Element*>(scratch.queries);
  const auto* upstream = reinterpret_cast<const Element*>(scratch.upstream);
  const auto* key_rows = reinterpret_cast<const Element*>(scratch.key_rows);
  const int num_rows = static_cast<int>(round_up(smaller(kBlockRows, task.num_queries - row), kTileRows));
  for (int r = 0; r < num_rows; r += kTileRows) {
    for (int first = 0; first < num_keys; first += kPanelColumns) {
      const int here = num_keys - first;
      with_count<kPanelVectors>(
          static_cast<int>(smaller(kPanelVectors, vectors_for(here))), [&](auto vectors) {
            differentiate_panel<Layout, decltype(vectors)::value>(
                queries + (row + r) * row_size, upstream + (row + r) * row_size, row_size,
                reinterpret_cast<const Element*>(scratch.key_panels) + first * depth,
                reinterpret_cast<const Element*>(scratch.value_panels) + first * depth, depth, here,
                task.scale, {scratch.minus_lse + row + r, scratch.minus_delta + row + r},
                block.tile_p(r) + first, block.tile_ds(r) + first);
          });
    }
    block.settle(r);
    add_rows<Product>(block.weights().ds_by_row + r * (kBlockKeys / Product::kTerms),
                      kBlockKeys / Product::kTerms, 1, key_rows,
                      (num_keys + Product::kTerms - 1) / Product::kTerms, padded,
                      scratch.dq + (row + r) * padded);
  }
  const BlockWeights<Element> weights = block.weights();
  const Element* right_queries =
      Layout::right_of(queries, reinterpret_cast<Element*>(scratch.right_queries)) +
      row / Product::kTerms * padded;
  const Element* right_upstream =
      Layout::right_of(upstream, reinterpret_cast<Element*>(scratch.right_upstream)) +
      row / Product::kTerms * padded;
  const int64_t steps = num_rows / Product::kTerms;
  for (int key = 0; key < num_keys; key += kTileRows) {
    add_rows<Product>(weights.p_by_step + key, 1, kBlockKeys, right_upstream, steps, padded,
                      scratch.dv + int64_t{key} * padded);
    add_rows<Product>(weights.ds_by_step + key, 1, kBlockKeys, right_queries, steps, padded,
                      scratch.dk + int64_t{key} * padded);
  }
}

/// Packs the queries, their upstream gradients, and what belongs to each row.
template <class Layout>
inline void prepare_queries(const VarlenGradientTask& task, const GradientScratch& scratch) {
  using Stored = typename Layout::Stored;
  using Element = typename Layout::Product::Element;
  const int padded = padded_dim(task.head_dim);
  const int64_t rows = padded_queries(task.num_queries);
  const auto pack = [&](const AttentionRows& x, float* left, float* right) {
    Layout::pack_left(row_of<Stored>(x, 0), x.stride, task.num_queries, rows, task.head_dim, padded,
                      reinterpret_cast<Element*>(left));
    Layout::pack_right(row_of<Stored>(x, 0), x.stride, task.num_queries, rows, task.head_dim, padded,
                       reinterpret_cast<Element*>(right));
  };
  pack(task.q, scratch.queries, scratch.right_queries);
  pack(task.grad_out, scratch.upstream, scratch.right_upstream);
  memset(scratch.dq, 0, sizeof(float) * static_cast<size_t>(rows * padded));
  for (int64_t r = 0; r < rows; ++r) {
    const bool real = r < task.num_queries;
    scratch.minus_lse[r] = real ? -task.lse[r * task.lse_stride] * kLog2E : -INFINITY;
    scratch.minus_delta[r] =
        real ? -dot(row_of<Stored>(task.out, r), row_of<Stored>(task.grad_out, r), task.head_dim) : 0.0f;
  }
}

/// A block's worth of the next task's rows, those that it writes too: a store waits for its line as a load
/// does.
template <class Stored>
[[gnu::always_inline]] inline void fetch_part(const VarlenGradientTask& task, int64_t first) {
  const int64_t last = first + kBlockRows;
  fetch_rows<Stored>(task.grad_out, first, last, task.num_queries, task.head_dim);
  fetch_rows<Stored>(task.out, first, last, task.num_queries, task.head_dim);
  fetch_rows<Stored>(task.q, first, last, task.num_queries, task.head_dim);
  fetch_rows<Stored>(task.k, first, last, task.num_key_rows, task.head_dim);
  fetch_rows<Stored>(task.v, first, last, task.num_key_rows, task.head_dim);
  fetch_rows<Stored>({task.dq.data, task.dq.stride}, first, last, task.num_queries, task.head_dim);
  fetch_rows<Stored>({task.dk.data, task.dk.stride}, first, last, task.num_key_rows, task.head_dim);
  fetch_rows<Stored>({task.dv.data, task.dv.stride}, first, last, task.num_key_rows, task.head_dim);
}

template <class Layout>
inline void differentiate(const VarlenGradientTask& task) {
  using Stored = typename Layout::Stored;
  using Element = typename Layout::Product::Element;
  const GradientScratch scratch(task.scratch, task.num_queries, task.head_dim);
  const int padded = padded_dim(task.head_dim);
  typename Layout::Block block{};  // what lies behind the last key of a block is read, and counts nothing
  prepare_queries<Layout>(task, scratch);
  for (int64_t key = 0; key < task.num_keys; key += kBlockKeys) {
    const int num_keys = static_cast<int>(smaller(kBlockKeys, task.num_keys - key));
    Layout::pack_keys(row_of<Stored>(task.k, key), task.k.stride, num_keys, task.head_dim, padded,
                      reinterpret_cast<Element*>(scratch.key_panels),
                      reinterpret_cast<Element*>(scratch.key_rows));
    Layout::pack_keys(row_of<Stored>(task.v, key), task.v.stride, num_keys, task.head_dim, padded,
                      reinterpret_cast<Element*>(scratch.value_panels), static_cast<Element*>(nullptr));
    memset(scratch.dk, 0, sizeof(float) * static_cast<size_t>(kBlockKeys * padded));
    memset(scratch.dv, 0, sizeof(float) * static_cast<size_t>(kBlockKeys * padded));
    for (int64_t row = 0; row < task.num_queries; row += kBlockRows) {
      if (key == 0 && task.next != nullptr) fetch_part<Stored>(*task.next, row);
      add_block<Layout>(task, scratch, row, num_keys, block);
    }
    write_rows<Stored>(scratch.dk, padded, num_keys, task.head_dim, task.dk, key);
    write_rows<Stored>(scratch.dv, padded, num_keys, task.head_dim, task.dv, key);
  }
  for (int64_t row = task.num_keys; row < task.num_key_rows; ++row)
    own_key_gradients<Stored>(task, row, scratch, padded);
  write_rows<Stored>(scratch.dq, padded, task.num_queries, task.head_dim, task.dq, 0);
}

}  // namespace
}  // namespace scfm
