/// A GPU's threads as fibers of one processor thread: each runs until it waits for others, in an order that
/// the tests choose. A kernel that forgets to wait reads what another order has not written yet; one that
/// waits for threads that never come is told on, where a GPU would hang.
#pragma once

#include <cstdint>
#include <functional>

namespace emulation {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

/// The thread that runs.
struct Running {
  Index thread_index, block_index, block_size, grid_size;
};
extern Running running;

inline int lane() { return static_cast<int>(running.thread_index.x % 32); }

/// What a lane of this warp has put down for the others.
std::uint64_t& lane_slot(int lane);

void wait_for_block();

/// All lanes of the mask in this warp, this one among them.
void wait_for_lanes(unsigned mask);

/// Ends the grid with a message; does not return.
[[noreturn]] void fail(const char* message);

/// Runs body in every thread. After the first failure nothing runs until take_failure has been asked.
void run_grid(unsigned grid_x, unsigned grid_y, unsigned num_threads, const std::function<void()>& body);

/// The first failure since last asked, or null.
const char* take_failure();

/// 0: threads take turns from the first; 1: from the last, a warp running as far ahead as it may; otherwise:
/// shuffled by this seed.
void set_order(std::uint64_t order);

}  // namespace emulation
