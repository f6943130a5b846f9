/// First fit: items into bins of one capacity, one after another, each into the first bin that has room for
/// it.
///
/// With the longest items first (the caller sorts) it needs at most 11/9 of the fewest possible bins. A tree
/// of the largest room under each node finds the bin in log(items) steps, so an epoch of millions of cells is
/// planned in seconds.
#pragma once

#include <cstdint>
#include <span>

namespace scfm {

/// lengths: of the items, 1 to capacity, in the order in which they are placed; bins: the bin of each,
/// written; bins are numbered as they are opened. Returns how many were opened. Throws InvalidArgument for a
/// length that no bin can hold.
std::int64_t first_fit(std::span<const std::int64_t> lengths, std::int64_t capacity,
                       std::span<std::int64_t> bins);

}  // namespace scfm
