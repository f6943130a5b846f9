#include "counts/buffer_pool.hpp"

#include <unistd.h>

#include <cstdlib>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace scfm {
namespace {

constexpr std::size_t kLine = 64;
constexpr std::size_t kHugePage = std::size_t{2} << 20;

void* allocate(std::size_t capacity) {
  const std::size_t alignment = capacity >= kHugePage ? kHugePage : kLine;
  void* memory = std::aligned_alloc(alignment, (capacity + alignment - 1) / alignment * alignment);
  if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__)
  // Fewer page faults; a refusal changes nothing.
  if (capacity >= kHugePage) static_cast<void>(madvise(memory, capacity, MADV_HUGEPAGE));
#endif
  return memory;
}

}  // namespace

BufferPool::Block::Block(Block&& other) noexcept
    : pool(std::move(other.pool)),
      memory(std::exchange(other.memory, nullptr)),
      capacity(std::exchange(other.capacity, 0)) {}

BufferPool::Block& BufferPool::Block::operator=(Block&& other) noexcept {
  std::swap(pool, other.pool);
  std::swap(memory, other.memory);
  std::swap(capacity, other.capacity);
  return *this;
}

BufferPool::Block::~Block() {
  if (memory != nullptr) pool->give_back(memory, capacity);
}

BufferPool::BufferPool(std::size_t most_idle) : most_idle_(most_idle), owner_process_(getpid()) {}

bool BufferPool::is_foreign() const noexcept { return owner_process_ != getpid(); }

BufferPool::~BufferPool() {
  for (const Idle& block : idle_) std::free(block.memory);
}

BufferPool::Reader::Reader(std::shared_ptr<BufferPool> pool) : pool_(std::move(pool)) {
  const std::lock_guard lock(pool_->mutex_);
  ++pool_->num_readers_;
}

BufferPool::Reader::~Reader() {
  if (pool_->is_foreign()) return;
  std::vector<Idle> unused;
  {
    const std::lock_guard lock(pool_->mutex_);
    if (--pool_->num_readers_ > 0) return;
    unused.swap(pool_->idle_);
    pool_->idle_bytes_ = 0;
  }
  for (const Idle& block : unused) std::free(block.memory);
}

BufferPool::Block BufferPool::take(std::size_t size) {
  Block block;
  block.pool = shared_from_this();
  {
    const std::lock_guard lock(mutex_);
    std::size_t best = idle_.size();
    for (std::size_t i = 0; i < idle_.size(); ++i) {
      const bool fits = idle_[i].capacity >= size && idle_[i].capacity / 2 <= size;
      if (fits && (best == idle_.size() || idle_[i].capacity < idle_[best].capacity)) best = i;
    }
    if (best < idle_.size()) {
      block.memory = idle_[best].memory;
      block.capacity = idle_[best].capacity;
      idle_bytes_ -= block.capacity;
      idle_.erase(idle_.begin() + static_cast<std::ptrdiff_t>(best));
      return block;
    }
  }
  // Some room to spare: the next block of as many cells is rarely of exactly this size.
  block.capacity = size + size / 8 + kLine;
  block.memory = allocate(block.capacity);
  return block;
}

void BufferPool::give_back(void* memory, std::size_t capacity) noexcept {
  if (!is_foreign()) {
    const std::lock_guard lock(mutex_);
    if (num_readers_ > 0 && idle_bytes_ + capacity <= most_idle_) {
      try {
        idle_.push_back({memory, capacity});
        idle_bytes_ += capacity;
        return;
      } catch (const std::bad_alloc&) {
      }
    }
  }
  std::free(memory);
}

}  // namespace scfm
