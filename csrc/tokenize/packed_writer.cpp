#include "tokenize/packed_writer.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace scfm {
namespace {

/// A fresh array is paid for page by page as it is filled; where the system allows it, by pages of 2 MB.
void ask_for_large_pages([[maybe_unused]] void* memory, [[maybe_unused]] std::size_t bytes) noexcept {
#if defined(__linux__)
  constexpr std::uintptr_t kLargePage = std::uintptr_t{1} << 21;
  const auto start = (reinterpret_cast<std::uintptr_t>(memory) + kLargePage - 1) & ~(kLargePage - 1);
  const auto stop = (reinterpret_cast<std::uintptr_t>(memory) + bytes) & ~(kLargePage - 1);
  if (stop > start) static_cast<void>(madvise(reinterpret_cast<void*>(start), stop - start, MADV_HUGEPAGE));
#endif
}

}  // namespace

template <class Value>
void MallocArray<Value>::allocate(std::int64_t count) {
  constexpr auto kLimit =
      static_cast<std::int64_t>(std::numeric_limits<std::ptrdiff_t>::max() / sizeof(Value));
  if (count > kLimit) throw std::bad_alloc();
  memory.reset(static_cast<Value*>(
      std::malloc(static_cast<std::size_t>(std::max<std::int64_t>(count, 1)) * sizeof(Value))));
  if (!memory) throw std::bad_alloc();
  size = count;
  ask_for_large_pages(memory.get(), static_cast<std::size_t>(count) * sizeof(Value));
}

template <class Value>
void MallocArray<Value>::shrink(std::int64_t count) noexcept {
  size = count;
  const std::size_t bytes = static_cast<std::size_t>(std::max<std::int64_t>(count, 1)) * sizeof(Value);
  Value* old = memory.release();
  auto* cut = static_cast<Value*>(std::realloc(old, bytes));
  memory.reset(cut != nullptr ? cut : old);
}

template struct MallocArray<std::int32_t>;
template struct MallocArray<float>;
template struct MallocArray<double>;

template <class Value>
PackedWriter<Value>::PackedWriter(std::int64_t num_tasks, std::int64_t capacity, bool with_values)
    : finished_(static_cast<std::size_t>(num_tasks)), with_values_(with_values) {
  tokens.allocate(capacity);
  if (with_values) values.allocate(capacity);
}

template <class Value>
std::unique_ptr<PackedPiece<Value>> PackedWriter<Value>::take_piece() {
  const std::lock_guard lock(mutex_);
  if (free_.empty()) return std::make_unique<Piece>();
  std::unique_ptr<Piece> piece = std::move(free_.back());
  free_.pop_back();
  return piece;
}

template <class Value>
void PackedWriter<Value>::finish(std::int64_t task, std::unique_ptr<Piece> piece) {
  std::vector<Copy> copies;
  {
    const std::lock_guard lock(mutex_);
    finished_[static_cast<std::size_t>(task)] = std::move(piece);
    while (next_task_ < static_cast<std::int64_t>(finished_.size()) &&
           finished_[static_cast<std::size_t>(next_task_)]) {
      std::unique_ptr<Piece> next = std::move(finished_[static_cast<std::size_t>(next_task_)]);
      const std::int64_t size = next->size;
      copies.push_back({std::move(next), next_offset_});
      next_offset_ += size;
      ++next_task_;
    }
  }
  for (const Copy& copy : copies) {
    const auto size = static_cast<std::size_t>(copy.piece->size);
    if (size == 0) continue;
    std::memcpy(tokens.memory.get() + copy.offset, copy.piece->tokens.data(), size * sizeof(std::int32_t));
    if (with_values_) {
      std::memcpy(values.memory.get() + copy.offset, copy.piece->values.data(), size * sizeof(Value));
    }
  }
  const std::lock_guard lock(mutex_);
  for (Copy& copy : copies) free_.push_back(std::move(copy.piece));
}

template <class Value>
void PackedWriter<Value>::cut_to_size() noexcept {
  tokens.shrink(next_offset_);
  if (with_values_) values.shrink(next_offset_);
}

template class PackedWriter<float>;
template class PackedWriter<double>;

}  // namespace scfm
