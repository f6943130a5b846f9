/// BERT's masking of packed tokens: which positions the model must predict, and what it sees there instead.
///
/// Each token draws four words of Philox from (position in its cell, cell id, epoch) under the seed, so the
/// masking of a cell is the same in any batch, on any rank and with any number of threads.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace scfm {

struct MlmMaskOptions {
  std::uint64_t seed = 0;
  std::uint32_t epoch = 0;
  double probability = 0.15;               // of a token being selected
  std::int32_t mask_token = 0;             // stands for 80% of the selected
  std::int32_t vocab_size = 0;             // 10% become a random id below this, 10% stay
  std::vector<std::int32_t> never_masked;  // ids that are never selected
};

/// token_ids: T ids, packed; cu_seqlens: C + 1 offsets into them; cell_ids: C; masked: T, written.
/// Returns the selected positions in token_ids, ascending. Throws InvalidArgument where lengths or options do
/// not fit.
std::vector<std::int64_t> mlm_mask(std::span<const std::int32_t> token_ids,
                                   std::span<const std::int32_t> cu_seqlens,
                                   std::span<const std::int64_t> cell_ids, const MlmMaskOptions& options,
                                   std::span<std::int32_t> masked);

}  // namespace scfm
