#include "counts/codec_libraries.hpp"

#include <array>
#include <atomic>
#include <climits>
#include <cstddef>

#include "base/errors.hpp"

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace scfm {
namespace {

struct Libdeflate {
  void* (*alloc_decompressor)();
  void (*free_decompressor)(void*);
  int (*zlib_decompress)(void*, const void*, std::size_t, void*, std::size_t, std::size_t*);
  int (*gzip_decompress)(void*, const void*, std::size_t, void*, std::size_t, std::size_t*);
};
struct Zlib {
  int (*uncompress)(std::uint8_t* to, unsigned long* to_size, const std::uint8_t* from, unsigned long size);
};
struct Zstd {
  void* (*create_context)();
  std::size_t (*free_context)(void*);
  std::size_t (*decompress)(void*, void*, std::size_t, const void*, std::size_t);
  unsigned (*is_error)(std::size_t);
};
struct Lz4 {
  int (*decompress_safe)(const char* from, char* to, int size, int capacity);
};
struct Blosc {
  int (*validate)(const void* buffer, std::size_t size, std::size_t* decoded);
  int (*decompress)(const void* from, void* to, std::size_t capacity, int num_threads);
};

// Published once complete and never taken back: readers need no lock.
std::atomic<const Libdeflate*> libdeflate{nullptr};
std::atomic<const Zlib*> zlib{nullptr};
std::atomic<const Zstd*> zstd{nullptr};
std::atomic<const Lz4*> lz4{nullptr};
std::atomic<const Blosc*> blosc{nullptr};

constexpr Inflated kSound{true, {}};
constexpr Inflated kDamaged{false, "the compressed bytes are damaged"};
constexpr Inflated kWrongLength{false, "it does not inflate to the length of a chunk"};

Inflated missing(std::string_view reason) { return {false, reason}; }

/// Functions of a shared library by name; `complete` says whether all were there.
class Loader {
 public:
  explicit Loader(const std::string& path) {
#if defined(__unix__) || defined(__APPLE__)
    handle_ = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
#else
    static_cast<void>(path);
#endif
    complete_ = handle_ != nullptr;
  }

  template <class Function>
  void find(Function& function, const char* name) {
#if defined(__unix__) || defined(__APPLE__)
    if (!complete_) return;
    function = reinterpret_cast<Function>(dlsym(handle_, name));
    complete_ = function != nullptr;
#else
    static_cast<void>(function);
    static_cast<void>(name);
#endif
  }

  /// Puts the functions in use if all were found. Earlier ones stay valid for calls under way.
  template <class Functions>
  bool publish(std::atomic<const Functions*>& slot, const Functions& functions) const {
    if (complete_) slot.store(new Functions(functions));
    return complete_;
  }

 private:
  void* handle_ = nullptr;
  bool complete_ = false;
};

/// A decompressor a thread: they hold tables that must not be shared. Freed with the thread.
class Decompressor {
 public:
  ~Decompressor() {
    if (memory_ != nullptr) owner_->free_decompressor(memory_);
  }
  void* of(const Libdeflate& library) {
    if (owner_ != &library) {
      if (memory_ != nullptr) owner_->free_decompressor(memory_);
      memory_ = library.alloc_decompressor();
      owner_ = &library;
    }
    if (memory_ == nullptr) throw std::bad_alloc();
    return memory_;
  }

 private:
  void* memory_ = nullptr;
  const Libdeflate* owner_ = nullptr;
};

class ZstdContext {
 public:
  ~ZstdContext() {
    if (memory_ != nullptr) owner_->free_context(memory_);
  }
  void* of(const Zstd& library) {
    if (owner_ != &library) {
      if (memory_ != nullptr) owner_->free_context(memory_);
      memory_ = library.create_context();
      owner_ = &library;
    }
    if (memory_ == nullptr) throw std::bad_alloc();
    return memory_;
  }

 private:
  void* memory_ = nullptr;
  const Zstd* owner_ = nullptr;
};

/// What one thread uses at a time and gives back. Not thread_local: the C library ends the process where it
/// finds no memory to note a thread's destructor. Not locked: a fork may come at any moment.
template <typename T>
class Spares {
 public:
  class Loan {
   public:
    explicit Loan(Spares& spares) : spares_(spares), item_(spares.take()) {}
    ~Loan() { spares_.give_back(item_); }
    Loan(const Loan&) = delete;
    Loan& operator=(const Loan&) = delete;
    T& operator*() const { return *item_; }

   private:
    Spares& spares_;
    T* item_;
  };

 private:
  T* take() {
    for (std::atomic<T*>& slot : slots_) {
      if (T* found = slot.exchange(nullptr)) return found;
    }
    return new T;
  }
  void give_back(T* item) {
    for (std::atomic<T*>& slot : slots_) {
      T* empty = nullptr;
      if (slot.compare_exchange_strong(empty, item)) return;
    }
    delete item;
  }

  std::array<std::atomic<T*>, 64> slots_{};
};

Spares<Decompressor> decompressors;
Spares<ZstdContext> zstd_contexts;

Inflated with_libdeflate(const Libdeflate& library, bool gzip, Bytes from, MutableBytes to) {
  const Spares<Decompressor>::Loan decompressor(decompressors);
  const auto decompress = gzip ? library.gzip_decompress : library.zlib_decompress;
  // Without a place for the actual length, libdeflate accepts only an exact fit.
  const int result =
      decompress((*decompressor).of(library), from.data(), from.size(), to.data(), to.size(), nullptr);
  if (result == 0) return kSound;
  return result == 1 ? kDamaged : kWrongLength;
}

}  // namespace

bool load_codec_library(std::string_view library, const std::string& path) {
  Loader loader(path);
  if (library == "libdeflate") {
    Libdeflate found{};
    loader.find(found.alloc_decompressor, "libdeflate_alloc_decompressor");
    loader.find(found.free_decompressor, "libdeflate_free_decompressor");
    loader.find(found.zlib_decompress, "libdeflate_zlib_decompress");
    loader.find(found.gzip_decompress, "libdeflate_gzip_decompress");
    return loader.publish(libdeflate, found);
  }
  if (library == "zlib") {
    Zlib found{};
    loader.find(found.uncompress, "uncompress");
    return loader.publish(zlib, found);
  }
  if (library == "zstd") {
    Zstd found{};
    loader.find(found.create_context, "ZSTD_createDCtx");
    loader.find(found.free_context, "ZSTD_freeDCtx");
    loader.find(found.decompress, "ZSTD_decompressDCtx");
    loader.find(found.is_error, "ZSTD_isError");
    return loader.publish(zstd, found);
  }
  if (library == "lz4") {
    Lz4 found{};
    loader.find(found.decompress_safe, "LZ4_decompress_safe");
    return loader.publish(lz4, found);
  }
  if (library == "blosc") {
    Blosc found{};
    loader.find(found.validate, "blosc_cbuffer_validate");
    loader.find(found.decompress, "blosc_decompress_ctx");
    return loader.publish(blosc, found);
  }
  throw InvalidArgument("load_codec_library: library = \"" + std::string(library) +
                        "\", expected libdeflate, zlib, zstd, lz4 or blosc");
}

bool has_codec_library(std::string_view library) {
  return (library == "libdeflate" && libdeflate.load() != nullptr) ||
         (library == "zlib" && zlib.load() != nullptr) || (library == "zstd" && zstd.load() != nullptr) ||
         (library == "lz4" && lz4.load() != nullptr) || (library == "blosc" && blosc.load() != nullptr);
}

Inflated inflate_zlib(Bytes from, MutableBytes to) {
  if (const Libdeflate* library = libdeflate.load()) return with_libdeflate(*library, false, from, to);
  const Zlib* library = zlib.load();
  if (library == nullptr) return missing("neither libdeflate nor zlib is loaded");
  unsigned long size = to.size();
  const int result = library->uncompress(to.data(), &size, from.data(), from.size());
  if (result == 0) return size == to.size() ? kSound : kWrongLength;
  constexpr int kBufferError = -5;
  return result == kBufferError ? kWrongLength : kDamaged;
}

Inflated inflate_gzip(Bytes from, MutableBytes to) {
  const Libdeflate* library = libdeflate.load();
  return library != nullptr ? with_libdeflate(*library, true, from, to) : missing("libdeflate is not loaded");
}

Inflated inflate_zstd(Bytes from, MutableBytes to) {
  const Zstd* library = zstd.load();
  if (library == nullptr) return missing("zstd is not loaded");
  const Spares<ZstdContext>::Loan context(zstd_contexts);
  const std::size_t size =
      library->decompress((*context).of(*library), to.data(), to.size(), from.data(), from.size());
  if (library->is_error(size) != 0) return kDamaged;
  return size == to.size() ? kSound : kWrongLength;
}

Inflated inflate_lz4(Bytes from, MutableBytes to) {
  const Lz4* library = lz4.load();
  if (library == nullptr) return missing("lz4 is not loaded");
  if (from.size() > INT_MAX || to.size() > INT_MAX) return kDamaged;
  const int size =
      library->decompress_safe(reinterpret_cast<const char*>(from.data()), reinterpret_cast<char*>(to.data()),
                               static_cast<int>(from.size()), static_cast<int>(to.size()));
  if (size < 0) return kDamaged;
  return static_cast<std::size_t>(size) == to.size() ? kSound : kWrongLength;
}

Inflated inflate_blosc(Bytes from, MutableBytes to) {
  const Blosc* library = blosc.load();
  if (library == nullptr) return missing("blosc is not loaded");
  std::size_t size = 0;
  if (library->validate(from.data(), from.size(), &size) < 0) return kDamaged;
  if (size != to.size()) return kWrongLength;
  const int written = library->decompress(from.data(), to.data(), to.size(), 1);
  if (written < 0) return kDamaged;
  return static_cast<std::size_t>(written) == to.size() ? kSound : kWrongLength;
}

}  // namespace scfm
