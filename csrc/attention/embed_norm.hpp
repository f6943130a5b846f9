/// The sum of a token's embeddings and its LayerNorm:
///   x[t] = sum_n tables[n][ids[n][t]] + addend[t];  out[t] = (x - mean(x)) / sqrt(var(x) + eps) * weight +
///   bias
///
/// One pass: nothing between is written. The backward makes x again, and sums a table's gradients for each id
/// over its tokens in their order: ids are sorted, and every row of a gradient is written once, by one task.
#pragma once

#include <cstdint>
#include <vector>

#include "attention/embed_norm_kernels.hpp"

namespace scfm {

struct EmbedNormProblem {
  std::vector<EmbedTable> tables;        // at least one
  std::vector<std::int64_t> table_rows;  // of each
  EmbedRows addend;
  const float* weight;  // null: the plain sum
  const float* bias;
  std::int64_t num_tokens;
  std::int64_t size;  // M >= 1
};

/// mean and rstd are written only where there is a weight. Throws InvalidArgument, naming table and token,
/// for an id outside its table, before anything is written.
void embed_norm_forward(const EmbedNormProblem& problem, const EmbedRows& out, float* mean, float* rstd,
                        float eps);

struct EmbedNormGradients {
  std::vector<float*> tables;
  EmbedRows addend;  // where the problem has one
  float* weight;     // likewise
  float* bias;
};

/// Writes all of `gradients`; throws as the forward does.
void embed_norm_backward(const EmbedNormProblem& problem, const EmbedRows& grad_out, const float* mean,
                         const float* rstd, const EmbedNormGradients& gradients);

}  // namespace scfm
