#include "fibers.hpp"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

namespace emulation {

Running running;

namespace {

constexpr std::size_t kStackBytes = 64 << 10;
constexpr unsigned kMostThreads = 1024;

struct Barrier {
  unsigned expected = 0;
  std::vector<int> waiting;
};

struct Fiber {
  ucontext_t start;
  jmp_buf place;
  bool started = false;
  bool finished = false;
};

struct Block {
  std::vector<Fiber> fibers;
  std::deque<int> ready;
  Barrier all;
  std::vector<std::map<unsigned, Barrier>> lanes;  // of each warp, by mask
  std::vector<std::uint64_t> slots;                // of each thread
};

char* stacks = nullptr;  // kMostThreads of them, made once
Block block;
int current = -1;
jmp_buf scheduler;
const std::function<void()>* work = nullptr;
std::string failure;
bool failed = false;
std::uint64_t order = 0;
std::mt19937_64 shuffles;

void enter() {
  (*work)();
  block.fibers[static_cast<std::size_t>(current)].finished = true;
  _longjmp(scheduler, 1);
}

/// Back to the scheduler until somebody puts this fiber into `ready` again.
void rest() {
  if (_setjmp(block.fibers[static_cast<std::size_t>(current)].place) == 0) _longjmp(scheduler, 1);
}

void arrive(Barrier& barrier) {
  if (barrier.waiting.size() + 1 < barrier.expected) {
    barrier.waiting.push_back(current);
    rest();
    return;
  }
  std::vector<int> released = std::move(barrier.waiting);
  barrier.waiting.clear();
  released.push_back(current);
  std::sort(released.begin(), released.end());
  if (order == 1) std::reverse(released.begin(), released.end());
  if (order > 1) std::shuffle(released.begin(), released.end(), shuffles);
  // In front, a warp runs ahead of the others until only the block's barrier stops it.
  const bool ahead = order == 1 || (order > 1 && shuffles() % 2 == 0);
  block.ready.insert(ahead ? block.ready.begin() : block.ready.end(), released.begin(), released.end());
  rest();
}

void resume(int thread) {
  Fiber& fiber = block.fibers[static_cast<std::size_t>(thread)];
  current = thread;
  running.thread_index.x = static_cast<unsigned>(thread);
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

void prepare(unsigned num_threads) {
  if (stacks == nullptr) {
    stacks = static_cast<char*>(mmap(nullptr, kMostThreads * kStackBytes, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }
  block.fibers.resize(num_threads);
  for (unsigned thread = 0; thread < num_threads; ++thread) {
    Fiber& fiber = block.fibers[thread];
    fiber.started = fiber.finished = false;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = stacks + thread * kStackBytes;
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, &enter, 0);
  }
  std::vector<int> threads(num_threads);
  std::iota(threads.begin(), threads.end(), 0);
  if (order == 1) std::reverse(threads.begin(), threads.end());
  if (order > 1) std::shuffle(threads.begin(), threads.end(), shuffles);
  block.ready.assign(threads.begin(), threads.end());
  block.all = Barrier{num_threads, {}};
  block.lanes.assign((num_threads + 31) / 32, {});
  block.slots.assign(num_threads, 0xDEADBEEFDEADBEEFull);
}

void run_block(unsigned num_threads) {
  prepare(num_threads);
  while (!block.ready.empty() && !failed) {
    const int next = block.ready.front();
    block.ready.pop_front();
    resume(next);
  }
  const bool all =
      std::all_of(block.fibers.begin(), block.fibers.end(), [](const Fiber& f) { return f.finished; });
  if (!all && !failed) {
    failed = true;
    failure = "threads wait for others that never come";
  }
}

}  // namespace

std::uint64_t& lane_slot(int lane) { return block.slots[static_cast<std::size_t>(current / 32 * 32 + lane)]; }

void wait_for_block() { arrive(block.all); }

void wait_for_lanes(unsigned mask) {
  if ((mask >> lane() & 1u) == 0) fail("a lane waits for others without being in its own mask");
  Barrier& barrier = block.lanes[static_cast<std::size_t>(current / 32)][mask];
  barrier.expected = static_cast<unsigned>(__builtin_popcount(mask));
  arrive(barrier);
}

void fail(const char* message) {
  failed = true;
  failure = message;
  _longjmp(scheduler, 1);
}

void run_grid(unsigned grid_x, unsigned grid_y, unsigned num_threads, const std::function<void()>& body) {
  if (failed) return;
  if (num_threads > kMostThreads || num_threads % 32 != 0) {
    failed = true;
    failure = "a block of " + std::to_string(num_threads) + " threads";
    return;
  }
  work = &body;
  shuffles.seed(order);
  running.grid_size = {grid_x, grid_y, 1};
  running.block_size = {num_threads, 1, 1};
  for (unsigned y = 0; y < grid_y && !failed; ++y) {
    for (unsigned x = 0; x < grid_x && !failed; ++x) {
      running.block_index = {x, y, 0};
      run_block(num_threads);
    }
  }
}

const char* take_failure() {
  if (!failed) return nullptr;
  failed = false;
  static std::string told;
  told = failure;
  return told.c_str();
}

void set_order(std::uint64_t wanted) { order = wanted; }

}  // namespace emulation
