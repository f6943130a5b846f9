/// Decompressors, taken from shared libraries while the program runs: libdeflate, zlib, zstd, lz4, blosc.
///
/// Their C interfaces have been stable for years, so no headers and no building are needed: whoever loads the
/// library (the Python side knows which installed packages carry one) names its path once, and decoding then
/// runs in our threads without any lock. A codec without a library is reported as missing, never guessed at.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace scfm {

using Bytes = std::span<const std::uint8_t>;
using MutableBytes = std::span<std::uint8_t>;

/// Loads the functions of `library` ("libdeflate", "zlib", "zstd", "lz4" or "blosc") from the shared library
/// at `path`. False if the file cannot be loaded or lacks one of them; true if they are in use from now on.
/// Throws InvalidArgument for an unknown name. The library stays loaded.
bool load_codec_library(std::string_view library, const std::string& path);

/// Whether functions of `library` are in use.
bool has_codec_library(std::string_view library);

/// Each fills `to` exactly; false (with a reason) if the input is damaged or has another length.
struct Inflated {
  bool ok;
  std::string_view reason;
};
Inflated inflate_zlib(Bytes from, MutableBytes to);  // RFC 1950, libdeflate if loaded, else zlib
Inflated inflate_gzip(Bytes from, MutableBytes to);  // RFC 1952, libdeflate only
Inflated inflate_zstd(Bytes from, MutableBytes to);
Inflated inflate_lz4(Bytes from, MutableBytes to);  // one raw block
Inflated inflate_blosc(Bytes from, MutableBytes to);

}  // namespace scfm
