// Barriers and warp-wide functions. Each takes the place of its call from the compiler, for reports.
//
// To add a warp-wide function, write what a lane takes home as a Combine: a function of the values that all lanes
// have brought and of one integer of its own.
#pragma once

#include <cstdint>

#include "scheduler.h"

namespace cuda_emulator {

template <class T>
std::uint64_t pack(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>, "warp functions move at most 8 bytes a lane");
  std::uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T unpack(std::uint64_t bits) {
  T value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline int lane_index() {
  const Thread& thread = *current;
  return static_cast<int>(&thread - thread.block->threads) & 31;
}

template <class T>
T shuffle(std::uint32_t mask, T value, int source, const Location& where) {
  constexpr Combine read = [](const Exchange& exchange, int lane) { return exchange.value[lane & 31]; };
  return unpack<T>(wait(State::shuffle, mask, pack(value), source, read, where));
}

// Folds the lanes' values with `F`, a stateless function object, in lane order.
template <class T, class F>
T reduce(std::uint32_t mask, T value, F, const Location& where) {
  constexpr Combine fold = [](const Exchange& exchange, int) {
    bool started = false;
    T total{};
    for (int lane = 0; lane < 32; ++lane) {
      if (!(exchange.lanes >> lane & 1)) continue;
      const T next = unpack<T>(exchange.value[lane]);
      total = started ? F{}(total, next) : next;
      started = true;
    }
    return pack(total);
  };
  return unpack<T>(wait(State::reduce, mask, pack(value), 0, fold, where));
}

inline std::uint32_t ballot(std::uint32_t mask, bool predicate, const Location& where) {
  constexpr Combine collect = [](const Exchange& exchange, int) {
    std::uint64_t bits = 0;
    for (int lane = 0; lane < 32; ++lane) {
      if (exchange.lanes >> lane & 1) bits |= exchange.value[lane] << lane;
    }
    return bits;
  };
  return static_cast<std::uint32_t>(wait(State::vote, mask, predicate, 0, collect, where));
}

// The lanes whose value equals that of the calling lane.
inline std::uint32_t match(std::uint32_t mask, std::uint64_t value, const Location& where) {
  constexpr Combine compare = [](const Exchange& exchange, int own) {
    std::uint64_t bits = 0;
    for (int lane = 0; lane < 32; ++lane) {
      if ((exchange.lanes >> lane & 1) && exchange.value[lane] == exchange.value[own]) bits |= 1ull << lane;
    }
    return bits;
  };
  return static_cast<std::uint32_t>(wait(State::vote, mask, value, lane_index(), compare, where));
}

// Waits for the block; the number of threads whose predicate holds.
inline unsigned block_barrier(bool predicate, const Location& where) {
  return static_cast<unsigned>(wait(State::block_barrier, 0, predicate, 0, nullptr, where));
}

}  // namespace cuda_emulator

#define CUDA_EMULATOR_CALLER ::cuda_emulator::Location where = ::cuda_emulator::Location::current()

inline void __syncthreads(CUDA_EMULATOR_CALLER) { cuda_emulator::block_barrier(false, where); }
inline int __syncthreads_count(int predicate, CUDA_EMULATOR_CALLER) {
  return static_cast<int>(cuda_emulator::block_barrier(predicate != 0, where));
}
inline int __syncthreads_or(int predicate, CUDA_EMULATOR_CALLER) {
  return cuda_emulator::block_barrier(predicate != 0, where) != 0;
}
inline int __syncthreads_and(int predicate, CUDA_EMULATOR_CALLER) {
  return cuda_emulator::block_barrier(predicate == 0, where) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_EMULATOR_CALLER) {
  cuda_emulator::wait(cuda_emulator::State::warp_barrier, mask, 0, 0, nullptr, where);
}

// Shuffles. Lanes that would read outside their group of `width` keep their own value, as in CUDA.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, CUDA_EMULATOR_CALLER) {
  const int group = cuda_emulator::lane_index() & ~(width - 1);
  return cuda_emulator::shuffle(mask, value, group + (source & (width - 1)), where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize, CUDA_EMULATOR_CALLER) {
  const int lane = cuda_emulator::lane_index(), source = lane ^ bits;
  return cuda_emulator::shuffle(mask, value, source / width > lane / width ? lane : source, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, CUDA_EMULATOR_CALLER) {
  const int lane = cuda_emulator::lane_index(), source = lane + static_cast<int>(delta);
  return cuda_emulator::shuffle(mask, value, source / width != lane / width ? lane : source, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, CUDA_EMULATOR_CALLER) {
  const int lane = cuda_emulator::lane_index(), source = lane - static_cast<int>(delta);
  return cuda_emulator::shuffle(mask, value, source < (lane & ~(width - 1)) ? lane : source, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_EMULATOR_CALLER) {
  return cuda_emulator::ballot(mask, predicate != 0, where);
}
inline int __any_sync(unsigned mask, int predicate, CUDA_EMULATOR_CALLER) {
  return cuda_emulator::ballot(mask, predicate != 0, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_EMULATOR_CALLER) {
  return cuda_emulator::ballot(mask, predicate == 0, where) == 0;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, CUDA_EMULATOR_CALLER) {
  return cuda_emulator::match(mask, cuda_emulator::pack(value), where);
}

#define CUDA_EMULATOR_REDUCE(name, type, expression)                                                     \
  inline type name(unsigned mask, type value, CUDA_EMULATOR_CALLER) {                                    \
    return cuda_emulator::reduce(mask, value, [](type a, type b) -> type { return expression; }, where); \
  }
CUDA_EMULATOR_REDUCE(__reduce_add_sync, unsigned, a + b)
CUDA_EMULATOR_REDUCE(__reduce_add_sync, int, static_cast<int>(static_cast<unsigned>(a) + static_cast<unsigned>(b)))
CUDA_EMULATOR_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
CUDA_EMULATOR_REDUCE(__reduce_min_sync, int, a < b ? a : b)
CUDA_EMULATOR_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
CUDA_EMULATOR_REDUCE(__reduce_max_sync, int, a > b ? a : b)
CUDA_EMULATOR_REDUCE(__reduce_and_sync, unsigned, a& b)
CUDA_EMULATOR_REDUCE(__reduce_or_sync, unsigned, a | b)
CUDA_EMULATOR_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef CUDA_EMULATOR_REDUCE

[[noreturn]] inline void __trap(CUDA_EMULATOR_CALLER) { cuda_emulator::stop("__trap", where); }
