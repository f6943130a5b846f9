/// What gene medians are made of: every value that cells express, as a key that sorts by gene and then by
/// value.
///
/// key = gene << 32 | bits of float32(count / library_size * 10,000): the bits of positive floats are ordered
/// as the floats are. Of sorted keys each different one is kept once with its number, and new ones are merged
/// in.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/csr_view.hpp"

namespace scfm {

/// Keys of the non-zero entries of a block whose gene is wanted, of the cells that count, in the block's
/// order. column_gene: the gene each column counts for, or -1; library_size: of each cell; counted: of each
/// cell whether it counts, empty for all. Throws InvalidArgument where lengths do not fit, for a column out
/// of range and for a cell with counts whose library size is not above zero.
std::vector<std::uint64_t> gene_values(const CsrView& csr, std::span<const std::int32_t> column_gene,
                                       std::span<const double> library_size,
                                       std::span<const std::uint8_t> counted);

/// Different keys, ascending, and how often each stands.
struct CountedKeys {
  std::vector<std::uint64_t> keys;
  std::vector<std::int64_t> numbers;
};

/// keys, numbers: as of CountedKeys; more: ascending, repeats allowed; both with their last num_bits bits set
/// to zero. Throws InvalidArgument where something does not fit or ascend.
CountedKeys merge_keys(std::span<const std::uint64_t> keys, std::span<const std::int64_t> numbers,
                       std::span<const std::uint64_t> more, int num_bits);

}  // namespace scfm
