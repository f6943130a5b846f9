/// Scratch memory for kernels: aligned to a cache line, never initialised, with one vector of slack past the
/// end so that a kernel may store a whole register where only part of it counts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>

namespace scfm {

template <class Value>
class AlignedBuffer {
 public:
  /// Room for `count` values. Growing forgets what was there. Throws std::bad_alloc.
  Value* reserve(std::int64_t count) {
    const auto wanted = static_cast<std::size_t>(count);
    if (wanted > capacity_ || memory_ == nullptr) {
      constexpr std::size_t kLimit = (std::numeric_limits<std::size_t>::max() >> 2) / sizeof(Value);
      if (wanted > kLimit) throw std::bad_alloc();
      const std::size_t roomy = wanted + wanted / 2;
      memory_.reset();
      capacity_ = 0;
      memory_.reset(
          static_cast<Value*>(::operator new(roomy * sizeof(Value) + kLine, std::align_val_t{kLine})));
      capacity_ = roomy;
    }
    return memory_.get();
  }

  Value* data() noexcept { return memory_.get(); }
  const Value* data() const noexcept { return memory_.get(); }

 private:
  static constexpr std::size_t kLine = 64;
  struct Free {
    void operator()(Value* pointer) const noexcept { ::operator delete(pointer, std::align_val_t{kLine}); }
  };
  std::unique_ptr<Value, Free> memory_;
  std::size_t capacity_ = 0;
};

}  // namespace scfm
