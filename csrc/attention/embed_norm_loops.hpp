/// embed_norm's loops, written once against the vector vocabulary of simd_<isa>.hpp, which the including file
/// has included before. All in an unnamed namespace: no two copies can be mistaken for one another by the
/// linker.
///
/// A token's sum is made in a scratch row that stays in the nearest cache, and is swept from there for its
/// mean, its variance and its output. A vocabulary's table is larger than any cache and its rows come in no
/// order, so the rows of a later token are asked for while those of this one are added, piece by piece.
#pragma once

#include <math.h>
#include <stdint.h>

#include "attention/embed_norm_kernels.hpp"

namespace scfm {
namespace {

constexpr int64_t kTokensAhead = 2;

inline Vec load_value(const float* p, int n) { return n == Vec::width ? load(p) : load_partial(p, n); }
inline Vec load_value(const uint16_t* p, int n) {
  return n == Vec::width ? load_bf16(p) : load_bf16_partial(p, n);
}
inline void store_value(float* p, Vec x, int n) { n == Vec::width ? store(p, x) : store_partial(p, x, n); }
inline void store_value(uint16_t* p, Vec x, int n) {
  n == Vec::width ? store_bf16(p, x) : store_bf16_partial(p, x, n);
}

/// Calls body(at, lanes) for every vector of a row; all but the last are whole.
template <class Body>
inline void for_vectors(int64_t size, Body body) {
  int64_t at = 0;
  for (; at + Vec::width <= size; at += Vec::width) body(at, Vec::width);
  if (at < size) body(at, static_cast<int>(size - at));
}

/// The sum of term(at, lanes) over a row, by four chains of additions.
template <class Term>
inline float sum_of(int64_t size, Term term) {
  Vec sum[4] = {zero_vec(), zero_vec(), zero_vec(), zero_vec()};
  int64_t at = 0;
  for (; at + 4 * Vec::width <= size; at += 4 * Vec::width) {
    for (int i = 0; i < 4; ++i) sum[i] = add(sum[i], term(at + i * Vec::width, Vec::width));
  }
  for (; at + Vec::width <= size; at += Vec::width) sum[0] = add(sum[0], term(at, Vec::width));
  if (at < size) sum[1] = add(sum[1], term(at, static_cast<int>(size - at)));
  return reduce_add(add(add(sum[0], sum[1]), add(sum[2], sum[3])));
}

template <class Value>
inline const Value* row_of(const EmbedTable& table, int64_t token, int64_t size) {
  const int64_t row = table.ids_are_64 ? static_cast<const int64_t*>(table.ids)[token]
                                       : static_cast<const int32_t*>(table.ids)[token];
  return static_cast<const Value*>(table.rows.data) + row * size;
}

/// x = the token's rows and addend, added in this order. `later`: a token whose rows to fetch meanwhile.
template <class Value>
inline void sum_token(const EmbedInputs& inputs, int64_t token, int64_t later, float* x) {
  for (int64_t n = 0; n < inputs.num_tables; ++n) {
    const Value* row = row_of<Value>(inputs.tables[n], token, inputs.size);
    const Value* next = row_of<Value>(inputs.tables[n], later, inputs.size);
    for_vectors(inputs.size, [&](int64_t at, int lanes) {
      __builtin_prefetch(next + at);
      const Vec value = load_value(row + at, lanes);
      store(x + at, n == 0 ? value : add(load(x + at), value));
    });
  }
  if (inputs.addend.data == nullptr) return;
  const Value* row = static_cast<const Value*>(inputs.addend.data) + token * inputs.size;
  for_vectors(inputs.size,
              [&](int64_t at, int lanes) { store(x + at, add(load(x + at), load_value(row + at, lanes))); });
}

inline int64_t later_token(int64_t token, int64_t end) {
  return token + kTokensAhead < end ? token + kTokensAhead : token;
}

template <class Value>
inline void normalise_token(const EmbedForwardTask& task, int64_t token, const float* x) {
  const int64_t size = task.inputs.size;
  const float share = 1.0f / static_cast<float>(size);
  const float mean = sum_of(size, [&](int64_t at, int) { return load(x + at); }) * share;
  const Vec centre = broadcast(mean);
  const float squares = sum_of(size, [&](int64_t at, int lanes) {
    const Vec centred = sub(load(x + at), centre);
    const Vec inside = lanes == Vec::width ? centred : first_lanes(lanes, centred, zero_vec());
    return mul(inside, inside);
  });
  const float rstd = 1.0f / sqrtf(squares * share + task.eps);
  const Vec scale = broadcast(rstd);
  Value* out = static_cast<Value*>(task.out.data) + token * size;
  for_vectors(size, [&](int64_t at, int lanes) {
    const Vec normed = mul(sub(load(x + at), centre), scale);
    const Vec weight = load_value(task.inputs.weight + at, lanes);
    store_value(out + at, fmadd(normed, weight, load_value(task.inputs.bias + at, lanes)), lanes);
  });
  task.mean[token] = mean;
  task.rstd[token] = rstd;
}

template <class Value>
void forward_tokens(const EmbedForwardTask& task) {
  const int64_t size = task.inputs.size;
  for (int64_t token = task.begin; token < task.end; ++token) {
    sum_token<Value>(task.inputs, token, later_token(token, task.end), task.scratch);
    if (task.inputs.weight != nullptr) {
      normalise_token<Value>(task, token, task.scratch);
      continue;
    }
    Value* out = static_cast<Value*>(task.out.data) + token * size;
    for_vectors(size, [&](int64_t at, int lanes) { store_value(out + at, load(task.scratch + at), lanes); });
  }
}

/// Gradients of one token, whose sum is x:
///   dx = (g - mean(g) - normed * mean(g * normed)) * rstd,   g = dO * weight
template <class Value>
inline void token_gradients(const EmbedBackwardTask& task, int64_t token, float* x) {
  const int64_t size = task.inputs.size;
  const Value* upstream = static_cast<const Value*>(task.grad_out.data) + token * size;
  const Vec centre = broadcast(task.mean[token]);
  const Vec scale = broadcast(task.rstd[token]);
  const auto weighted = [&](int64_t at, int lanes) {
    return mul(load_value(upstream + at, lanes), load_value(task.inputs.weight + at, lanes));
  };
  const float share = 1.0f / static_cast<float>(size);
  const Vec offset = broadcast(-share * sum_of(size, weighted));
  const Vec tilt = broadcast(-share * sum_of(size, [&](int64_t at, int lanes) {
    const Vec normed = mul(sub(load(x + at), centre), scale);
    const Vec inside = lanes == Vec::width ? normed : first_lanes(lanes, normed, zero_vec());
    store(x + at, inside);
    return mul(weighted(at, lanes), inside);
  }));
  float* sums = task.grad_sums + (token - task.origin) * size;
  Value* addend = static_cast<Value*>(task.grad_addend.data) + (task.grad_addend.data ? token * size : 0);
  for_vectors(size, [&](int64_t at, int lanes) {
    const Vec normed = load(x + at);
    const Vec grad = load_value(upstream + at, lanes);
    store(task.grad_weight + at, fmadd(grad, normed, load(task.grad_weight + at)));
    store(task.grad_bias + at, add(grad, load(task.grad_bias + at)));
    const Vec gradient = mul(fmadd(normed, tilt, add(weighted(at, lanes), offset)), scale);
    store_value(sums + at, gradient, lanes);
    if (addend != nullptr) store_value(addend + at, gradient, lanes);
  });
}

template <class Value>
void backward_tokens(const EmbedBackwardTask& task) {
  for (int64_t i = 0; i < padded_size(task.inputs.size); ++i) task.grad_weight[i] = task.grad_bias[i] = 0.0f;
  for (int64_t token = task.begin; token < task.end; ++token) {
    sum_token<Value>(task.inputs, token, later_token(token, task.end), task.scratch);
    token_gradients<Value>(task, token, task.scratch);
  }
}

/// Four vectors at a time stay in registers while the rows pass.
template <class Value>
void add_rows_of(const SumRowsTask& task) {
  constexpr int64_t kStep = 4 * Vec::width;
  const auto* rows = static_cast<const Value*>(task.rows.data);
  const auto row = [&](int64_t k) {
    return rows + (task.order == nullptr ? k : task.order[k]) * task.row_size;
  };
  int64_t at = task.begin;
  for (; at + kStep <= task.end; at += kStep) {
    Vec sum[4];
    for (int i = 0; i < 4; ++i) sum[i] = load(task.out + at + i * Vec::width);
    for (int64_t k = 0; k < task.count; ++k) {
      const Value* from = row(k) + at;
      for (int i = 0; i < 4; ++i) sum[i] = add(sum[i], load_value(from + i * Vec::width, Vec::width));
    }
    for (int i = 0; i < 4; ++i) store(task.out + at + i * Vec::width, sum[i]);
  }
  for_vectors(task.end - at, [&](int64_t more, int lanes) {
    float* out = task.out + at + more;
    Vec sum = load_value(out, lanes);
    for (int64_t k = 0; k < task.count; ++k) sum = add(sum, load_value(row(k) + at + more, lanes));
    store_value(out, sum, lanes);
  });
}

void embed_forward(const EmbedForwardTask& task) noexcept {
  task.out.is_bf16 ? forward_tokens<uint16_t>(task) : forward_tokens<float>(task);
}
void embed_backward(const EmbedBackwardTask& task) noexcept {
  task.grad_out.is_bf16 ? backward_tokens<uint16_t>(task) : backward_tokens<float>(task);
}
void add_rows(const SumRowsTask& task) noexcept {
  task.rows.is_bf16 ? add_rows_of<uint16_t>(task) : add_rows_of<float>(task);
}

constexpr EmbedNormKernels kEmbedNorm = {embed_forward, embed_backward, add_rows};

}  // namespace
}  // namespace scfm
