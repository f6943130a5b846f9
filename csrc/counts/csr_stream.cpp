#include "counts/csr_stream.hpp"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>

#include "base/errors.hpp"
#include "counts/gather_plan.hpp"
#include "counts/row_facts.hpp"

namespace scfm {
namespace {

constexpr int kColumns = 0;
constexpr int kData = 1;
// Plain arrays are read in pieces that fit the second-level cache, so that checking finds them there.
constexpr std::int64_t kPlainPiece = 1 << 16;
constexpr std::size_t kMostIdleBytes = std::size_t{256} << 20;

/// One for the process: the streams of many files at once keep to the same pages.
std::shared_ptr<BufferPool> shared_pool() {
  static std::mutex mutex;
  static std::shared_ptr<BufferPool> pool;
  static const int registered =
      pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); }, [] { mutex.unlock(); });
  static_cast<void>(registered);
  const std::lock_guard lock(mutex);
  // A forked child starts a pool of its own; the parent's lives on with the arrays it has given out.
  if (!pool || pool->is_foreign()) pool = std::make_shared<BufferPool>(kMostIdleBytes);
  return pool;
}

/// Columns as int32; false if one is outside [0, num_genes), and -1 stands for it.
template <class Stored>
bool narrow(const Stored* from, std::int64_t count, std::int64_t num_genes, std::int32_t* to) {
  using Unsigned = std::make_unsigned_t<Stored>;
  bool wrong = false;
  for (std::int64_t i = 0; i < count; ++i) {
    const bool outside =
        static_cast<std::uint64_t>(static_cast<Unsigned>(from[i])) >= static_cast<std::uint64_t>(num_genes) ||
        from[i] < Stored{0};
    wrong |= outside;
    to[i] = outside ? -1 : static_cast<std::int32_t>(from[i]);
  }
  return !wrong;
}

bool place_columns(DataType type, const void* from, std::int64_t count, std::int64_t num_genes,
                   std::int32_t* to) {
  return with_data(type, from, [&](const auto* columns) {
    using Stored = std::remove_cv_t<std::remove_pointer_t<decltype(columns)>>;
    if constexpr (std::is_same_v<Stored, std::int32_t>) {
      std::memcpy(to, columns, static_cast<std::size_t>(count) * sizeof(std::int32_t));
      return true;
    } else if constexpr (std::is_integral_v<Stored>) {
      return narrow(columns, count, num_genes, to);
    } else {
      return false;
    }
  });
}

}  // namespace

/// Consecutive pieces of one array, done by one thread; of an encoded array, all those of one chunk.
struct CsrStream::Task {
  int array;
  std::size_t first;
  std::size_t last;
};

struct CsrStream::Scratch {
  ChunkScratch chunk;
  std::vector<StoredArray::Stretch> stretches;
};

struct CsrStream::Request {
  std::vector<Piece> pieces[2];
  std::vector<Task> tasks;
  std::size_t next_task = 0;
  std::size_t num_left = 0;
  bool ready = false;
  std::exception_ptr error;
  std::size_t error_task = 0;
  CsrRows rows;
};

CsrStream::CsrStream(std::shared_ptr<const StoredArray> data, std::shared_ptr<const StoredArray> columns,
                     std::span<const std::int64_t> indptr, CsrStreamOptions options)
    : arrays_{std::move(columns), std::move(data)},
      indptr_(indptr),
      options_(options),
      pool_(shared_pool()),
      owner_process_(getpid()) {
  const DataType type = arrays_[kColumns]->table().type;
  if (type == DataType::f32 || type == DataType::f64) throw InvalidArgument("CsrStream: indices are floats");
  if (indptr_.empty()) throw InvalidArgument("CsrStream: indptr is empty, expected num_cells + 1 entries");
  if (options_.num_genes < 0 || options_.num_genes > std::numeric_limits<std::int32_t>::max()) {
    throw InvalidArgument("CsrStream: num_genes = " + std::to_string(options_.num_genes) +
                          ", expected 0 to 2^31 - 1");
  }
  if (arrays_[0]->table().num_values != arrays_[1]->table().num_values) {
    throw InvalidArgument("CsrStream: data and indices differ in length");
  }
  if (options_.num_threads < 1 || options_.num_threads > 1024) {
    throw InvalidArgument("CsrStream: num_threads = " + std::to_string(options_.num_threads) +
                          ", expected 1 to 1024");
  }
  threads_.reserve(static_cast<std::size_t>(options_.num_threads));  // growing later could fail half way
  for (int i = 0; i < options_.num_threads; ++i) {
    try {
      threads_.emplace_back(&CsrStream::serve, this);
    } catch (const std::system_error&) {
      if (threads_.empty()) throw;
      break;  // those that run must do
    }
  }
}

