/// From the bytes of a stored chunk to its values: undoes the filters of HDF5 and the codecs of zarr.
///
/// The decoded length is known beforehand and is the only length accepted, so a chunk can neither claim more
/// memory than its array's type says nor leave a part of it unwritten.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/aligned_buffer.hpp"
#include "counts/codec_libraries.hpp"

namespace scfm {

enum class Filter { shuffle, zlib, gzip, lzf, zstd, lz4, blosc, fletcher32, crc32c };

/// Throws InvalidArgument for an unknown name.
Filter filter_of(std::string_view name);

struct FilterStep {
  Filter filter;
  std::int64_t element_size = 0;  // of shuffle
};

/// Scratch space of one thread.
struct ChunkScratch {
  AlignedBuffer<std::uint8_t> stored;
  AlignedBuffer<std::uint8_t> first;
  AlignedBuffer<std::uint8_t> second;
};

/// Undoes `steps` (given in the order in which they were applied; bit i of skipped leaves step i out) and
/// returns exactly `size` bytes, in the scratch space or in `stored` itself. On failure `reason` says why and
/// the result is empty.
Bytes undo_filters(const std::vector<FilterStep>& steps, std::uint32_t skipped, Bytes stored,
                   std::size_t size, ChunkScratch& scratch, std::string& reason);

}  // namespace scfm
