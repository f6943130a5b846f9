#include "cpu/thread_pool.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <signal.h>
#define SCFM_HAS_FORK 1
#endif

#include "base/errors.hpp"

namespace scfm {
namespace {

constexpr int kMaxThreads = 1024;
constexpr std::chrono::milliseconds kBetweenChecks{100};

std::atomic<bool (*)()> interrupt_check{nullptr};

/// One parallel_for: lives on the caller's stack, which outlasts every worker that joined it.
struct Job {
  std::int64_t num_tasks;
  int max_workers;
  TaskFunction function;
  void* context;
  std::atomic<std::int64_t> next_task{0};
  std::atomic<bool> failed{false};
  std::mutex error_mutex;
  std::exception_ptr error;
  std::int64_t error_task = -1;

  Job(std::int64_t tasks, int workers, TaskFunction f, void* c)
      : num_tasks(tasks), max_workers(workers), function(f), context(c) {}

  void work(int worker) noexcept {
    auto last_check = std::chrono::steady_clock::now();
    while (!failed.load(std::memory_order_relaxed)) {
      const std::int64_t task = next_task.fetch_add(1, std::memory_order_relaxed);
      if (task >= num_tasks) return;
      try {
        if (worker == 0) stop_if_interrupted(last_check);
        function(context, task, worker);
      } catch (...) {
        // Tasks below this one have all been claimed and will finish, so the lowest failing task always
        // reports.
        const std::lock_guard lock(error_mutex);
        if (error_task < 0 || task < error_task) {
          error = std::current_exception();
          error_task = task;
        }
        failed.store(true, std::memory_order_relaxed);
      }
    }
  }

 private:
  /// Worker 0 is the thread that called, the only one on which the interpreter may be asked.
  static void stop_if_interrupted(std::chrono::steady_clock::time_point& last_check) {
    const auto now = std::chrono::steady_clock::now();
    if (now - last_check < kBetweenChecks) return;
    last_check = now;
    const auto check = interrupt_check.load(std::memory_order_relaxed);
    if (check != nullptr && check()) throw Interrupted();
  }
};

/// What a thread would allocate when it first throws, or first touches a thread_local of this library: the C
/// library ends the process if there is no memory for it then, so it is had while the pool grows.
void reserve_thread_memory() {
  static thread_local volatile char touched = 0;
  touched = static_cast<char>(std::uncaught_exceptions());
}

class ThreadPool {
 public:
  void run(Job& job) {
    const std::unique_lock turn(turn_, std::try_to_lock);
    if (!turn.owns_lock() || job.max_workers == 1 || job.num_tasks == 1) {
      job.work(0);
      return;
    }
    start_threads(job.max_workers - 1);
    {
      const std::lock_guard lock(mutex_);
      job_ = &job;
      ++generation_;
    }
    wake_.notify_all();
    job.work(0);
    std::unique_lock lock(mutex_);
    job_ = nullptr;  // who has not joined by now need not: every task is claimed
    left_.wait(lock, [this] { return num_joined_ == 0; });
  }

 private:
  /// Grows the pool and waits until its threads are ready; where the system refuses a thread, those that run
  /// must do.
  void start_threads(int wanted) {
    if (num_started_ >= wanted) return;
    try {
      while (num_started_ < wanted) {
        std::thread(&ThreadPool::serve, this, num_started_ + 1).detach();
        ++num_started_;
      }
    } catch (const std::system_error&) {
    }
    std::unique_lock lock(mutex_);
    left_.wait(lock, [this] { return num_ready_ == num_started_; });
  }

  void serve(int worker) {
#ifdef SCFM_HAS_FORK
    sigset_t all;  // signals belong to the interpreter's threads
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, nullptr);
#endif
    reserve_thread_memory();
    std::unique_lock lock(mutex_);
    std::uint64_t seen = 0;
    ++num_ready_;
    left_.notify_all();
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      Job* job = job_;
      if (job == nullptr || worker >= job->max_workers) continue;
      ++num_joined_;
      lock.unlock();
      job->work(worker);
      lock.lock();
      if (--num_joined_ == 0) left_.notify_all();
    }
  }

  std::mutex turn_;  // held by the caller whose job the pool runs
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable left_;
  Job* job_ = nullptr;
  std::uint64_t generation_ = 0;
  int num_joined_ = 0;
  int num_ready_ = 0;
  int num_started_ = 0;  // guarded by turn_
};

// Never destroyed: at exit its threads sleep on it, and after a fork the child must not touch its locks.
std::atomic<ThreadPool*> pool{nullptr};
std::atomic<int> requested_threads{0};

void forget_pool() { pool.store(nullptr); }

ThreadPool& the_pool() {
#ifdef SCFM_HAS_FORK
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
  static_cast<void>(registered);
#endif
  ThreadPool* current = pool.load();
  if (current != nullptr) return *current;
  auto* fresh = new ThreadPool;
  if (pool.compare_exchange_strong(current, fresh)) return *fresh;
  delete fresh;  // another thread was first; this one has no threads yet
  return *current;
}

int allowed_processors() noexcept {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace

int num_threads() noexcept {
  const int requested = requested_threads.load(std::memory_order_relaxed);
  return requested > 0 ? requested : std::min(allowed_processors(), kMaxThreads);
}

void set_num_threads(int count) {
  if (count < 1 || count > kMaxThreads) {
    throw InvalidArgument("set_num_threads: count = " + std::to_string(count) + ", expected 1 to " +
                          std::to_string(kMaxThreads));
  }
  requested_threads.store(count, std::memory_order_relaxed);
}

void set_interrupt_check(bool (*check)()) { interrupt_check.store(check); }

void run_tasks(std::int64_t num_tasks, int max_workers, TaskFunction function, void* context) {
  if (num_tasks <= 0) return;
  Job job(num_tasks, std::max(1, max_workers), function, context);
  if (job.max_workers == 1 || num_tasks == 1) {
    job.work(0);
  } else {
    the_pool().run(job);
  }
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace scfm