std::shared_ptr<CsrStream> CsrStream::open(std::shared_ptr<const StoredArray> data,
                                           std::shared_ptr<const StoredArray> columns,
                                           std::span<const std::int64_t> indptr, CsrStreamOptions options) {
  auto* stream = new CsrStream(std::move(data), std::move(columns), indptr, options);
  // In a forked child the threads do not exist, and the locks are as they happened to be: neither can be
  // joined or destroyed, so there all of it is left alone.
  return {stream, [](CsrStream* dropped) {
            if (dropped->owner_process_ == getpid()) delete dropped;
          }};
}

CsrStream::~CsrStream() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  work_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void CsrStream::submit(std::span<const std::int64_t> rows) {
  if (owner_process_ != getpid()) throw InvalidArgument("CsrStream: used after fork; open the file again");
  auto request = std::make_unique<Request>();
  RowPlan plan = plan_rows(indptr_, arrays_[kData]->table().num_values, rows);
  const auto num_values = static_cast<std::size_t>(plan.indptr.back());
  for (const int array : {kColumns, kData}) {
    const StoredArray& stored = *arrays_[array];
    std::vector<Piece>& pieces = request->pieces[array];
    pieces = cut_into_pieces(plan.runs, stored.table().chunk_values);
    if (stored.plain()) pieces = cut_long_pieces(pieces, kPlainPiece);
    for (std::size_t first = 0; first < pieces.size();) {
      std::size_t last = first + 1;
      std::int64_t values = pieces[first].count;
      while (last < pieces.size() && (stored.plain() ? values + pieces[last].count <= kPlainPiece
                                                     : pieces[last].chunk == pieces[first].chunk)) {
        values += pieces[last++].count;
      }
      request->tasks.push_back({array, first, last});
      first = last;
    }
  }
  request->rows.indptr = std::move(plan.indptr);
  request->rows.columns = pool_.pool().take(num_values * sizeof(std::int32_t));
  request->rows.data =
      pool_.pool().take(num_values * static_cast<std::size_t>(item_size(arrays_[kData]->table().type)));
  request->rows.sound = options_.validate;
  request->num_left = request->tasks.size();
  request->ready = request->tasks.empty();
  {
    const std::lock_guard lock(mutex_);
    requests_.push_back(std::move(request));
  }
  work_.notify_all();
}

std::int64_t CsrStream::num_waiting() const {
  const std::lock_guard lock(mutex_);
  return static_cast<std::int64_t>(requests_.size());
}

bool CsrStream::wait(std::chrono::milliseconds patience) {
  if (owner_process_ != getpid()) throw InvalidArgument("CsrStream: used after fork; open the file again");
  std::unique_lock lock(mutex_);
  if (requests_.empty()) throw InvalidArgument("CsrStream: no request is waiting");
  return done_.wait_for(lock, patience, [this] { return requests_.front()->ready; });
}

CsrRows CsrStream::take() {
  std::unique_ptr<Request> request;
  {
    const std::lock_guard lock(mutex_);
    if (requests_.empty() || !requests_.front()->ready) {
      throw InvalidArgument("CsrStream: the oldest request is not done");
    }
    request = std::move(requests_.front());
    requests_.pop_front();
  }
  if (request->error) std::rethrow_exception(request->error);
  return std::move(request->rows);
}

/// Puts the values of a task where they belong. False if a column was out of range.
bool CsrStream::place(const Request& request, const Task& task, Scratch& scratch) const {
  const StoredArray& stored = *arrays_[task.array];
  const DataType type = stored.table().type;
  const std::int64_t item = item_size(type);
  const std::span<const Piece> pieces(request.pieces[task.array].data() + task.first, task.last - task.first);
  const bool same_type = task.array == kData || type == DataType::i32;
  auto* memory = static_cast<std::uint8_t*>(task.array == kData ? request.rows.data.memory
                                                                : request.rows.columns.memory);
  bool in_range = true;
  if (stored.plain() && same_type) {
    scratch.stretches.clear();
    for (const Piece& piece : pieces) {
      scratch.stretches.push_back(
          {piece.chunk, piece.from * item, piece.count * item, memory + piece.to * item});
    }
    stored.read_plain(scratch.stretches);
    return true;
  }
  const std::uint8_t* chunk = stored.plain() ? nullptr : stored.decode(pieces.front().chunk, scratch.chunk);
  for (const Piece& piece : pieces) {
    const std::uint8_t* from = nullptr;
    if (chunk != nullptr) {
      from = chunk + piece.from * item;
    } else {
      std::uint8_t* read_to = scratch.chunk.first.reserve(piece.count * item);
      const StoredArray::Stretch stretch{piece.chunk, piece.from * item, piece.count * item, read_to};
      stored.read_plain({&stretch, 1});
      from = read_to;
    }
    if (task.array == kData) {
      std::memcpy(memory + piece.to * item, from, static_cast<std::size_t>(piece.count * item));
    } else {
      in_range &= place_columns(type, from, piece.count, options_.num_genes,
                                static_cast<std::int32_t*>(request.rows.columns.memory) + piece.to);
    }
  }
  return in_range;
}

