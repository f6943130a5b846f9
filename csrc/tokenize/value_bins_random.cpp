#include "tokenize/value_bins_random.hpp"

#include <algorithm>
#include <functional>

namespace scfm {

std::uint64_t fingerprint_of(const std::int32_t* tokens, const float* values, std::int64_t count) noexcept {
  std::uint64_t sum = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    if (values[i] == 0) continue;
    std::uint64_t mixed = (static_cast<std::uint64_t>(static_cast<std::uint32_t>(tokens[i])) << 32) |
                          __builtin_bit_cast(std::uint32_t, values[i]);
    mixed *= kFingerprintFactor;
    mixed ^= mixed >> 32;
    sum += mixed;
  }
  return sum;
}

const std::uint32_t* CellWords::draw(std::uint32_t purpose, std::uint64_t cell, std::int64_t count) {
  WordArguments arguments{};
  arguments.key[0] = static_cast<std::uint32_t>(key_.seed) ^ purpose;
  arguments.key[1] = static_cast<std::uint32_t>(key_.seed >> 32);
  arguments.counter[0] = static_cast<std::uint32_t>(cell);
  arguments.counter[1] = static_cast<std::uint32_t>(cell >> 32);
  arguments.counter[2] = key_.epoch;
  arguments.num_blocks = (count + kWordBlock - 1) / kWordBlock;
  arguments.words = words_.reserve(arguments.num_blocks * kWordBlock);
  kernels_.random_words(arguments);
  return arguments.words;
}

void choose_any(const std::uint32_t* words, std::int64_t count, std::int64_t num_kept,
                std::int32_t* places) noexcept {
  // Each in turn is kept with probability (still wanted) / (still left), which makes all sets equally likely.
  // The sign of a difference instead of a comparison: a branch here would be a coin toss.
  std::int64_t wanted = num_kept;
  for (std::int64_t i = 0; i < count; ++i) {
    const auto left = static_cast<std::uint64_t>(count - i);
    const auto drawn = static_cast<std::int64_t>((words[i] * left) >> 32);  // uniform below `left`
    const auto keep = static_cast<std::int64_t>(static_cast<std::uint64_t>(drawn - wanted) >> 63);
    *places = static_cast<std::int32_t>(i);
    places += keep;
    wanted -= keep;
  }
}

void choose_largest(const float* values, std::int64_t count, std::int64_t num_kept,
                    AlignedBuffer<float>& scratch, std::int32_t* places) {
  if (num_kept == 0) return;
  float* sorted = scratch.reserve(count);
  std::copy(values, values + count, sorted);
  std::nth_element(sorted, sorted + num_kept - 1, sorted + count, std::greater<>());
  const float least = sorted[num_kept - 1];
  std::int64_t num_equal =
      num_kept - std::count_if(values, values + count, [=](float x) { return x > least; });
  std::int64_t kept = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const bool equal = values[i] == least && num_equal > 0;
    if (equal) --num_equal;
    if (equal || values[i] > least) places[kept++] = static_cast<std::int32_t>(i);
  }
}

}  // namespace scfm
