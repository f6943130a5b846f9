/// Rows of a CSR matrix in files, read ahead: requests go in, blocks of rows come out in the same order, and
/// threads of its own read, inflate, place and check the rows of several requests at once.
///
/// A request may name any rows in any order. Each chunk that it touches is inflated once, and every run of
/// values is copied straight to its place in the block, so shuffled reading costs no more than sequential
/// reading of the same chunks. While a piece of a chunk is still in the cache it is also checked; a block
/// whose check found nothing needs no other.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "counts/buffer_pool.hpp"
#include "counts/check_csr.hpp"
#include "counts/stored_array.hpp"

namespace scfm {

struct CsrStreamOptions {
  std::int64_t num_genes = 0;  // at most 2^31 - 1
  int num_threads = 1;
  bool validate = true;
};

/// The rows of one request. Columns are int32, values as stored.
struct CsrRows {
  std::vector<std::int64_t> indptr;
  BufferPool::Block columns;
  BufferPool::Block data;
  /// Every column was representable. (Of wider types, one out of range becomes -1.)
  bool columns_in_range = true;
  /// Sorted, distinct columns in range and whole, finite, non-negative values: `facts` says the rest. False
  /// also without validation. Otherwise only check_csr knows.
  bool sound = false;
  CsrCheck facts;
};

class CsrStream {
 public:
  /// indptr must outlive the stream; it is read at each submit and not trusted.
  static std::shared_ptr<CsrStream> open(std::shared_ptr<const StoredArray> data,
                                         std::shared_ptr<const StoredArray> columns,
                                         std::span<const std::int64_t> indptr, CsrStreamOptions options);
  ~CsrStream();
  CsrStream(const CsrStream&) = delete;
  CsrStream& operator=(const CsrStream&) = delete;

  /// Queues a request. Throws InvalidArgument for a row out of range or impossible row pointers,
  /// std::bad_alloc.
  void submit(std::span<const std::int64_t> rows);

  std::int64_t num_waiting() const;  // requests submitted and not yet taken

  /// Waits for the oldest request; false if it is not done after `patience`.
  bool wait(std::chrono::milliseconds patience);

  /// The rows of the oldest request. Call after wait. Throws ChunkError or std::bad_alloc of its tasks.
  CsrRows take();

 private:
  CsrStream(std::shared_ptr<const StoredArray> data, std::shared_ptr<const StoredArray> columns,
            std::span<const std::int64_t> indptr, CsrStreamOptions options);

  struct Request;
  struct Task;
  struct Scratch;

  void serve();
  bool place(const Request& request, const Task& task, Scratch& scratch) const;
  void check(const Request& request, const Task& task, CsrRows& found) const;

  std::shared_ptr<const StoredArray> arrays_[2];  // columns, data
  std::span<const std::int64_t> indptr_;
  CsrStreamOptions options_;
  BufferPool::Reader pool_;
  std::int64_t owner_process_;

  mutable std::mutex mutex_;
  std::condition_variable work_;
  std::condition_variable done_;
  std::deque<std::unique_ptr<Request>> requests_;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace scfm
