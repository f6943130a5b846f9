#include "counts/stored_array.hpp"

#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <limits>

namespace scfm {
namespace {

constexpr std::size_t kMostOpenFiles = 4;
constexpr std::size_t kMostTogether = 256;

int open_for_reading(const std::string& path) {
  int descriptor = -1;
  do {
    // O_NONBLOCK: should the path have become a pipe, opening it must not wait for a writer.
    descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  } while (descriptor < 0 && errno == EINTR);
  return descriptor;
}

class Closer {
 public:
  explicit Closer(int descriptor) : descriptor_(descriptor) {}
  ~Closer() {
    if (descriptor_ >= 0) ::close(descriptor_);
  }
  Closer(const Closer&) = delete;
  Closer& operator=(const Closer&) = delete;

 private:
  int descriptor_;
};

}  // namespace

std::int64_t item_size(DataType type) noexcept {
  constexpr std::int64_t kSizes[kNumDataTypes] = {4, 8, 1, 2, 4, 8, 1, 2, 4, 8};
  return kSizes[static_cast<int>(type)];
}

StoredArray::StoredArray(ChunkTable table) : table_(std::move(table)) {
  const auto fail = [this](const std::string& what) {
    throw InvalidArgument("StoredArray: " + table_.name + ": " + what);
  };
  const auto chunks = static_cast<std::int64_t>(table_.offsets.size());
  constexpr std::int64_t kLimit = std::numeric_limits<std::int64_t>::max() / 16;
  if (table_.num_values < 0 || table_.num_values > kLimit) fail("num_values is out of range");
  if (table_.chunk_values < 1 || table_.chunk_values > kLimit) fail("chunk_values is out of range");
  const std::int64_t needed =
      table_.num_values / table_.chunk_values + (table_.num_values % table_.chunk_values != 0 ? 1 : 0);
  if (chunks != needed) {
    fail(std::to_string(chunks) + " chunks, expected " + std::to_string(needed));
  }
  if (table_.sizes.size() != table_.offsets.size()) fail("sizes and offsets differ in length");
  if (!table_.filter_masks.empty() && table_.filter_masks.size() != table_.offsets.size()) {
    fail("filter_masks and offsets differ in length");
  }
  if (!table_.file_of_chunk.empty() && table_.file_of_chunk.size() != table_.offsets.size()) {
    fail("file_of_chunk and offsets differ in length");
  }
  if (table_.paths.empty()) fail("no paths");
  for (const std::int32_t file : table_.file_of_chunk) {
    if (file < 0 || static_cast<std::size_t>(file) >= table_.paths.size())
      fail("file_of_chunk is out of range");
  }
  for (const std::int64_t size : table_.sizes) {
    if (size < 0 || size > kLimit) fail("a size is out of range");
  }
  for (const FilterStep& step : table_.filters) {
    if (step.filter == Filter::shuffle && (step.element_size < 1 || step.element_size > 1 << 20)) {
      fail("shuffle has an impossible element size");
    }
  }
  descriptors_.assign(table_.paths.size() <= kMostOpenFiles ? table_.paths.size() : 0, -1);
}

StoredArray::~StoredArray() {
  for (const int descriptor : descriptors_) {
    if (descriptor >= 0) ::close(descriptor);
  }
}

std::size_t StoredArray::file_of(std::int64_t chunk) const {
  return table_.file_of_chunk.empty()
             ? 0
             : static_cast<std::size_t>(table_.file_of_chunk[static_cast<std::size_t>(chunk)]);
}

void StoredArray::fail(std::int64_t chunk, const std::string& reason) const {
  const auto c = static_cast<std::size_t>(chunk);
  throw ChunkError(reason, table_.name, chunk, table_.paths[file_of(chunk)], table_.offsets[c],
                   table_.sizes[c]);
}

/// An open file for the chunk. `own` is set where the caller has to close it.
int StoredArray::descriptor_of(std::int64_t chunk, int& own) const {
  const std::size_t file = file_of(chunk);
  int descriptor = -1;
  if (descriptors_.empty()) {
    own = descriptor = open_for_reading(table_.paths[file]);
  } else {
    const std::lock_guard lock(open_mutex_);
    if (descriptors_[file] < 0) descriptors_[file] = open_for_reading(table_.paths[file]);
    descriptor = descriptors_[file];
  }
  if (descriptor < 0) fail(chunk, std::string("the file cannot be opened: ") + std::strerror(errno));
  return descriptor;
}

void StoredArray::read_bytes(std::int64_t chunk, std::int64_t offset, std::int64_t size, void* to) const {
  int own = -1;
  const int descriptor = descriptor_of(chunk, own);
  const Closer closer(own);
  auto* at = static_cast<std::uint8_t*>(to);
  while (size > 0) {
    const auto wanted = static_cast<std::size_t>(std::min<std::int64_t>(size, std::int64_t{1} << 30));
    const ssize_t got = ::pread(descriptor, at, wanted, static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail(chunk, std::string("reading failed: ") + std::strerror(errno));
    if (got == 0) fail(chunk, "the file ends before it");
    at += got;
    offset += got;
    size -= got;
  }
}

const std::uint8_t* StoredArray::decode(std::int64_t chunk, ChunkScratch& scratch) const {
  const auto c = static_cast<std::size_t>(chunk);
  if (table_.offsets[c] < 0) fail(chunk, "it was never written");
  const auto stored_size = static_cast<std::size_t>(table_.sizes[c]);
  std::uint8_t* stored = scratch.stored.reserve(table_.sizes[c]);
  read_bytes(chunk, table_.offsets[c], table_.sizes[c], stored);
  const auto size = static_cast<std::size_t>(table_.chunk_values * item_size(table_.type));
  std::string reason;
  const Bytes decoded = undo_filters(table_.filters, table_.filter_masks.empty() ? 0 : table_.filter_masks[c],
                                     Bytes(stored, stored_size), size, scratch, reason);
  if (decoded.empty()) fail(chunk, reason);
  return decoded.data();
}

/// Reads as many of the first stretches as lie end to end in one file; returns how many.
std::size_t StoredArray::read_together(std::span<const Stretch> stretches) const {
  std::array<iovec, kMostTogether> targets;
  std::size_t count = 0;
  std::int64_t size = 0;
  const std::int64_t chunk = stretches[0].chunk;
  const auto place = [this](const Stretch& stretch) {
    return table_.offsets[static_cast<std::size_t>(stretch.chunk)] + stretch.start;
  };
  while (count < stretches.size() && count < kMostTogether) {
    const Stretch& next = stretches[count];
    if (file_of(next.chunk) != file_of(chunk) || place(next) != place(stretches[0]) + size) break;
    targets[count++] = {next.to, static_cast<std::size_t>(next.size)};
    size += next.size;
  }
  if (count > 1) {
    int own = -1;
    const int descriptor = descriptor_of(chunk, own);
    const Closer closer(own);
    const ssize_t got = ::preadv(descriptor, targets.data(), static_cast<int>(count),
                                 static_cast<off_t>(place(stretches[0])));
    if (got == size) return count;
  }
  // One alone; or fewer bytes than hoped for, and then one by one it shows which chunk lacks them.
  for (const Stretch& stretch : stretches.first(count)) {
    read_bytes(stretch.chunk, place(stretch), stretch.size, stretch.to);
  }
  return count;
}

void StoredArray::read_plain(std::span<const Stretch> stretches) const {
  for (const Stretch& stretch : stretches) {
    const auto c = static_cast<std::size_t>(stretch.chunk);
    if (table_.offsets[c] < 0) fail(stretch.chunk, "it was never written");
    if (stretch.start < 0 || stretch.size > table_.sizes[c] - stretch.start) {
      fail(stretch.chunk, "it is shorter than its values");
    }
  }
  while (!stretches.empty()) stretches = stretches.subspan(read_together(stretches));
}

}  // namespace scfm