/// What the values of a task look like, while they are still in the cache.
void CsrStream::check(const Request& request, const Task& task, CsrRows& found) const {
  const RowFactsKernels& kernels = row_facts_kernels();
  const std::vector<std::int64_t>& indptr = request.rows.indptr;
  const DataType type = arrays_[kData]->table().type;
  for (std::size_t i = task.first; i < task.last; ++i) {
    const Piece& piece = request.pieces[task.array][i];
    if (task.array == kData) {
      const auto* data = static_cast<const std::uint8_t*>(request.rows.data.memory);
      const ValueFacts facts =
          kernels.values[static_cast<int>(type)](data + piece.to * item_size(type), piece.count);
      found.sound = found.sound && !facts.suspect && facts.num_nonintegers == 0;
      found.facts.num_zeros += facts.num_zeros;
      found.facts.max_value = std::max(found.facts.max_value, facts.max_value);
      continue;
    }
    const auto* columns = static_cast<const std::int32_t*>(request.rows.columns.memory);
    auto row = std::upper_bound(indptr.begin(), indptr.end(), piece.to);  // the end of the piece's first row
    for (std::int64_t at = piece.to; at < piece.to + piece.count; ++row) {
      const std::int64_t stop = std::min(*row, piece.to + piece.count);
      const ColumnFacts facts =
          kernels.columns[static_cast<int>(ColumnType::i32)](columns + at, stop - at, options_.num_genes);
      found.sound = found.sound && !facts.out_of_range && !facts.falls && !facts.repeats;
      at = stop;
    }
  }
}

namespace {

/// Whether the columns also rise where one piece of a row meets the next.
bool rises_at_seams(const std::vector<Piece>& pieces, const CsrRows& rows) {
  const auto* columns = static_cast<const std::int32_t*>(rows.columns.memory);
  for (const Piece& piece : pieces) {
    if (std::binary_search(rows.indptr.begin(), rows.indptr.end(), piece.to)) continue;
    if (columns[piece.to - 1] >= columns[piece.to]) return false;
  }
  return true;
}

}  // namespace

void CsrStream::serve() {
  sigset_t all;  // signals belong to the interpreter's threads
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, nullptr);
  Scratch scratch;
  std::unique_lock lock(mutex_);
  for (;;) {
    Request* request = nullptr;
    for (const auto& candidate : requests_) {
      if (candidate->next_task < candidate->tasks.size()) {
        request = candidate.get();
        break;
      }
    }
    if (stop_) return;
    if (request == nullptr) {
      work_.wait(lock);
      continue;
    }
    const std::size_t task = request->next_task++;
    lock.unlock();
    CsrRows found;
    found.sound = true;
    std::exception_ptr error;
    try {
      found.columns_in_range = place(*request, request->tasks[task], scratch);
      if (options_.validate) check(*request, request->tasks[task], found);
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    CsrRows& rows = request->rows;
    rows.columns_in_range = rows.columns_in_range && found.columns_in_range;
    rows.sound = rows.sound && found.sound;
    rows.facts.num_zeros += found.facts.num_zeros;
    rows.facts.max_value = std::max(rows.facts.max_value, found.facts.max_value);
    --request->num_left;
    if (error) {
      if (!request->error || task < request->error_task) {
        request->error = error;
        request->error_task = task;
      }
      // Tasks not yet begun are pointless now; those before this one have begun and may still fail.
      request->num_left -= request->tasks.size() - request->next_task;
      request->next_task = request->tasks.size();
    }
    if (request->num_left > 0) continue;
    if (rows.sound && !request->error) {
      lock.unlock();
      const bool rises = rises_at_seams(request->pieces[kColumns], rows);
      lock.lock();
      rows.sound = rises;
    }
    request->ready = true;
    done_.notify_all();
  }
}

}  // namespace scfm
