/// value_bins' loops for AVX2: random numbers four counters abreast; the others as the compiler vectorises
/// them.
#include <immintrin.h>

#include "tokenize/value_bins_loops.hpp"

namespace scfm {
namespace {

MatchSummary match(const MatchArguments& row) noexcept {
  MatchState state;
  row.values_are_f64 ? match_scalar<double>(row, 0, state) : match_scalar<float>(row, 0, state);
  return state.summary();
}

/// Sixteen 64-bit lanes of which the lower halves count: their lower halves, stored.
void store_lower(const __m256i (&lanes)[4], std::uint32_t* words) noexcept {
  for (int pair = 0; pair < 2; ++pair) {
    const __m256 first = _mm256_castsi256_ps(lanes[2 * pair]);
    const __m256 second = _mm256_castsi256_ps(lanes[2 * pair + 1]);
    const __m256 mixed = _mm256_shuffle_ps(first, second, _MM_SHUFFLE(2, 0, 2, 0));
    const __m256i ordered = _mm256_permute4x64_epi64(_mm256_castps_si256(mixed), _MM_SHUFFLE(3, 1, 2, 0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + 8 * pair), ordered);
  }
}

/// A product of the lower halves fills a 64-bit lane: its upper half is what the next round mixes in, and
/// what is left above a lower half is never looked at.
void random_words(const WordArguments& arguments) noexcept {
  const __m256i multiplier0 = _mm256_set1_epi64x(kPhiloxMultiplier0);
  const __m256i multiplier1 = _mm256_set1_epi64x(kPhiloxMultiplier1);
  for (std::int64_t block = 0; block < arguments.num_blocks; ++block) {
    __m256i c0[4];
    __m256i c1[4];
    __m256i c2[4];
    __m256i c3[4];
    for (int part = 0; part < 4; ++part) {
      const auto first = static_cast<std::int64_t>(block * kWordLanes + 4 * part);
      c0[part] = _mm256_add_epi64(_mm256_set1_epi64x(first), _mm256_setr_epi64x(0, 1, 2, 3));
      c1[part] = _mm256_set1_epi64x(arguments.counter[0]);
      c2[part] = _mm256_set1_epi64x(arguments.counter[1]);
      c3[part] = _mm256_set1_epi64x(arguments.counter[2]);
    }
    std::uint32_t key0 = arguments.key[0];
    std::uint32_t key1 = arguments.key[1];
    for (int round = 0; round < 10; ++round) {
      const __m256i k0 = _mm256_set1_epi64x(key0);
      const __m256i k1 = _mm256_set1_epi64x(key1);
      for (int part = 0; part < 4; ++part) {
        const __m256i product0 = _mm256_mul_epu32(c0[part], multiplier0);
        const __m256i product1 = _mm256_mul_epu32(c2[part], multiplier1);
        c0[part] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product1, 32), c1[part]), k0);
        c1[part] = product1;
        c2[part] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product0, 32), c3[part]), k1);
        c3[part] = product0;
      }
      key0 += kPhiloxWeyl0;
      key1 += kPhiloxWeyl1;
    }
    std::uint32_t* words = arguments.words + block * kWordBlock;
    store_lower(c0, words);
    store_lower(c1, words + kWordLanes);
    store_lower(c2, words + 2 * kWordLanes);
    store_lower(c3, words + 3 * kWordLanes);
  }
}

}  // namespace

const ValueBinsKernels value_bins_avx2 = {match, random_words, look_up, draw};

}  // namespace scfm
