/// The inner loops of attention inside a cell, forward: one table per instruction set.
///
///     out[i] = sum_j softmax_j(scale <q[i], k[j]>) v[j]
///
/// A span is some queries of one head of one cell, and all keys they see. Keys and values are packed a
/// stretch at a time into the layout that the products read, scores exist for a tile of queries and a block
/// of keys, and the softmax is merged from block to block by its running maximum.
#pragma once

#include <stdint.h>

namespace scfm {

/// Rows of one head: `data` is the first, strides count elements.
struct AttentionRows {
  const void* data;
  int64_t stride;
};

struct VarlenSpan {
  AttentionRows q;
  AttentionRows k;
  AttentionRows v;
  AttentionRows own_k;  // of the first query: what a query from `first_own` on sees besides the keys
  AttentionRows own_v;
  void* out;
  int64_t out_stride;
  float* lse;
  int64_t lse_stride;
  int64_t num_queries;
  int64_t num_keys;
  int64_t first_own;  // num_queries: none
  int head_dim;
  float scale;
  float* scratch;
  const VarlenSpan* next;  // what this thread computes after it, to be fetched meanwhile; or none
};

struct VarlenForwardKernels {
  /// Floats of scratch that a span of so many queries needs.
  int64_t (*scratch_size)(int64_t num_queries, int head_dim);
  void (*span_f32)(const VarlenSpan&);
  void (*span_bf16)(const VarlenSpan&);
};

extern const VarlenForwardKernels varlen_forward_generic;
extern const VarlenForwardKernels varlen_forward_avx2;
extern const VarlenForwardKernels varlen_forward_avx512;
extern const VarlenForwardKernels varlen_forward_avx512_bf16;

}  // namespace scfm
