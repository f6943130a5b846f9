#include "counts/chunk_filters.hpp"

#include <array>
#include <cstring>

#include "base/errors.hpp"

namespace scfm {
namespace {

constexpr std::size_t kChecksumBytes = 4;

bool is_checksum(Filter filter) { return filter == Filter::fletcher32 || filter == Filter::crc32c; }

std::uint32_t little_endian(const std::uint8_t* bytes) {
  return static_cast<std::uint32_t>(bytes[0]) | static_cast<std::uint32_t>(bytes[1]) << 8 |
         static_cast<std::uint32_t>(bytes[2]) << 16 | static_cast<std::uint32_t>(bytes[3]) << 24;
}

/// HDF5's Fletcher sum: 16-bit words, high byte first; an odd last byte counts as a high one.
std::uint32_t fletcher32(Bytes data) {
  std::uint32_t low = 0;
  std::uint32_t high = 0;
  std::size_t words = data.size() / 2;
  const std::uint8_t* at = data.data();
  while (words > 0) {
    const std::size_t run = words < 360 ? words : 360;  // so that neither sum overflows
    for (std::size_t i = 0; i < run; ++i, at += 2) {
      low += static_cast<std::uint32_t>(at[0]) << 8 | at[1];
      high += low;
    }
    words -= run;
    low = (low & 0xFFFF) + (low >> 16);
    high = (high & 0xFFFF) + (high >> 16);
  }
  if (data.size() % 2 != 0) {
    low += static_cast<std::uint32_t>(*at) << 8;
    high += low;
    low = (low & 0xFFFF) + (low >> 16);
    high = (high & 0xFFFF) + (high >> 16);
  }
  low = (low & 0xFFFF) + (low >> 16);
  high = (high & 0xFFFF) + (high >> 16);
  return high << 16 | low;
}

std::array<std::uint32_t, 256> crc32c_table() {
  std::array<std::uint32_t, 256> table{};
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    std::uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ ((crc & 1) != 0 ? 0x82F63B78u : 0u);
    table[byte] = crc;
  }
  return table;
}

std::uint32_t crc32c(Bytes data) {
  static const std::array<std::uint32_t, 256> table = crc32c_table();
  std::uint32_t crc = 0xFFFFFFFFu;
  for (const std::uint8_t byte : data) crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF];
  return ~crc;
}

/// Byte planes back to elements; what does not fill an element was left at the end as it was.
template <std::size_t kSize>
void unshuffle(Bytes from, std::uint8_t* to) {
  const std::size_t count = from.size() / kSize;
  for (std::size_t i = 0; i < count; ++i) {
    for (std::size_t byte = 0; byte < kSize; ++byte) to[i * kSize + byte] = from[byte * count + i];
  }
  std::memcpy(to + count * kSize, from.data() + count * kSize, from.size() - count * kSize);
}

void unshuffle_any(Bytes from, std::uint8_t* to, std::size_t element_size) {
  const std::size_t count = from.size() / element_size;
  for (std::size_t byte = 0; byte < element_size; ++byte) {
    const std::uint8_t* plane = from.data() + byte * count;
    for (std::size_t i = 0; i < count; ++i) to[i * element_size + byte] = plane[i];
  }
  std::memcpy(to + count * element_size, from.data() + count * element_size,
              from.size() - count * element_size);
}

void undo_shuffle(Bytes from, std::uint8_t* to, std::int64_t element_size) {
  if (element_size == 4) {
    unshuffle<4>(from, to);
  } else if (element_size == 8) {
    unshuffle<8>(from, to);
  } else if (element_size == 2) {
    unshuffle<2>(from, to);
  } else {
    unshuffle_any(from, to, static_cast<std::size_t>(element_size));
  }
}

/// LibLZF's format: runs of literals, and references of 3 bytes or more up to 8 KiB back.
bool undo_lzf(Bytes from, MutableBytes to) {
  std::size_t in = 0;
  std::size_t out = 0;
  while (in < from.size()) {
    const std::size_t control = from[in++];
    if (control < 32) {
      const std::size_t length = control + 1;
      if (length > from.size() - in || length > to.size() - out) return false;
      std::memcpy(to.data() + out, from.data() + in, length);
      in += length;
      out += length;
      continue;
    }
    std::size_t length = control >> 5;
    if (length == 7) {
      if (in >= from.size()) return false;
      length += from[in++];
    }
    length += 2;
    if (in >= from.size()) return false;
    const std::size_t distance = ((control & 31) << 8 | from[in++]) + 1;
    if (distance > out || length > to.size() - out) return false;
    const std::uint8_t* source = to.data() + out - distance;
    if (distance >= length) {
      std::memcpy(to.data() + out, source, length);
    } else {
      for (std::size_t i = 0; i < length; ++i) to[out + i] = source[i];  // overlapping: a repeated pattern
    }
    out += length;
  }
  return out == to.size();
}

