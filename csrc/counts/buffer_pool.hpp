/// Large blocks of memory, given out and taken back: the pages of a fresh block cost more than decoding into
/// them, so a block that the consumer has dropped serves the next one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace scfm {

class BufferPool : public std::enable_shared_from_this<BufferPool> {
 public:
  /// Memory that goes back to its pool when dropped; the pool lives as long as the last of them.
  struct Block {
    std::shared_ptr<BufferPool> pool;
    void* memory = nullptr;
    std::size_t capacity = 0;

    Block() = default;
    Block(Block&& other) noexcept;
    Block& operator=(Block&& other) noexcept;
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;
    ~Block();
  };

  /// At most `most_idle` bytes wait unused, and only while someone reads.
  explicit BufferPool(std::size_t most_idle);
  ~BufferPool();

  /// Held while blocks are asked for: with the last of them, what waits unused is freed.
  class Reader {
   public:
    explicit Reader(std::shared_ptr<BufferPool> pool);
    ~Reader();
    Reader(const Reader&) = delete;
    Reader& operator=(const Reader&) = delete;
    BufferPool& pool() const noexcept { return *pool_; }

   private:
    std::shared_ptr<BufferPool> pool_;
  };

  /// Whether it was made by another process, from which this one was forked: its lock must not be touched.
  bool is_foreign() const noexcept;

  /// At least `size` bytes, aligned to a cache line, not initialised. Throws std::bad_alloc.
  Block take(std::size_t size);

 private:
  struct Idle {
    void* memory;
    std::size_t capacity;
  };
  void give_back(void* memory, std::size_t capacity) noexcept;

  std::size_t most_idle_;
  std::int64_t owner_process_;
  std::mutex mutex_;
  std::vector<Idle> idle_;
  std::size_t idle_bytes_ = 0;
  int num_readers_ = 0;
};

}  // namespace scfm
