/// Attention inside a cell, forward (see varlen_forward_kernels.hpp), written once against the vocabulary of
/// simd_*.hpp and the tiles of attention_tiles.hpp.
///
/// Loops, outermost first: stretches of kStretchKeys keys, packed once; blocks of kBlockRows queries; blocks
/// of kBlockKeys keys; tiles of kTileRows queries. A stretch stays in the second-level cache, a block of keys
/// in the first, a tile's sums in registers.
#pragma once

#include <math.h>

#include "attention/attention_rows.hpp"
#include "attention/attention_tiles.hpp"
#include "attention/varlen_forward_kernels.hpp"

namespace scfm {
namespace {

constexpr int kBlockRows = 8 * kTileRows;
constexpr int kStretchKeys = 512;
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

/// What is kept of every query between two blocks of keys.
struct RunningSoftmax {
  float* sums;   // (rows, padded): sum of p v
  float* norms;  // (rows, width): sum of p, in parts
  float* tops;   // (rows): the maximum so far, in base 2
};

/// float32 products of anything stored.
template <class StoredType>
struct FloatLayout {
  using Stored = StoredType;
  using Product = Floats;
  static constexpr int kBlockKeys = kFloatBlockKeys;

  static int64_t depth(int head_dim) { return head_dim; }  // steps of q k^T
  static int64_t query_size(int head_dim, int padded) { return head_dim > 0 ? padded : 0; }
  static int64_t values_row(int padded) { return padded; }

