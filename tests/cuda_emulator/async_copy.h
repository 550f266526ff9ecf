// The asynchronous copies of csrc/cuda/mma.cuh: they arrive as late as CUDA allows, at the wait that covers them.
//
// Until then the target holds NaN: who reads it too early, or still reads what was there before, gets a wrong result.
// To ThreadSanitizer the thread writes the target twice, at the beginning and at the wait, and reads the source twice. A
// source that differs then, and a target that someone has written meanwhile, are reported.
#pragma once

#include <cstdint>
#include <vector>

#include "warp.h"

namespace cuda_emulator {

inline void copy_async_16(void* shared, const void* global, bool there, CUDA_EMULATOR_CALLER) {
  if ((reinterpret_cast<std::uintptr_t>(shared) | reinterpret_cast<std::uintptr_t>(global)) % 16 != 0) {
    stop("an asynchronous copy from or to an address that is no multiple of 16", where);
  }
  AsyncCopy copy{static_cast<Word*>(shared), there ? static_cast<const Word*>(global) : nullptr, {}, current->groups};
  for (int i : {0, 1}) {
    if (there) copy.begun_with[i] = copy.source[i];
    copy.target[i] = ~Word{0};  // NaN
  }
  current->copies.push_back(copy);
}

inline void copy_async_commit() { ++current->groups; }

// Lets the thread's copies arrive, but not those of the newest `pending` groups, nor those of none.
inline void let_copies_arrive(unsigned pending, const Location& where) {
  Thread& thread = *current;
  std::erase_if(thread.copies, [&](const AsyncCopy& copy) {
    if (copy.group + pending >= thread.groups) return false;
    for (int i : {0, 1}) {
      const Word value = copy.source ? copy.source[i] : 0;
      if (value != copy.begun_with[i]) stop("the source of an asynchronous copy has changed on the way", where);
      if (copy.target[i] != ~Word{0}) stop("the target of an asynchronous copy was written on the way", where);
      copy.target[i] = value;
    }
    return true;
  });
}

template <int kPending>
void copy_async_wait(CUDA_EMULATOR_CALLER) {
  let_copies_arrive(kPending, where);
}

}  // namespace cuda_emulator
