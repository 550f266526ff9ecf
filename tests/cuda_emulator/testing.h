// What the C++ tests of kernels share: options, buffers of exact size and alignment, comparisons.
//
// A test program prints what went wrong and ends with 0 (all right), 1 (a wrong result) or 2 (a report of the emulator);
// sanitizers end it in their own way.
#pragma once

#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "launch.cuh"

namespace testing {

inline double to_double(double v) { return v; }
inline double to_double(float v) { return v; }
inline double to_double(__half v) { return __half2float(v); }
inline double to_double(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
T from_double(double v) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(static_cast<float>(v));
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(static_cast<float>(v));
  } else {
    return static_cast<T>(v);
  }
}

// The distance from 1 to the next number.
template <class T>
constexpr double epsilon() {
  if constexpr (std::is_same_v<T, __half>) {
    return 0x1p-10;
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return 0x1p-7;
  } else {
    return std::numeric_limits<T>::epsilon();
  }
}

// A tensor in words.
template <class S>
std::string shape_of(std::initializer_list<std::int64_t> sizes) {
  std::string text;
  for (const std::int64_t size : sizes) text += (text.empty() ? "[" : ",") + std::to_string(size);
  return text + "] as " + std::to_string(sizeof(S)) + " bytes";
}

[[noreturn]] inline void fail_usage(const std::string& problem) {
  std::printf("%s\n", problem.c_str());
  std::exit(3);
}

// `count` elements that start `offset` elements behind an address divisible by 16. AddressSanitizer guards both ends.
// Filled with NaN, so that an element that no kernel writes is a wrong result.
template <class T>
class Buffer {
 public:
  explicit Buffer(std::size_t count, std::size_t offset = 0)
      : count_(count), bytes_((count + offset) * sizeof(T)), memory_(new unsigned char[bytes_]) {
    data_ = reinterpret_cast<T*>(memory_.get()) + offset;
    fill_with_nan();
  }
  void fill_with_nan() { std::memset(memory_.get(), 0xff, bytes_); }
  std::string bytes() const { return std::string(reinterpret_cast<const char*>(memory_.get()), bytes_); }
  T* data() { return data_; }
  const T* data() const { return data_; }
  std::size_t size() const { return count_; }
  T& operator[](std::size_t i) { return data_[i]; }
  const T& operator[](std::size_t i) const { return data_[i]; }

  void fill_normal(std::mt19937& random, double deviation = 1.0) {
    std::normal_distribution<double> normal(0.0, deviation);
    for (std::size_t i = 0; i < count_; ++i) data_[i] = from_double<T>(normal(random));
  }

 private:
  std::size_t count_, bytes_;
  std::unique_ptr<unsigned char[]> memory_;
  T* data_;
};

// Address space for rows x cols elements of which only the last row is memory: any other access is a crash. As much
// again lies before it, so that an offset that wrapped around to a negative number falls in there.
template <class T>
class LastRowOnly {
 public:
  LastRowOnly(std::int64_t rows, std::int64_t cols) : bytes_(static_cast<std::size_t>(rows) * cols * sizeof(T)) {
    void* const space = mmap(nullptr, 2 * bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (space == MAP_FAILED) {
      fail_usage("no address space for the probe of a huge grid");
    }
    space_ = static_cast<char*>(space);
    last_row_ = data() + (rows - 1) * cols;
    const auto page = std::uintptr_t{4096};
    const auto start = reinterpret_cast<std::uintptr_t>(last_row_) / page * page;
    const auto end = reinterpret_cast<std::uintptr_t>(space_) + 2 * bytes_;
    mprotect(reinterpret_cast<void*>(start), end - start, PROT_READ | PROT_WRITE);
  }
  ~LastRowOnly() { munmap(space_, 2 * bytes_); }
  LastRowOnly(const LastRowOnly&) = delete;
  LastRowOnly& operator=(const LastRowOnly&) = delete;

  T* data() const { return reinterpret_cast<T*>(space_ + bytes_); }
  T* last_row() const { return last_row_; }

 private:
  std::size_t bytes_;
  char* space_;
  T* last_row_;
};

// While in scope, a grid begins with this block, so that the last of too many to run can be run alone.
struct FirstBlock {
  explicit FirstBlock(std::uint64_t block) { cuda_emulator::configuration().first_block = block; }
  ~FirstBlock() { cuda_emulator::configuration().first_block = 0; }
};

inline int checks = 0, failures = 0;

inline void report(const std::string& what, double got, double want) {
  if (++failures <= 5) std::printf("wrong result: %s is %.9g, not %.9g\n", what.c_str(), got, want);
}

// |got - want| <= tolerance, and neither is NaN.
inline void expect_close(double got, double want, double tolerance, const std::string& what) {
  ++checks;
  if (!(std::fabs(got - want) <= tolerance) && !(std::isinf(want) && got == want)) report(what, got, want);
}

inline void expect_nan(double got, const std::string& what) {
  ++checks;
  if (!std::isnan(got)) report(what, got, std::nan(""));
}

// The launch went through; if not, nothing after it makes sense.
inline void expect_success(cudaError_t status) {
  ++checks;
  if (status == cudaSuccess) return;
  std::printf("%s\n", cudaGetErrorString(status));
  std::fflush(stdout);
  std::_Exit(2);
}

struct Options {
  int rounds = 20;             // --rounds N: random shapes to try
  int order = -1;              // --order N: one order of execution; by default four take turns
  bool huge = false;           // --huge: also the last block of a grid too large to run
  std::uint32_t seed = 1;      // --seed N: of the random shapes
  std::string plant = "none";  // --plant NAME: a bug, where the tests are of kernels that have some

  Options(int argc, char** argv) {
    for (int i = 1; i < argc; ++i) {
      const std::string name = argv[i];
      if (name == "--huge") {
        huge = true;
      } else if (i + 1 < argc && name == "--rounds") {
        rounds = std::atoi(argv[++i]);
      } else if (i + 1 < argc && name == "--order") {
        order = std::atoi(argv[++i]);
      } else if (i + 1 < argc && name == "--seed") {
        seed = static_cast<std::uint32_t>(std::atoi(argv[++i]));
      } else if (i + 1 < argc && name == "--plant") {
        plant = argv[++i];
      } else {
        fail_usage(std::string("usage: ") + argv[0] + " [--rounds N] [--order N] [--seed N] [--plant NAME] [--huge]");
      }
    }
  }
};

// Random choices of a test.
struct Draw {
  std::mt19937 random;

  int operator()(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); }
  template <class T>
  T one_of(std::initializer_list<T> values) {
    return values.begin()[(*this)(0, static_cast<int>(values.size()) - 1)];
  }
};

// Runs `call` in four orders of execution; what it leaves in the buffers must be the same to the last bit.
template <class Call, class... Buffers>
void run_in_all_orders(const Options& options, const std::string& what, const Call& call, Buffers&... outputs) {
  cuda_emulator::configuration().order = options.order >= 0 ? options.order : cuda_emulator::forward;
  expect_success(call());
  if (options.order >= 0) return;
  const auto first = std::make_tuple(outputs.bytes()...);
  for (const int order : {1, 2, 3}) {
    cuda_emulator::configuration().order = order;
    (outputs.fill_with_nan(), ...);
    expect_success(call());
    ++checks;
    if (std::make_tuple(outputs.bytes()...) != first) report(what + " in order " + std::to_string(order), 1, 0);
  }
}

inline int finish() {
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures != 0;
}

}  // namespace testing
