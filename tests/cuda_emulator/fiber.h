// Fibers: stacks that one OS thread switches between. A CUDA thread is one fiber, the scheduler another.
//
// On x86-64 a switch is eight pushes and pops, 5 to 20 ns. Elsewhere it is swapcontext, which makes a system call and
// is ten times slower; -DCUDA_EMULATOR_UCONTEXT selects it on x86-64 too. AddressSanitizer and ThreadSanitizer are
// told of every switch.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdlib>
#include <stdexcept>
#include <vector>

#if defined(__has_feature)
#if __has_feature(address_sanitizer) && !defined(__SANITIZE_ADDRESS__)
#define __SANITIZE_ADDRESS__ 1
#endif
#if __has_feature(thread_sanitizer) && !defined(__SANITIZE_THREAD__)
#define __SANITIZE_THREAD__ 1
#endif
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

#if !defined(__x86_64__) && !defined(CUDA_EMULATOR_UCONTEXT)
#define CUDA_EMULATOR_UCONTEXT 1
#endif
#if defined(CUDA_EMULATOR_UCONTEXT)
#include <ucontext.h>
#endif

// Marks the emulator's own steps, which no sanitizer may see: the scheduler touches every thread's state without any
// synchronisation that ThreadSanitizer would know. Code so marked must not call instrumented code either, and the
// members of standard containers are instrumented when they are inlined, so it works on raw pointers.
#define CUDA_EMULATOR_RAW __attribute__((no_sanitize("thread", "address", "undefined"), noinline))

namespace cuda_emulator {

struct Fiber {
  char* stack = nullptr;  // lowest address; null for a fiber that runs on an OS thread's own stack
  std::size_t stack_bytes = 0;
#if defined(CUDA_EMULATOR_UCONTEXT)
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif
#if defined(__SANITIZE_THREAD__)
  void* tsan = nullptr;
#endif
};

// Memory for equal stacks, each above a guard page.
class Stacks {
 public:
  Stacks(std::size_t count, std::size_t stack_bytes)
      : page_(static_cast<std::size_t>(sysconf(_SC_PAGESIZE))),
        count_(count),
        stack_bytes_((stack_bytes + page_ - 1) / page_ * page_) {
    void* const memory =
        mmap(nullptr, count_ * stride(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("the CUDA emulator found no memory for its stacks");
    memory_ = static_cast<char*>(memory);
    for (std::size_t i = 0; i < count_; ++i) mprotect(memory_ + i * stride(), page_, PROT_NONE);
  }
  ~Stacks() { munmap(memory_, count_ * stride()); }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  std::size_t count() const { return count_; }
  std::size_t stack_bytes() const { return stack_bytes_; }
  char* stack(std::size_t i) const { return memory_ + i * stride() + page_; }

 private:
  std::size_t stride() const { return stack_bytes_ + page_; }

  std::size_t page_, count_, stack_bytes_;
  char* memory_ = nullptr;
};

#if defined(__SANITIZE_THREAD__)
// Creating a TSan fiber takes half a millisecond, so they are kept from launch to launch. Within a launch every CUDA
// thread has its own.
class TsanFiberPool {
 public:
  void* take() {
    if (used_ == fibers_.size()) fibers_.push_back(__tsan_create_fiber(0));
    return fibers_[used_++];
  }
  void give_back_all() { used_ = 0; }
  void abandon_all() { fibers_.clear(), used_ = 0; }  // after an error, when some are inside a kernel

 private:
  std::vector<void*> fibers_;
  std::size_t used_ = 0;
};
inline TsanFiberPool tsan_fiber_pool;
#endif

// Sets `fiber` up to enter `entry` at the first switch to it. `entry` never returns.
CUDA_EMULATOR_RAW inline void prepare(Fiber& fiber, void (*entry)()) {
#if defined(CUDA_EMULATOR_UCONTEXT)
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = fiber.stack_bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#else
  // What jump() pops: six registers of no matter what value, then the address it returns to. That leaves the stack
  // as after a call, 8 bytes off a multiple of 16, with a null return address where debuggers end their backtrace.
  void** top = reinterpret_cast<void**>(fiber.stack + fiber.stack_bytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  fiber.stack_pointer = top - 6;
#endif
}

#if !defined(CUDA_EMULATOR_UCONTEXT)
// Pushes the registers that a call preserves (System V ABI), exchanges the stack pointers, pops the other's registers.
__attribute__((naked, noinline)) inline void jump(void** /*from, rdi*/, void* /*to, rsi*/) {
  asm("pushq %rbp\n\t"
      "pushq %rbx\n\t"
      "pushq %r12\n\t"
      "pushq %r13\n\t"
      "pushq %r14\n\t"
      "pushq %r15\n\t"
      "movq %rsp, (%rdi)\n\t"
      "movq %rsi, %rsp\n\t"
      "popq %r15\n\t"
      "popq %r14\n\t"
      "popq %r13\n\t"
      "popq %r12\n\t"
      "popq %rbx\n\t"
      "popq %rbp\n\t"
      "ret");
}
#endif

// Leaves `from` and goes on in `to`; returns when something switches back. `finished`: nothing ever will.
CUDA_EMULATOR_RAW inline void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool finished) {
#if defined(__SANITIZE_THREAD__)
  // Without this flag a switch would order all that came before it, and no race could be seen.
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(finished ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
#if defined(CUDA_EMULATOR_UCONTEXT)
  swapcontext(&from.context, &to.context);
#else
  jump(&from.stack_pointer, to.stack_pointer);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// The first thing a fiber does. `scheduler` runs on an OS thread's stack, whose bounds AddressSanitizer knows.
CUDA_EMULATOR_RAW inline void enter_fiber([[maybe_unused]] Fiber& scheduler) {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom = nullptr;
  std::size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (scheduler.stack == nullptr) {  // the first fiber is entered from the scheduler, later ones from each other
    scheduler.stack = static_cast<char*>(const_cast<void*>(bottom));
    scheduler.stack_bytes = bytes;
  }
#endif
}

}  // namespace cuda_emulator
