/// Rows of one head, and fetching them ahead of their use. Rows of one head lie kilobytes apart, which no
/// processor foresees, and in short cells waiting for them would take as long as the products.
///
/// Included by the loops of every instruction set only; everything lies in an unnamed namespace.
#pragma once

#include <stdint.h>

#include "attention/varlen_forward_kernels.hpp"

namespace scfm {
namespace {

template <class Stored>
inline const Stored* row_of(const AttentionRows& rows, int64_t row) {
  return static_cast<const Stored*>(rows.data) + row * rows.stride;
}

/// Rows [first, last), at most `count`, on their way into the second-level cache. Inlined by force: gcc finds
/// a function that only prefetches to be without effect, and drops its calls.
template <class Stored>
[[gnu::always_inline]] inline void fetch_rows(const AttentionRows& rows, int64_t first, int64_t last,
                                              int64_t count, int head_dim) {
  constexpr int kLine = 64 / sizeof(Stored);
  for (int64_t r = first; r < last && r < count; ++r) {
    for (int c = 0; c < head_dim; c += kLine) __builtin_prefetch(row_of<Stored>(rows, r) + c, 0, 2);
  }
}

}  // namespace
}  // namespace scfm