  static void pack_queries(const Stored* x, int64_t stride, int64_t count, int64_t rows, int head_dim,
                           int padded, float* out) {
    pack_rows(x, stride, count, rows, head_dim, padded, 1.0f, out);
  }
  static void pack_keys(const Stored* x, int64_t stride, int64_t count, int head_dim, float* out) {
    pack_panels<kTileColumns>(x, stride, count, head_dim, out);
  }
  static void pack_values(const Stored* x, int64_t stride, int64_t count, int head_dim, int padded,
                          float* out) {
    pack_rows(x, stride, count, count, head_dim, padded, 1.0f, out);
  }
  /// Two vectors of probabilities to where the product with the values reads them.
  static void store_weights(float* out, Vec low, Vec high) {
    store(out, low);
    store(out + kWidth, high);
  }
  static Vec exponential(Vec x) { return exp2_vec(x); }
};

/// Scores of a tile, in base 2, rows kBlockKeys apart; keys from num_keys on are -infinity.
template <class Layout>
inline void score_tile(const typename Layout::Product::Element* queries, int64_t query_stride,
                       const typename Layout::Product::Element* keys, int64_t depth, int num_keys, Vec scale,
                       float* scores) {
  for (int first = 0; first < num_keys; first += kTileColumns) {
    const auto* panel = keys + first * depth;
    with_count<kTileVectors>(
        static_cast<int>(smaller(kTileVectors, vectors_for(num_keys - first))), [&](auto vectors) {
          constexpr int kVectors = decltype(vectors)::value;
          Vec sums[kTileRows][kVectors];
          for (int r = 0; r < kTileRows; ++r) {
            for (int c = 0; c < kVectors; ++c) sums[r][c] = zero_vec();
          }
          add_tile<typename Layout::Product, kVectors>(queries, query_stride, 1, panel, kTileColumns, depth,
                                                       sums);
          for (int r = 0; r < kTileRows; ++r) {
            for (int c = 0; c < kVectors; ++c) {
              store(scores + r * Layout::kBlockKeys + first + c * kWidth, mul(sums[r][c], scale));
            }
          }
        });
  }
  const int partial = num_keys % kWidth;
  if (partial == 0) return;
  for (int r = 0; r < kTileRows; ++r) {
    float* last = scores + r * Layout::kBlockKeys + num_keys - partial;
    store(last, first_lanes(partial, load(last), broadcast(-INFINITY)));
  }
}

inline float highest_of(const float* scores, int num_vectors) {
  Vec most = load(scores);
  for (int i = 1; i < num_vectors; ++i) most = max(most, load(scores + i * kWidth));
  return reduce_max(most);
}

/// Scores of one row to weights relative to `top`; returns their sum, in parts.
template <class Layout>
inline Vec weigh_row(const float* scores, int num_vectors, float top,
                     typename Layout::Product::Element* weights) {
  const Vec origin = broadcast(top);
  Vec total = zero_vec();
  for (int i = 0; i < num_vectors; i += 2) {
    const Vec low = Layout::exponential(sub(load(scores + i * kWidth), origin));
    // A block of keys is a whole number of vector pairs, so the second is there; past the end it counts
    // nothing.
    const bool both = i + 1 < num_vectors;
    const Vec high = both ? Layout::exponential(sub(load(scores + (i + 1) * kWidth), origin)) : zero_vec();
    total = add(total, add(low, high));
    Layout::store_weights(weights + i * kWidth / Layout::Product::kTerms, low, high);
  }
  return total;
}

/// The same beside earlier blocks of keys: what was summed before is rescaled to the new maximum.
template <class Layout>
inline void merge_row(const float* scores, int num_vectors, typename Layout::Product::Element* weights,
                      int padded, float* sums, float* norm, float* top) {
  const float before = *top;
  const float highest = highest_of(scores, num_vectors);
  const float now = highest > before ? highest : before;
  Vec total = weigh_row<Layout>(scores, num_vectors, now, weights);
  if (now != before) {
    const Vec factor = broadcast(exp2f(before - now));
    for (int c = 0; c < padded; c += kWidth) store(sums + c, mul(load(sums + c), factor));
    total = fmadd(load(norm), factor, total);
    *top = now;
  } else {
    total = add(load(norm), total);
  }
  store(norm, total);
}

/// Calls body(Count<vectors>, first column) for every stretch of columns that a tile's registers hold.
template <class Body>
inline void for_column_tiles(int padded, Body body) {
  for (int first = 0; first < padded; first += kTileColumns) {
    with_count<kTileVectors>(static_cast<int>(smaller(kTileVectors, (padded - first) / kWidth)),
                             [&](auto vectors) { body(vectors, first); });
  }
}

/// A tile of queries and a block of keys.
template <class Layout>
inline void attend_tile(const typename Layout::Product::Element* queries, int64_t query_stride,
                        const typename Layout::Product::Element* keys,
                        const typename Layout::Product::Element* values, int64_t depth, int padded,
                        int num_rows, int num_keys, Vec scale, RunningSoftmax state) {
  using Element = typename Layout::Product::Element;
  constexpr int kWeightsRow = Layout::kBlockKeys / Layout::Product::kTerms;
  alignas(64) float scores[kTileRows * Layout::kBlockKeys];
  alignas(64) Element weights[kTileRows * kWeightsRow];
  score_tile<Layout>(queries, query_stride, keys, depth, num_keys, scale, scores);
  const int vectors = vectors_for(num_keys);
  for (int r = 0; r < kTileRows; ++r) {
    if (r < num_rows) {
      merge_row<Layout>(scores + r * Layout::kBlockKeys, vectors, weights + r * kWeightsRow, padded,
                        state.sums + static_cast<int64_t>(r) * padded, state.norms + r * kWidth,
                        state.tops + r);
    } else {
      memset(weights + r * kWeightsRow, 0, sizeof(Element) * kWeightsRow);
    }
  }
  const int64_t steps = (num_keys + Layout::Product::kTerms - 1) / Layout::Product::kTerms;
  for_column_tiles(padded, [&](auto count, int first) {
    constexpr int kVectors = decltype(count)::value;
    Vec sums[kTileRows][kVectors];
    for (int r = 0; r < kTileRows; ++r) {
      for (int c = 0; c < kVectors; ++c)
        sums[r][c] = load(state.sums + static_cast<int64_t>(r) * padded + first + c * kWidth);
    }
    add_tile<typename Layout::Product, kVectors>(weights, kWeightsRow, 1, values + first,
                                                 Layout::values_row(padded), steps, sums);
    for (int r = 0; r < kTileRows; ++r) {
      for (int c = 0; c < kVectors; ++c) {
        store(state.sums + static_cast<int64_t>(r) * padded + first + c * kWidth, sums[r][c]);
      }
    }
  });
}

/// One key more, seen by this query alone.
template <class Stored>
inline void add_own_key(const VarlenSpan& span, int64_t row, int padded, RunningSoftmax state) {
  const Stored* q = row_of<Stored>(span.q, row);
  const Stored* k = row_of<Stored>(span.own_k, row);
  const Stored* v = row_of<Stored>(span.own_v, row);
  Vec products = zero_vec();
  for (int c = 0; c < span.head_dim; c += kWidth) {
    products = fmadd(load_stored(q + c, span.head_dim - c), load_stored(k + c, span.head_dim - c), products);
  }
  const float score = reduce_add(products) * span.scale * kLog2E;
  float* sums = state.sums + row * padded;
  float* norm = state.norms + row * kWidth;
  const float before = state.tops[row];
  const float now = score > before ? score : before;
  const Vec kept = broadcast(before == now ? 1.0f : exp2f(before - now));
  const Vec own = broadcast(exp2f(score - now));
  for (int c = 0; c < span.head_dim; c += kWidth) {
    store(sums + c, fmadd(own, load_stored(v + c, span.head_dim - c), mul(load(sums + c), kept)));
  }
  store(norm, add(mul(load(norm), kept), first_lanes(1, own, zero_vec())));
  state.tops[row] = now;
}

/// Writes a row's log-sum-exp; returns what its sums are to be multiplied by.
inline float finish_softmax(const VarlenSpan& span, int64_t row, float top, float norm) {
  const bool seen = top != -INFINITY || !(norm == 0.0f);
  span.lse[row * span.lse_stride] = seen ? (top + log2f(norm)) * kLn2 : -INFINITY;
  return seen ? 1.0f / norm : 0.0f;
}

template <class Stored>
inline void finish_row(const VarlenSpan& span, int64_t row, int padded, RunningSoftmax state) {
  Stored* out = static_cast<Stored*>(span.out) + row * span.out_stride;
  const float norm = reduce_add(load(state.norms + row * kWidth));
  const Vec factor = broadcast(finish_softmax(span, row, state.tops[row], norm));
  for (int c = 0; c < span.head_dim; c += kWidth) {
    store_stored(out + c, mul(load(state.sums + row * padded + c), factor), span.head_dim - c);
  }
}

/// A tile of queries and all their keys, where these are one block: sums go from registers to the output.
template <class Layout>
inline void attend_only_block(const VarlenSpan& span, const typename Layout::Product::Element* queries,
                              int64_t query_stride, const typename Layout::Product::Element* keys,
                              const typename Layout::Product::Element* values, int64_t depth, int padded,
                              int64_t first_row, Vec scale) {
  using Stored = typename Layout::Stored;
  using Element = typename Layout::Product::Element;
  constexpr int kWeightsRow = Layout::kBlockKeys / Layout::Product::kTerms;
  alignas(64) float scores[kTileRows * Layout::kBlockKeys];
  alignas(64) Element weights[kTileRows * kWeightsRow];
  const int num_keys = static_cast<int>(span.num_keys);
  const int num_rows = static_cast<int>(smaller(kTileRows, span.num_queries - first_row));
  const int vectors = vectors_for(num_keys);
  score_tile<Layout>(queries, query_stride, keys, depth, num_keys, scale, scores);
  float factors[kTileRows];
  for (int r = 0; r < kTileRows; ++r) {
    if (r < num_rows) {
      const float* row = scores + r * Layout::kBlockKeys;
      const float highest = highest_of(row, vectors);
      const float top = highest > -INFINITY ? highest : -INFINITY;
      const Vec norm = weigh_row<Layout>(row, vectors, top, weights + r * kWeightsRow);
      factors[r] = finish_softmax(span, first_row + r, top, reduce_add(norm));
    } else {
      memset(weights + r * kWeightsRow, 0, sizeof(Element) * kWeightsRow);
    }
  }
  const int64_t steps = (num_keys + Layout::Product::kTerms - 1) / Layout::Product::kTerms;
  for_column_tiles(padded, [&](auto count, int first) {
    constexpr int kVectors = decltype(count)::value;
    Vec sums[kTileRows][kVectors];
    for (int r = 0; r < kTileRows; ++r) {
      for (int c = 0; c < kVectors; ++c) sums[r][c] = zero_vec();
    }
    add_tile<typename Layout::Product, kVectors>(weights, kWeightsRow, 1, values + first,
                                                 Layout::values_row(padded), steps, sums);
    for (int r = 0; r < num_rows; ++r) {
      Stored* out = static_cast<Stored*>(span.out) + (first_row + r) * span.out_stride + first;
      for (int c = 0; c < kVectors; ++c) {
        const Vec mixed = mul(sums[r][c], broadcast(factors[r]));
        store_stored(out + c * kWidth, mixed, span.head_dim - first - c * kWidth);
      }
    }
  });
}

/// A tile's worth of the next span's rows.
template <class Stored>
[[gnu::always_inline]] inline void fetch_part(const VarlenSpan& span, int64_t first) {
  const int64_t last = first + kTileRows;
  fetch_rows<Stored>(span.q, first, last, span.num_queries, span.head_dim);
  fetch_rows<Stored>(span.k, first, last, span.num_keys, span.head_dim);
  fetch_rows<Stored>(span.v, first, last, span.num_keys, span.head_dim);
}

inline int64_t padded_rows(int64_t num_queries) { return round_up(num_queries, kTileRows); }
inline int padded_dim(int head_dim) { return static_cast<int>(round_up(head_dim, kWidth)); }

/// Where a span's parts lie in its scratch.
struct SpanScratch {
  SpanScratch(float* memory, int64_t num_queries, int head_dim) {
    const int padded = padded_dim(head_dim);
    const int64_t rows = padded_rows(num_queries);
    state = {memory, memory + rows * padded, memory + rows * (padded + kWidth)};
    queries = memory + rows * (padded + kWidth + kWidth);
    keys = queries + rows * padded;
    values = keys + int64_t{kStretchKeys} * padded;
    size = (values - memory) + int64_t{kStretchKeys} * padded;
  }
  RunningSoftmax state;
  float* queries;
  float* keys;
  float* values;
  int64_t size;
};

inline int64_t varlen_scratch_size(int64_t num_queries, int head_dim) {
  static float nowhere[1];
  return SpanScratch(nowhere, num_queries, head_dim).size;
}

template <class Layout>
inline void attend_span(const VarlenSpan& span) {
  using Stored = typename Layout::Stored;
  using Element = typename Layout::Product::Element;
  const SpanScratch scratch(span.scratch, span.num_queries, span.head_dim);
  const RunningSoftmax state = scratch.state;
  const int padded = padded_dim(span.head_dim);
  const int64_t depth = Layout::depth(span.head_dim);
  const int64_t rows = padded_rows(span.num_queries);
  const int64_t query_size = Layout::query_size(span.head_dim, padded);
  auto* queries = reinterpret_cast<Element*>(scratch.queries);
  auto* keys = reinterpret_cast<Element*>(scratch.keys);
  auto* values = reinterpret_cast<Element*>(scratch.values);
  Layout::pack_queries(row_of<Stored>(span.q, 0), span.q.stride, span.num_queries, rows, span.head_dim,
                       padded, queries);
  const Vec scale = broadcast(span.scale * kLog2E);
  const bool fetches = span.next != nullptr;
  if (0 < span.num_keys && span.num_keys <= Layout::kBlockKeys && span.first_own == span.num_queries) {
    Layout::pack_keys(row_of<Stored>(span.k, 0), span.k.stride, span.num_keys, span.head_dim, keys);
    Layout::pack_values(row_of<Stored>(span.v, 0), span.v.stride, span.num_keys, span.head_dim, padded,
                        values);
    for (int64_t row = 0; row < span.num_queries; row += kTileRows) {
      if (fetches) fetch_part<Stored>(*span.next, row);
      attend_only_block<Layout>(span, queries + row * query_size, query_size, keys, values, depth, padded,
                                row, scale);
    }
    return;
  }
  memset(state.sums, 0, sizeof(float) * static_cast<size_t>(rows * (padded + kWidth)));
  for (int64_t r = 0; r < rows; ++r) state.tops[r] = -INFINITY;
  for (int64_t begin = 0; begin < span.num_keys; begin += kStretchKeys) {
    const int64_t count = smaller(kStretchKeys, span.num_keys - begin);
    Layout::pack_keys(row_of<Stored>(span.k, begin), span.k.stride, count, span.head_dim, keys);
    Layout::pack_values(row_of<Stored>(span.v, begin), span.v.stride, count, span.head_dim, padded, values);
    for (int64_t block = 0; block < span.num_queries; block += kBlockRows) {
      for (int64_t key = 0; key < count; key += Layout::kBlockKeys) {
        const int num_keys = static_cast<int>(smaller(Layout::kBlockKeys, count - key));
        for (int64_t row = block; row < smaller(block + kBlockRows, span.num_queries); row += kTileRows) {
          if (fetches && begin + key == 0) fetch_part<Stored>(*span.next, row);
          attend_tile<Layout>(queries + row * query_size, query_size, keys + key * depth,
                              values + key / Layout::Product::kTerms * Layout::values_row(padded), depth,
                              padded, static_cast<int>(smaller(kTileRows, span.num_queries - row)), num_keys,
                              scale,
                              {state.sums + row * padded, state.norms + row * kWidth, state.tops + row});
        }
      }
    }
  }
  for (int64_t row = 0; row < span.num_queries; ++row) {
    if (row >= span.first_own) add_own_key<Stored>(span, row, padded, state);
    finish_row<Stored>(span, row, padded, state);
  }
}

}  // namespace
}  // namespace scfm
