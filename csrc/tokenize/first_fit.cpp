#include "tokenize/first_fit.hpp"

#include <algorithm>
#include <bit>
#include <string>
#include <vector>

#include "base/errors.hpp"

namespace scfm {
namespace {

void check(std::span<const std::int64_t> lengths, std::int64_t capacity) {
  if (capacity < 1)
    throw InvalidArgument("first_fit: capacity = " + std::to_string(capacity) + ", expected at least 1");
  for (std::size_t item = 0; item < lengths.size(); ++item) {
    if (lengths[item] < 1 || lengths[item] > capacity) {
      throw InvalidArgument("first_fit: lengths[" + std::to_string(item) +
                            "] = " + std::to_string(lengths[item]) + ", expected 1 to " +
                            std::to_string(capacity) + ", the capacity");
    }
  }
}

/// How many bins may be opened. Any two of them hold more than one capacity together (else the later one
/// would not have been opened), so no more than twice what all items fill, and one.
std::size_t most_bins(std::span<const std::int64_t> lengths, std::int64_t capacity) {
  double filled = 0.0;
  for (const std::int64_t length : lengths) filled += static_cast<double>(length);
  const double most = 2.0 * filled / static_cast<double>(capacity) + 2.0;
  return std::clamp<std::size_t>(static_cast<std::size_t>(most), 1, std::max<std::size_t>(lengths.size(), 1));
}

}  // namespace

std::int64_t first_fit(std::span<const std::int64_t> lengths, std::int64_t capacity,
                       std::span<std::int64_t> bins) {
  if (bins.size() != lengths.size()) throw InvalidArgument("first_fit: bins and lengths differ in size");
  check(lengths, capacity);
  // Leaves are the bins' rooms; a node above holds the larger of its two.
  const std::size_t num_leaves = std::bit_ceil(most_bins(lengths, capacity));
  std::vector<std::int64_t> room(2 * num_leaves, capacity);
  std::int64_t num_bins = 0;
  for (std::size_t item = 0; item < lengths.size(); ++item) {
    const std::int64_t length = lengths[item];
    std::size_t node = 1;
    while (node < num_leaves) node = 2 * node + (room[2 * node] >= length ? 0 : 1);
    bins[item] = static_cast<std::int64_t>(node - num_leaves);
    num_bins = std::max(num_bins, bins[item] + 1);
    room[node] -= length;
    while (node > 1) {
      node /= 2;
      room[node] = std::max(room[2 * node], room[2 * node + 1]);
    }
  }
  return num_bins;
}

}  // namespace scfm
