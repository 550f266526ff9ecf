// The scheduler: runs a grid block by block, a block warp by warp, a warp lane by lane, each CUDA thread until it has
// to wait for others. Single-threaded and deterministic; the order is a test parameter. Where a GPU would hang, or
// give an undefined value, it throws an Error that says where every thread of the block stands.
#pragma once

#include <vector_types.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <source_location>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "configuration.h"
#include "fiber.h"
#include "shared_memory.h"

namespace cuda_emulator {

using Location = std::source_location;

enum class State : std::uint8_t {
  running,
  returned,
  stopped,
  block_barrier,
  warp_barrier,
  shuffle,
  vote,
  reduce,
  mma,
  ldmatrix
};

// What the lanes of a warp have brought to a collective operation, once all of them have arrived.
struct Exchange {
  std::uint32_t lanes;  // those that take part
  std::uint64_t value[32];
};
// What a lane takes home from it; `argument` is its own, for a shuffle the lane that it reads from.
using Combine = std::uint64_t (*)(const Exchange&, int argument);

// A kernel with its arguments bound. One per launch: its address stands for the launch.
struct Kernel {
  template <class F>
  explicit Kernel(F& function) : call([](void* f) { (*static_cast<F*>(f))(); }), target(&function) {}
  void operator()() const { call(target); }

  void (*call)(void*);
  void* target;
};

// 8 bytes of whatever type.
using Word [[gnu::may_alias]] = std::uint64_t;

// A copy of 16 bytes, or of zeros where there is no source, that was begun and has not arrived.
struct AsyncCopy {
  Word* target;
  const Word* source;
  Word begun_with[2];  // what the source held
  unsigned group;
};

struct Block;

struct Thread {
  Fiber fiber;
  uint3 index{};
  Block* block = nullptr;
  State state = State::running;
  // Of the operation that the thread waits in:
  std::uint32_t mask = 0;
  int argument = 0;
  std::uint64_t value = 0, result = 0;
  Combine combine = nullptr;
  Location where;
  const char* problem = nullptr;  // of one that is stopped
  std::vector<AsyncCopy> copies;  // in flight
  unsigned groups = 0;            // of copies that were committed
};

struct Block {
  Block(dim3 grid, dim3 dimensions, const Kernel& kernel, std::shared_ptr<Stacks> its_stacks,
        std::size_t dynamic_shared)
      : grid(grid),
        dimensions(dimensions),
        size(dimensions.x * dimensions.y * dimensions.z),
        kernel(kernel),
        stacks(std::move(its_stacks)),
        storage(size),
        threads(storage.data()),
        dynamic_shared(dynamic_shared) {
    for (unsigned i = 0; i < size; ++i) {
      Thread& thread = threads[i];
      thread.block = this;
      thread.fiber.stack = stacks->stack(i);
      thread.fiber.stack_bytes = stacks->stack_bytes();
      thread.index = {i % dimensions.x, i / dimensions.x % dimensions.y, i / (dimensions.x * dimensions.y)};
    }
  }

  // The lane of the warp at hand that runs next. Lanes hand over to each other, which halves the number of switches;
  // the last one returns to the scheduler.
  CUDA_EMULATOR_RAW Thread& next() {
    for (; position < 32; ++position) {
      const unsigned i = warp * 32 + lane_order[position];
      if (i < size && threads[i].state == State::running) return threads[i];
    }
    return scheduler;
  }

