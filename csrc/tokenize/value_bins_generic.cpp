/// value_bins' loops in plain C++: the reference for the others, and what runs where nothing better can.
#include "tokenize/value_bins_loops.hpp"

namespace scfm {
namespace {

MatchSummary match(const MatchArguments& row) noexcept {
  MatchState state;
  row.values_are_f64 ? match_scalar<double>(row, 0, state) : match_scalar<float>(row, 0, state);
  return state.summary();
}

/// Philox4x32-10 as in base/philox.hpp, one counter after the other.
void random_words(const WordArguments& arguments) noexcept {
  for (std::int64_t block = 0; block < arguments.num_blocks; ++block) {
    std::uint32_t* words = arguments.words + block * kWordBlock;
    for (std::uint32_t lane = 0; lane < kWordLanes; ++lane) {
      std::uint32_t c0 = static_cast<std::uint32_t>(block) * kWordLanes + lane;
      std::uint32_t c1 = arguments.counter[0];
      std::uint32_t c2 = arguments.counter[1];
      std::uint32_t c3 = arguments.counter[2];
      std::uint32_t key0 = arguments.key[0];
      std::uint32_t key1 = arguments.key[1];
      for (int round = 0; round < 10; ++round) {
        const std::uint64_t product0 = std::uint64_t{kPhiloxMultiplier0} * c0;
        const std::uint64_t product1 = std::uint64_t{kPhiloxMultiplier1} * c2;
        c0 = static_cast<std::uint32_t>(product1 >> 32) ^ c1 ^ key0;
        c1 = static_cast<std::uint32_t>(product1);
        c2 = static_cast<std::uint32_t>(product0 >> 32) ^ c3 ^ key1;
        c3 = static_cast<std::uint32_t>(product0);
        key0 += kPhiloxWeyl0;
        key1 += kPhiloxWeyl1;
      }
      words[lane] = c0;
      words[kWordLanes + lane] = c1;
      words[2 * kWordLanes + lane] = c2;
      words[3 * kWordLanes + lane] = c3;
    }
  }
}

}  // namespace

const ValueBinsKernels value_bins_generic = {match, random_words, look_up, draw};

}  // namespace scfm
