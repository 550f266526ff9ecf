// Shared memory: how __shared__ is declared, and how it is filled with NaN before every block.
#pragma once

#include <link.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "configuration.h"
#include "fiber.h"

// A block's static shared memory is a static variable: blocks run one after another.
//
// It is thread_local, because that puts the arrays of a module next to each other, in its thread-local storage, where
// they can be refilled before every block. Other thread_local variables of the module are overwritten too, so emulated
// kernels belong in a shared library of their own. Under ThreadSanitizer, where every block has an OS thread of its
// own, the arrays also start without history. AddressSanitizer puts red zones only around plain variables, so there
// the arrays are not thread_local, and keep what the block before has left in them.
#undef __shared__
#if defined(__SANITIZE_ADDRESS__)
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

namespace cuda_emulator {

inline constexpr unsigned char poison = 0xff;  // NaN in every floating-point format, -1 in every signed integer

#if !defined(__SANITIZE_ADDRESS__)
inline thread_local char module_anchor = 0;  // lies in the thread-local storage of the kernels' module

inline void poison_static_shared_memory() {
  dl_iterate_phdr(
      [](dl_phdr_info* module, std::size_t, void*) {
        auto* const start = static_cast<char*>(module->dlpi_tls_data);
        for (int i = 0; start != nullptr && i < module->dlpi_phnum; ++i) {
          const auto& header = module->dlpi_phdr[i];
          if (header.p_type != PT_TLS) continue;
          if (&module_anchor < start || &module_anchor >= start + header.p_memsz) continue;
          std::memset(start, poison, header.p_memsz);
          return 1;
        }
        return 0;
      },
      nullptr);
}
#else
inline void poison_static_shared_memory() {}
#endif

// A block's dynamic shared memory, between two zones that tell whether something was written past its ends.
class DynamicSharedMemory {
 public:
  explicit DynamicSharedMemory(std::size_t bytes) : bytes_(bytes) {
    if (bytes_ == 0) return;
    memory_ = static_cast<unsigned char*>(std::aligned_alloc(16, (bytes_ + 2 * zone + 15) / 16 * 16));
    if (memory_ == nullptr) throw std::bad_alloc();
    std::memset(memory_, canary, bytes_ + 2 * zone);
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(memory_, zone);
    ASAN_POISON_MEMORY_REGION(memory_ + zone + bytes_, zone);
#endif
  }
  ~DynamicSharedMemory() {
#if defined(__SANITIZE_ADDRESS__)
    if (memory_) ASAN_UNPOISON_MEMORY_REGION(memory_, bytes_ + 2 * zone);
#endif
    std::free(memory_);
  }
  DynamicSharedMemory(const DynamicSharedMemory&) = delete;
  DynamicSharedMemory& operator=(const DynamicSharedMemory&) = delete;

  void* get() const { return memory_ ? memory_ + zone : nullptr; }

  void fill_with_poison() {
    if (memory_) std::memset(get(), poison, bytes_);
  }

  // Whether the block has written past either end. AddressSanitizer reports the access itself.
  CUDA_EMULATOR_RAW bool overrun() const {
#if !defined(__SANITIZE_ADDRESS__)
    for (std::size_t i = 0; memory_ && i < zone; ++i) {
      if (memory_[i] != canary || memory_[zone + bytes_ + i] != canary) return true;
    }
#endif
    return false;
  }

 private:
  static constexpr std::size_t zone = 256;
  static constexpr unsigned char canary = 0xa5;

  std::size_t bytes_;
  unsigned char* memory_ = nullptr;
};

}  // namespace cuda_emulator