  const dim3 grid, dimensions;
  const unsigned size;
  const Kernel& kernel;
  uint3 index{};
  std::shared_ptr<Stacks> stacks;
  std::vector<Thread> storage;
  Thread* const threads;  // the scheduler's view of storage
  Thread scheduler;
  DynamicSharedMemory dynamic_shared;
  const unsigned* lane_order = nullptr;
  unsigned warp = 0, position = 0;
  // ThreadSanitizer's names for barrier number n of the block [0] and of each warp [1 + warp]; two of each, in turn,
  // so that a thread that leaves a barrier is not ordered after one that already waits at the next.
  char barrier[33][2] = {};
  unsigned generation[33] = {};
};

// The CUDA thread that is running. Launches take turns (see run_grid), so one variable serves the process.
inline Thread* current = nullptr;

CUDA_EMULATOR_RAW inline void resume(Thread& from, Thread& to, bool finished = false) {
  current = &to;
  switch_fiber(from.fiber, to.fiber, finished);
}

[[noreturn]] inline void stop(const char* problem, const Location& where);

CUDA_EMULATOR_RAW inline void thread_main() {
  Thread& thread = *current;
  Block& block = *thread.block;
  enter_fiber(block.scheduler.fiber);
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&block);  // what the host did before the launch
#endif
  block.kernel();
  if (!thread.copies.empty()) stop("a thread returned before its asynchronous copies arrived", Location::current());
#if defined(__SANITIZE_THREAD__)
  __tsan_release(const_cast<Kernel*>(&block.kernel));  // acquired when the whole grid is done
#endif
  thread.state = State::returned;
  resume(thread, block.next(), true);
  std::abort();
}

// Suspends the current thread until the scheduler has let it pass, and returns its result. Barriers order memory;
// shuffles, votes and reductions do not, as the CUDA manual has it.
CUDA_EMULATOR_RAW inline std::uint64_t wait(State state, std::uint32_t mask, std::uint64_t value, int argument,
                                            Combine combine, const Location& where) {
  Thread& thread = *current;
  Block& block = *thread.block;
  thread.mask = mask, thread.value = value, thread.argument = argument, thread.combine = combine;
  thread.where = where, thread.state = state;
#if defined(__SANITIZE_THREAD__)
  const bool ordering = state == State::block_barrier || state == State::warp_barrier;
  const unsigned which = state == State::block_barrier ? 0 : 1 + unsigned(&thread - block.threads) / 32;
  char* const name = &block.barrier[which][block.generation[which] & 1];
  if (ordering) __tsan_release(name);
#endif
  resume(thread, block.next());
#if defined(__SANITIZE_THREAD__)
  if (ordering) __tsan_acquire(name);
#endif
  return thread.result;
}

// Reports what the current thread has done.
[[noreturn]] inline void stop(const char* problem, const Location& where) {
  current->problem = problem;
  wait(State::stopped, 0, 0, 0, nullptr, where);
  std::abort();
}

