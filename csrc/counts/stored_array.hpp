/// A one-dimensional array in files: where each chunk lies and how it is encoded (HDF5 chunked or contiguous,
/// zarr with or without shards). Bytes are read with positioned reads, so any number of threads may.
#pragma once

#include <cstdint>
#include <mutex>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "base/csr_view.hpp"
#include "counts/chunk_filters.hpp"

namespace scfm {

/// A chunk that cannot be read or decoded. chunk: its number; offset, size: its bytes in `path`.
class ChunkError : public std::runtime_error {
 public:
  ChunkError(const std::string& what, std::string array_name, std::int64_t chunk_number,
             std::string file_path, std::int64_t byte_offset, std::int64_t num_bytes)
      : std::runtime_error(what),
        array(std::move(array_name)),
        chunk(chunk_number),
        path(std::move(file_path)),
        offset(byte_offset),
        size(num_bytes) {}
  std::string array;
  std::int64_t chunk;
  std::string path;
  std::int64_t offset;
  std::int64_t size;
};

struct ChunkTable {
  std::string name;  // for messages
  DataType type = DataType::f32;
  std::int64_t num_values = 0;
  std::int64_t chunk_values = 0;
  std::vector<std::string> paths;
  std::vector<std::int32_t> file_of_chunk;  // empty: all in paths[0]
  std::vector<std::int64_t> offsets;        // -1: the chunk was never written
  std::vector<std::int64_t> sizes;
  std::vector<std::uint32_t> filter_masks;  // empty: no filter is ever left out
  std::vector<FilterStep> filters;
};

std::int64_t item_size(DataType type) noexcept;

class StoredArray {
 public:
  /// Throws InvalidArgument for a table that does not hold together. Opens nothing yet.
  explicit StoredArray(ChunkTable table);
  ~StoredArray();
  StoredArray(const StoredArray&) = delete;
  StoredArray& operator=(const StoredArray&) = delete;

  const ChunkTable& table() const noexcept { return table_; }
  std::int64_t num_chunks() const noexcept { return static_cast<std::int64_t>(table_.offsets.size()); }

  /// Values are stored as they are in memory: any part of a chunk can be read without the rest.
  bool plain() const noexcept { return table_.filters.empty(); }

  /// The whole chunk, decoded; valid until the scratch space is used again. Throws ChunkError.
  const std::uint8_t* decode(std::int64_t chunk, ChunkScratch& scratch) const;

  /// A part of a chunk of a plain array and where it goes, in bytes.
  struct Stretch {
    std::int64_t chunk;
    std::int64_t start;
    std::int64_t size;
    void* to;
  };

  /// Reads parts of a plain array straight to their places. Parts that follow one another in the file are
  /// read together, so give them in the order of the file. Throws ChunkError.
  void read_plain(std::span<const Stretch> stretches) const;

 private:
  int descriptor_of(std::int64_t chunk, int& own) const;
  void read_bytes(std::int64_t chunk, std::int64_t offset, std::int64_t size, void* to) const;
  std::size_t read_together(std::span<const Stretch> stretches) const;
  [[noreturn]] void fail(std::int64_t chunk, const std::string& reason) const;
  std::size_t file_of(std::int64_t chunk) const;

  ChunkTable table_;
  mutable std::vector<int> descriptors_;  // kept open where the files are few
  mutable std::mutex open_mutex_;
};

}  // namespace scfm
