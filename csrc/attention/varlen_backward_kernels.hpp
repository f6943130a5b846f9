/// The inner loops of attention inside a cell, backward: one table per instruction set.
///
///     P = exp(scale q k^T - lse);   dv = P^T do;   dS = scale P (do v^T - delta);   dq = dS k;   dk = dS^T q
///     delta = rowsum(out do)
///
/// A task is one head of one cell: every sum has one owner and one order. Probabilities are made again, for a
/// block of queries and a block of keys at a time.
#pragma once

#include <stdint.h>

#include "attention/varlen_forward_kernels.hpp"

namespace scfm {

/// Rows of one head that are written; the stride counts elements.
struct GradientRows {
  void* data;
  int64_t stride;
};

struct VarlenGradientTask {
  AttentionRows grad_out;
  AttentionRows q;
  AttentionRows k;
  AttentionRows v;
  AttentionRows out;
  const float* lse;
  int64_t lse_stride;
  GradientRows dq;
  GradientRows dk;
  GradientRows dv;
  int64_t num_queries;
  int64_t num_keys;  // the first rows of k and v that all queries see
  /// Rows of k and v. Those behind num_keys are seen by the query of the same number alone.
  int64_t num_key_rows;
  int head_dim;
  float scale;
  float* scratch;
  const VarlenGradientTask* next;  // what this thread computes after it, to be fetched meanwhile; or none
};

struct VarlenBackwardKernels {
  /// Floats of scratch that a task of so many queries needs.
  int64_t (*scratch_size)(int64_t num_queries, int head_dim);
  void (*task_f32)(const VarlenGradientTask&);
  void (*task_bf16)(const VarlenGradientTask&);
};

extern const VarlenBackwardKernels varlen_backward_generic;
extern const VarlenBackwardKernels varlen_backward_avx2;
extern const VarlenBackwardKernels varlen_backward_avx512;
extern const VarlenBackwardKernels varlen_backward_avx512_bf16;

}  // namespace scfm