/// numcodecs' lz4: the decoded length in four bytes, then one block.
Inflated undo_lz4(Bytes from, MutableBytes to) {
  if (from.size() < 4 || little_endian(from.data()) != to.size()) {
    return {false, "its lz4 header does not give the length of a chunk"};
  }
  return inflate_lz4(from.subspan(4), to);
}

Inflated decompress(Filter filter, Bytes from, MutableBytes to) {
  switch (filter) {
    case Filter::zlib:
      return inflate_zlib(from, to);
    case Filter::gzip:
      return inflate_gzip(from, to);
    case Filter::zstd:
      return inflate_zstd(from, to);
    case Filter::lz4:
      return undo_lz4(from, to);
    case Filter::blosc:
      return inflate_blosc(from, to);
    default:
      return {undo_lzf(from, to), "the compressed bytes are damaged"};
  }
}

bool checksum_holds(Filter filter, Bytes data, const std::uint8_t* stored) {
  const std::uint32_t expected = little_endian(stored);
  return filter == Filter::fletcher32 ? fletcher32(data) == expected : crc32c(data) == expected;
}

}  // namespace

Filter filter_of(std::string_view name) {
  constexpr std::array<std::pair<std::string_view, Filter>, 9> kNames = {{{"shuffle", Filter::shuffle},
                                                                          {"zlib", Filter::zlib},
                                                                          {"gzip", Filter::gzip},
                                                                          {"lzf", Filter::lzf},
                                                                          {"zstd", Filter::zstd},
                                                                          {"lz4", Filter::lz4},
                                                                          {"blosc", Filter::blosc},
                                                                          {"fletcher32", Filter::fletcher32},
                                                                          {"crc32c", Filter::crc32c}}};
  for (const auto& [known, filter] : kNames) {
    if (known == name) return filter;
  }
  throw InvalidArgument("StoredArray: unknown filter \"" + std::string(name) + "\"");
}

Bytes undo_filters(const std::vector<FilterStep>& steps, std::uint32_t skipped, Bytes stored,
                   std::size_t size, ChunkScratch& scratch, std::string& reason) {
  const auto applied = [skipped](std::size_t step) { return step >= 32 || (skipped >> step & 1) == 0; };
  // What a step took in when the chunk was written: the values, and the checksums added before it.
  std::size_t checksums_before = 0;
  for (std::size_t step = 0; step < steps.size(); ++step) {
    if (applied(step) && is_checksum(steps[step].filter)) ++checksums_before;
  }
  Bytes now = stored;
  bool into_first = true;
  const auto next_buffer = [&](std::size_t bytes) {
    AlignedBuffer<std::uint8_t>& buffer = into_first ? scratch.first : scratch.second;
    into_first = !into_first;
    return MutableBytes(buffer.reserve(static_cast<std::int64_t>(bytes)), bytes);
  };
  for (std::size_t step = steps.size(); step-- > 0;) {
    if (!applied(step)) continue;
    const Filter filter = steps[step].filter;
    if (is_checksum(filter)) {
      --checksums_before;
      if (now.size() < kChecksumBytes) {
        reason = "it is too short to hold its checksum";
        return {};
      }
      const Bytes data = now.first(now.size() - kChecksumBytes);
      if (!checksum_holds(filter, data, now.data() + data.size())) {
        reason = "its checksum does not fit";
        return {};
      }
      now = data;
    } else if (filter == Filter::shuffle) {
      const MutableBytes to = next_buffer(now.size());
      undo_shuffle(now, to.data(), steps[step].element_size);
      now = to;
    } else {
      const MutableBytes to = next_buffer(size + checksums_before * kChecksumBytes);
      const Inflated result = decompress(filter, now, to);
      if (!result.ok) {
        reason = result.reason;
        return {};
      }
      now = to;
    }
  }
  if (now.size() != size) {
    reason = "it holds " + std::to_string(now.size()) + " bytes, expected " + std::to_string(size);
    return {};
  }
  return now;
}

}  // namespace scfm
