/// Collects tokens of rows (and a value each) that finish in any order into one packed array, in the order of
/// the rows.
///
/// How long a row becomes is known only once it is done, and so is where the next one starts. A thread
/// therefore fills a piece (the rows of one task) on the side; whoever completes the next pieces in line
/// copies them behind one another. Nobody waits: a piece that is early is parked. The output is reserved at
/// its largest possible size, which costs no memory until it is written, and cut to size at the end.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

#include "base/aligned_buffer.hpp"

namespace scfm {

/// Memory from malloc, so that it can be cut to size in place and handed to numpy.
template <class Value>
struct MallocArray {
  struct Free {
    void operator()(Value* pointer) const noexcept { std::free(pointer); }
  };
  std::unique_ptr<Value, Free> memory;
  std::int64_t size = 0;

  void allocate(std::int64_t count);
  void shrink(std::int64_t count) noexcept;
};

/// The rows of one task: tokens, and values where they are wanted.
template <class Value>
struct PackedPiece {
  AlignedBuffer<std::int32_t> tokens;
  AlignedBuffer<Value> values;
  std::int64_t size = 0;
};

/// Value: double or float.
template <class Value>
class PackedWriter {
 public:
  using Piece = PackedPiece<Value>;

  PackedWriter(std::int64_t num_tasks, std::int64_t capacity, bool with_values);

  std::unique_ptr<Piece> take_piece();
  void finish(std::int64_t task, std::unique_ptr<Piece> piece);

  /// Call once every task has finished.
  void cut_to_size() noexcept;

  MallocArray<std::int32_t> tokens;
  MallocArray<Value> values;

 private:
  struct Copy {
    std::unique_ptr<Piece> piece;
    std::int64_t offset;
  };
  std::mutex mutex_;
  std::vector<std::unique_ptr<Piece>> finished_;  // per task, until it is copied
  std::vector<std::unique_ptr<Piece>> free_;
  std::int64_t next_task_ = 0;
  std::int64_t next_offset_ = 0;
  bool with_values_;
};

}  // namespace scfm
