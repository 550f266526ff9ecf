// Launches: the checks that CUDA makes, the order of the blocks, and the part of the CUDA runtime that hosts use.
#pragma once

#include <driver_types.h>
#include <vector_types.h>

#include <cstdio>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <thread>
#endif

#include "record.h"
#include "scheduler.h"

namespace cuda_emulator {

inline void check_launch_configuration(dim3 grid, dim3 block, std::size_t dynamic_shared) {
  auto text = [](dim3 d) {
    return "(" + std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z) + ")";
  };
  const auto threads = std::uint64_t{block.x} * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535) {
    throw Error("invalid grid " + text(grid) + ": every dimension is at least 1, x at most 2147483647, y and z 65535");
  }
  if (threads == 0 || threads > 1024 || block.z > 64) {
    throw Error("invalid block " + text(block) + ": 1 to 1024 threads, at most 64 along z");
  }
  const std::size_t limit = configuration().dynamic_shared_limit;
  if (dynamic_shared > limit) {
    throw Error(std::to_string(dynamic_shared) + " bytes of dynamic shared memory: the limit is " +
                std::to_string(limit));
  }
}

// SplitMix64: enough randomness for an order of execution, the same with every standard library.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t below(std::uint64_t bound) {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (z ^ (z >> 31)) % bound;
  }

 private:
  std::uint64_t state_;
};

// The order of `count` blocks. A random one is a bijection without a table, so that it serves grids of any size.
class BlockOrder {
 public:
  BlockOrder(std::uint64_t count, int order, Random& random) : count_(count), order_(order) {
    if (order_ <= reverse) return;
    offset_ = random.below(count_);
    do factor_ = 1 + random.below(count_);
    while (greatest_common_divisor(factor_, count_) != 1);
  }
  std::uint64_t operator[](std::uint64_t i) const {
    if (order_ == forward) return i;
    if (order_ == reverse) return count_ - 1 - i;
    return static_cast<std::uint64_t>((static_cast<unsigned __int128>(i) * factor_ + offset_) % count_);
  }

 private:
  static std::uint64_t greatest_common_divisor(std::uint64_t a, std::uint64_t b) {
    while (b != 0) a = std::exchange(b, a % b);
    return a;
  }

  std::uint64_t count_, factor_ = 1, offset_ = 0;
  int order_;
};

// The order of a block's warps, or of a warp's lanes.
class TurnOrder {
 public:
  TurnOrder(unsigned count, int order) : order_(order), turns_(count) {
    for (unsigned i = 0; i < count; ++i) turns_[i] = order == reverse ? count - 1 - i : i;
  }
  void next_block(Random& random) {
    for (std::size_t i = turns_.size(); order_ > reverse && i > 1; --i)
      std::swap(turns_[i - 1], turns_[random.below(i)]);
  }
  const unsigned* data() const { return turns_.data(); }

 private:
  int order_;
  std::vector<unsigned> turns_;
};

// Stacks for `count` threads. Kept from launch to launch, except under ThreadSanitizer: there, unmapping them after
// each block is what clears its record of them.
inline std::shared_ptr<Stacks> stacks_for(std::size_t count) {
  const std::size_t bytes = configuration().stack_bytes;
#if defined(__SANITIZE_THREAD__)
  return std::make_shared<Stacks>(count, bytes);
#else
  static std::shared_ptr<Stacks> kept;
  if (!kept || kept->count() < count || kept->stack_bytes() < bytes) kept = std::make_shared<Stacks>(count, bytes);
#if defined(__SANITIZE_ADDRESS__)
  for (std::size_t i = 0; i < count; ++i) {  // frames that an error left behind
    ASAN_UNPOISON_MEMORY_REGION(kept->stack(i), kept->stack_bytes());
  }
#endif
  return kept;
#endif
}

inline void run_block_at(Block& block, std::uint64_t linear_index, const unsigned* warp_order,
                         const unsigned* lane_order) {
  const dim3 grid = block.grid;
  block.index = {static_cast<unsigned>(linear_index % grid.x), static_cast<unsigned>(linear_index / grid.x % grid.y),
                 static_cast<unsigned>(linear_index / (std::uint64_t{grid.x} * grid.y))};
  block.dynamic_shared.fill_with_poison();
  poison_static_shared_memory();
  run_block(block, warp_order, lane_order, configuration().strict);
  if (block.dynamic_shared.overrun()) fail(block, nullptr, "dynamic shared memory was written past its ends");
}

