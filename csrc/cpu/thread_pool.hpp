/// A small pool of threads of our own. (OpenMP would meet torch's copy of it: twice the threads, and hangs
/// after a fork.) The calling thread works too. Tasks are claimed one by one in rising order; each writes its
/// own part of the result, so results never depend on the number of threads.
///
/// - An exception in a task reaches the caller; of several, that of the lowest task, whatever the timing.
/// - A caller that finds the pool busy (another thread, or a task that starts tasks) does its work alone.
/// - After fork() the child starts a pool of its own.
/// - The calling thread asks now and then whether it should stop (Ctrl-C); then Interrupted is thrown.
#pragma once

#include <cstdint>
#include <exception>
#include <type_traits>

namespace scfm {

/// Threads that a parallel_for may use, the caller included: as set, else what the processor affinity allows.
int num_threads() noexcept;

/// Throws InvalidArgument unless 1 <= count <= 1024.
void set_num_threads(int count);

/// Thrown by run_tasks when the check below said so.
class Interrupted : public std::exception {
 public:
  const char* what() const noexcept override { return "interrupted"; }
};

/// Called about ten times a second on threads that wait in run_tasks, between two tasks; true to stop. Set
/// once by the bindings.
void set_interrupt_check(bool (*check)());

using TaskFunction = void (*)(void* context, std::int64_t task, int worker);

/// Calls function(context, task, worker) for every task in [0, num_tasks); worker < num_threads() at the time
/// of the call numbers the scratch space. Returns when all are done.
void run_tasks(std::int64_t num_tasks, int max_workers, TaskFunction function, void* context);

/// The same for a callable (task, worker). Take max_workers from num_threads() once and size scratch space by
/// it.
template <class Callable>
void parallel_for(std::int64_t num_tasks, int max_workers, Callable&& callable) {
  using Plain = std::remove_reference_t<Callable>;
  run_tasks(
      num_tasks, max_workers,
      [](void* context, std::int64_t task, int worker) { (*static_cast<Plain*>(context))(task, worker); },
      const_cast<void*>(static_cast<const void*>(&callable)));
}

}  // namespace scfm