CUDA_EMULATOR_RAW inline bool is_same(const Location& a, const Location& b) {
  return a.line() == b.line() && (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

inline std::string describe(const Location& where) {
  const char* const slash = std::strrchr(where.file_name(), '/');
  return std::string(slash ? slash + 1 : where.file_name()) + ":" + std::to_string(where.line());
}

inline std::string describe(const Thread& thread) {
  static const char* const names[] = {"running", "returned", "stopped", "__syncthreads", "__syncwarp",
                                      "shuffle", "vote",     "reduce",  "mma",           "ldmatrix"};
  std::string text = names[static_cast<int>(thread.state)];
  if (thread.state >= State::stopped) text += " at " + describe(thread.where);
  if (thread.state >= State::warp_barrier) {
    char mask[24];
    std::snprintf(mask, sizeof mask, ", mask 0x%08x", thread.mask);
    text += mask;
  }
  return text;
}

// Throws `problem`, with the block, the thread at fault if there is one, and what every thread is doing.
[[noreturn]] inline void fail(const Block& block, const Thread* culprit, const std::string& problem) {
  auto text = [](auto x) { return std::to_string(x); };
  std::string message =
      problem + "; block (" + text(block.index.x) + "," + text(block.index.y) + "," + text(block.index.z) + ")";
  if (culprit) message += ", thread " + text(culprit - block.threads);
  for (unsigned first = 0, i = 1; i <= block.size; ++i) {
    const std::string doing = describe(block.threads[first]);
    if (i < block.size && describe(block.threads[i]) == doing) continue;
    message +=
        "\n  thread" + (i - first > 1 ? "s " + text(first) + ".." + text(i - 1) : " " + text(first)) + ": " + doing;
    first = i;
  }
  throw Error(message);
}

// Completes the operations of a warp that all of their lanes have reached; true if that lets any lane go on. Lanes
// that returned, or that a short last warp does not have, are not waited for.
CUDA_EMULATOR_RAW inline bool resolve_warp(Block& block, unsigned warp) {
  Thread* const lanes = block.threads + warp * 32;
  const unsigned count = block.size - warp * 32 < 32 ? block.size - warp * 32 : 32;
  bool any = false;
  for (unsigned i = 0; i < count; ++i) {
    const State state = lanes[i].state;
    const std::uint32_t mask = lanes[i].mask;
    if (state < State::warp_barrier) continue;
    if (!(mask >> i & 1)) fail(block, &lanes[i], "a lane is missing from its own mask");

    const bool matrix = state >= State::mma;
    Exchange exchange;
    exchange.lanes = 0;
    bool complete = true;
    for (unsigned j = 0; j < count; ++j) {
      if (!(mask >> j & 1) || lanes[j].state == State::returned) continue;
      complete &=
          lanes[j].state == state && lanes[j].mask == mask && (!matrix || is_same(lanes[j].where, lanes[i].where));
      exchange.lanes |= 1u << j;
      exchange.value[j] = lanes[j].value;
    }
    if (!complete) continue;
    if (matrix && exchange.lanes != ~0u)
      fail(block, &lanes[i], "a matrix instruction without all 32 lanes of the warp");

    for (unsigned j = 0; j < count; ++j) {
      if (!(exchange.lanes >> j & 1)) continue;
      Thread& lane = lanes[j];
      if (state == State::shuffle && !(exchange.lanes >> (lane.argument & 31) & 1)) {
        fail(block, &lane,
             "shuffle from lane " + std::to_string(lane.argument) +
                 ", which takes no part (mask, early return or short last warp)");
      }
      if (lane.combine) lane.result = lane.combine(exchange, lane.argument);
    }
    for (unsigned j = 0; j < count; ++j) {
      if (exchange.lanes >> j & 1) lanes[j].state = State::running;
    }
    block.generation[1 + warp]++;
    any = true;
  }
  return any;
}

// Lets the block pass the barrier at which its threads have come to rest; false when all have returned.
CUDA_EMULATOR_RAW inline bool resolve_block(Block& block, bool strict) {
  const Thread* first = nullptr;
  unsigned waiting = 0, returned = 0;
  std::uint64_t votes = 0;
  bool same_place = true;
  for (unsigned i = 0; i < block.size; ++i) {
    const Thread& thread = block.threads[i];
    if (thread.state == State::stopped) fail(block, &thread, thread.problem);
    returned += thread.state == State::returned;
    if (thread.state != State::block_barrier) continue;
    if (!first) first = &thread;
    ++waiting;
    votes += thread.value != 0;
    same_place &= is_same(thread.where, first->where);
  }
  if (waiting + returned != block.size) fail(block, nullptr, "deadlock");
  if (strict && waiting && returned) fail(block, nullptr, "__syncthreads missed by threads that have returned");
  if (strict && !same_place) fail(block, nullptr, "threads of one block wait at different __syncthreads");
  for (unsigned i = 0; i < block.size; ++i) {
    Thread& thread = block.threads[i];
    if (thread.state != State::block_barrier) continue;
    thread.result = votes;
    thread.state = State::running;
  }
  block.generation[0]++;
  return waiting != 0;
}

// Runs one block to its end; warps and lanes in the given orders.
CUDA_EMULATOR_RAW inline void run_block(Block& block, const unsigned* warp_order, const unsigned* lane_order,
                                        bool strict) {
  block.lane_order = lane_order;
  for (unsigned i = 0; i < block.size; ++i) {
    Thread& thread = block.threads[i];
    prepare(thread.fiber, thread_main);
    thread.state = State::running;
    thread.copies.clear(), thread.groups = 0;
#if defined(__SANITIZE_THREAD__)
    thread.fiber.tsan = tsan_fiber_pool.take();
#endif
  }
#if defined(__SANITIZE_THREAD__)
  block.scheduler.fiber.tsan = __tsan_get_current_fiber();
  __tsan_release(&block);
#endif
  const unsigned warps = (block.size + 31) / 32;
  do {
    for (unsigned w = 0; w < warps; ++w) {
      block.warp = warp_order[w];
      do {
        block.position = 0;
        Thread& thread = block.next();
        if (&thread != &block.scheduler) resume(block.scheduler, thread);
      } while (resolve_warp(block, block.warp));
    }
  } while (resolve_block(block, strict));
}

}  // namespace cuda_emulator