#if defined(__SANITIZE_THREAD__)
// Orders what the host does next after threads that an error has left inside the kernel.
CUDA_EMULATOR_RAW inline void abandon(Block& block) {
  void* const self = __tsan_get_current_fiber();
  for (unsigned i = 0; i < block.size; ++i) {
    if (block.threads[i].state == State::returned) continue;
    __tsan_switch_to_fiber(block.threads[i].fiber.tsan, __tsan_switch_to_fiber_no_sync);
    __tsan_release(const_cast<Kernel*>(&block.kernel));
    __tsan_switch_to_fiber(self, __tsan_switch_to_fiber_no_sync);
  }
}
#endif

// Runs `kernel` once for every thread of the grid; throws Error. One kernel at a time, as in one stream.
inline void run_grid(dim3 grid, dim3 dimensions, std::size_t dynamic_shared, const Kernel& kernel) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  check_launch_configuration(grid, dimensions, dynamic_shared);

  const Configuration& options = configuration();
  const std::uint64_t all = std::uint64_t{grid.x} * grid.y * grid.z;
  const std::uint64_t first = options.first_block, end = options.end_block < all ? options.end_block : all;
  if (end <= first) return;
  const unsigned threads = dimensions.x * dimensions.y * dimensions.z;

  Random random(static_cast<std::uint64_t>(options.order));
  const BlockOrder blocks(end - first, options.order, random);
  TurnOrder warps((threads + 31) / 32, options.order), lanes(32, options.order);

#if defined(__SANITIZE_THREAD__)
  constexpr std::uint64_t most = 8000;  // TSan's table of threads ends at 8128
  if ((end - first) * threads > most) {
    throw Error("ThreadSanitizer can follow 8000 CUDA threads in one launch, not " +
                std::to_string((end - first) * threads));
  }
  tsan_fiber_pool.give_back_all();
  // Every block has an OS thread, stacks and fibers of its own, so that nothing orders it with other blocks. The
  // blocks are kept to the end, lest one get the address, and with it the history, of an earlier one.
  std::vector<std::unique_ptr<Block>> kept;
  for (std::uint64_t i = 0; i < end - first; ++i) {
    warps.next_block(random);
    lanes.next_block(random);
    kept.push_back(std::make_unique<Block>(grid, dimensions, kernel, stacks_for(threads), dynamic_shared));
    Block& block = *kept.back();
    std::exception_ptr error;
    std::thread([&] {
      try {
        run_block_at(block, first + blocks[i], warps.data(), lanes.data());
      } catch (...) {
        error = std::current_exception();
      }
    }).join();
    block.stacks.reset();
    if (error) {
      abandon(block);
      tsan_fiber_pool.abandon_all();
      __tsan_acquire(const_cast<Kernel*>(&kernel));
      std::rethrow_exception(error);
    }
  }
  __tsan_acquire(const_cast<Kernel*>(&kernel));
#else
  Block block(grid, dimensions, kernel, stacks_for(threads), dynamic_shared);
  for (std::uint64_t i = 0; i < end - first; ++i) {
    warps.next_block(random);
    lanes.next_block(random);
    run_block_at(block, first + blocks[i], warps.data(), lanes.data());
  }
#endif
}

// What cudaGetErrorString says of the last error. A plain array, since anything thread_local is overwritten.
inline char last_report[16384] = "";

// run_grid with the manners of the CUDA runtime: an error code instead of an exception.
template <class... Parameters>
cudaError_t launch(dim3 grid, dim3 block, std::size_t dynamic_shared, void (*kernel)(Parameters...),
                   std::tuple<Parameters...>& values) {
  try {
    if (Record::wanted()) {
      check_launch_configuration(grid, block, dynamic_shared);
      Record record(reinterpret_cast<const void*>(kernel), grid, block, dynamic_shared);
      std::apply([&](const auto&... value) { (record.add(&value, sizeof value, alignof(decltype(value))), ...); },
                 values);
      return cudaSuccess;
    }
    auto call = [&] { std::apply(kernel, values); };
    run_grid(grid, block, dynamic_shared, Kernel(call));
    return cudaSuccess;
  } catch (const std::exception& error) {
    std::snprintf(last_report, sizeof last_report, "CUDA emulator: %s", error.what());
    return cudaErrorLaunchFailure;
  }
}

// The running block's dynamic shared memory, aligned to 16 bytes.
inline void* dynamic_shared_memory() { return current->block->dynamic_shared.get(); }

}  // namespace cuda_emulator

inline const char* cudaGetErrorString(cudaError_t status) {
  if (status == cudaSuccess) return "no error";
  return *cuda_emulator::last_report ? cuda_emulator::last_report : "CUDA error";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }  // launch() has returned the error
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
