#include "tokenize/mlm_mask.hpp"

#include <algorithm>
#include <string>

#include "base/errors.hpp"
#include "base/philox.hpp"
#include "cpu/thread_pool.hpp"

namespace scfm {
namespace {

constexpr std::uint32_t kPurpose = 0x6d6c6d00u;  // "mlm": keeps this stream apart from others of the seed
constexpr double kTwoTo32 = 4294967296.0;
constexpr auto kMaskBelow = static_cast<std::uint64_t>(0.8 * kTwoTo32);
constexpr auto kRandomBelow = static_cast<std::uint64_t>(0.9 * kTwoTo32);
constexpr std::int64_t kCellsPerTask = 16;

void check(std::span<const std::int32_t> token_ids, std::span<const std::int32_t> cu_seqlens,
           std::span<const std::int64_t> cell_ids, const MlmMaskOptions& options, std::size_t num_masked) {
  const auto fail = [](const std::string& message) { throw InvalidArgument("mlm_mask: " + message); };
  if (cu_seqlens.size() != cell_ids.size() + 1) {
    fail("cu_seqlens has " + std::to_string(cu_seqlens.size()) + " entries, expected " +
         std::to_string(cell_ids.size() + 1) + " for " + std::to_string(cell_ids.size()) + " cell_ids");
  }
  if (cu_seqlens.front() != 0) fail("cu_seqlens[0] = " + std::to_string(cu_seqlens.front()) + ", expected 0");
  for (std::size_t cell = 0; cell < cell_ids.size(); ++cell) {
    if (cu_seqlens[cell + 1] < cu_seqlens[cell]) {
      fail("cu_seqlens falls from " + std::to_string(cu_seqlens[cell]) + " to " +
           std::to_string(cu_seqlens[cell + 1]) + " at cell " + std::to_string(cell));
    }
  }
  if (static_cast<std::size_t>(cu_seqlens.back()) != token_ids.size()) {
    fail("cu_seqlens ends at " + std::to_string(cu_seqlens.back()) + ", expected " +
         std::to_string(token_ids.size()) + ", the number of token_ids");
  }
  if (num_masked != token_ids.size()) fail("masked and token_ids differ in length");
  if (!(options.probability >= 0.0 && options.probability <= 1.0)) {
    fail("probability = " + std::to_string(options.probability) + ", expected 0 to 1");
  }
  if (options.vocab_size < 1)
    fail("vocab_size = " + std::to_string(options.vocab_size) + ", expected at least 1");
}

/// Masks one cell and appends the positions selected in it.
void mask_cell(std::span<const std::int32_t> token_ids, std::int64_t start, std::int64_t stop,
               std::int64_t cell_id, const MlmMaskOptions& options, std::span<std::int32_t> masked,
               std::vector<std::int64_t>& selected) {
  const auto select_below = static_cast<std::uint64_t>(options.probability * kTwoTo32);
  const PhiloxKey key = {static_cast<std::uint32_t>(options.seed) ^ kPurpose,
                         static_cast<std::uint32_t>(options.seed >> 32)};
  const auto cell = static_cast<std::uint64_t>(cell_id);
  for (std::int64_t i = start; i < stop; ++i) {
    const std::int32_t token = token_ids[static_cast<std::size_t>(i)];
    std::int32_t& seen = masked[static_cast<std::size_t>(i)];
    seen = token;
    const PhiloxCounter words =
        philox4x32({static_cast<std::uint32_t>(i - start), static_cast<std::uint32_t>(cell),
                    static_cast<std::uint32_t>(cell >> 32), options.epoch},
                   key);
    if (words[0] >= select_below) continue;
    if (std::find(options.never_masked.begin(), options.never_masked.end(), token) !=
        options.never_masked.end()) {
      continue;
    }
    selected.push_back(i);
    if (words[1] < kMaskBelow) {
      seen = options.mask_token;
    } else if (words[1] < kRandomBelow) {
      seen = static_cast<std::int32_t>(
          (std::uint64_t{words[2]} * static_cast<std::uint64_t>(options.vocab_size)) >> 32);
    }
  }
}

}  // namespace

std::vector<std::int64_t> mlm_mask(std::span<const std::int32_t> token_ids,
                                   std::span<const std::int32_t> cu_seqlens,
                                   std::span<const std::int64_t> cell_ids, const MlmMaskOptions& options,
                                   std::span<std::int32_t> masked) {
  check(token_ids, cu_seqlens, cell_ids, options, masked.size());
  const auto num_cells = static_cast<std::int64_t>(cell_ids.size());
  const std::int64_t num_tasks = (num_cells + kCellsPerTask - 1) / kCellsPerTask;
  std::vector<std::vector<std::int64_t>> selected(static_cast<std::size_t>(num_tasks));
  parallel_for(num_tasks, num_threads(), [&](std::int64_t task, int) {
    const std::int64_t last = std::min((task + 1) * kCellsPerTask, num_cells);
    for (std::int64_t cell = task * kCellsPerTask; cell < last; ++cell) {
      const auto c = static_cast<std::size_t>(cell);
      mask_cell(token_ids, cu_seqlens[c], cu_seqlens[c + 1], cell_ids[c], options, masked,
                selected[static_cast<std::size_t>(task)]);
    }
  });
  std::vector<std::int64_t> positions;
  for (const auto& part : selected) positions.insert(positions.end(), part.begin(), part.end());
  return positions;
}

}  // namespace scfm
