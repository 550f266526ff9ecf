// What a test can set, and the emulator's one kind of error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <string>

namespace cuda_emulator {

// A kernel or a launch did what CUDA does not allow. launch() turns it into an error code.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The order in which blocks, the warps of a block and the lanes of a warp take their turns.
enum : int { forward = 0, reverse = 1 };  // any greater number is the seed of a random order

// The environment variable holds `forward`, `reverse` or a seed; unset means forward.
inline int order_from_environment(const char* variable = "ROBUSTKERN_EMULATOR_ORDER") {
  const char* const value = std::getenv(variable);
  if (value == nullptr || *value == '\0') return forward;
  const std::string text = value;
  if (text == "forward") return forward;
  if (text == "reverse") return reverse;
  char* end = nullptr;
  const long seed = std::strtol(value, &end, 10);
  if (*end != '\0' || seed < 0 || seed > std::numeric_limits<int>::max()) {
    throw Error(std::string(variable) + " must be forward, reverse or a number, got '" + text + "'");
  }
  return static_cast<int>(seed);
}

struct Configuration {
  int order = order_from_environment();
  // Only blocks first_block <= linear index < end_block are run: probes of grids too large to run whole.
  std::uint64_t first_block = 0, end_block = std::numeric_limits<std::uint64_t>::max();
  // Whether threads that returned, or that wait at another __syncthreads, are an error. Volta and later let both pass.
  bool strict = true;
  std::size_t stack_bytes = std::size_t{128} << 10;           // of each CUDA thread
  std::size_t dynamic_shared_limit = std::size_t{227} << 10;  // of a block, on sm_90
};

inline Configuration& configuration() {
  static Configuration instance;
  return instance;
}

}  // namespace cuda_emulator
