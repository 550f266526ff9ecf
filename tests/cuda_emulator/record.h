// Launches written down instead of run, for whoever wants to know how a launcher divides its work.
//
// With ROBUSTKERN_EMULATOR_RECORD=<file> each launch adds a line to it: the kernel's mangled name, "?" if the library
// hides it, the three numbers of its grid and of its block, bytes of dynamic shared memory, and its parameters as they
// lie in memory, in hexadecimal digits.
#pragma once

#include <dlfcn.h>
#include <vector_types.h>

#include <cstdio>
#include <cstdlib>
#include <string>

namespace cuda_emulator {

class Record {
 public:
  static const char* wanted() { return std::getenv("ROBUSTKERN_EMULATOR_RECORD"); }

  Record(const void* kernel, dim3 grid, dim3 block, std::size_t dynamic_shared) {
    Dl_info info{};
    const char* const name = dladdr(kernel, &info) && info.dli_sname ? info.dli_sname : "?";
    line_ = name;
    for (const std::size_t number : {std::size_t{grid.x}, std::size_t{grid.y}, std::size_t{grid.z},
                                     std::size_t{block.x}, std::size_t{block.y}, std::size_t{block.z}, dynamic_shared})
      line_ += " " + std::to_string(number);
    line_ += " ";
  }
  Record(const Record&) = delete;
  Record& operator=(const Record&) = delete;
  ~Record() {
    std::FILE* const file = std::fopen(wanted(), "a");
    if (!file) return;
    std::fprintf(file, "%s\n", line_.c_str());
    std::fclose(file);
  }

  // The next parameter, where CUDA puts it.
  void add(const void* value, std::size_t size, std::size_t alignment) {
    while (bytes_ % alignment != 0) add_byte(0);
    for (std::size_t i = 0; i < size; ++i) add_byte(static_cast<const unsigned char*>(value)[i]);
  }

 private:
  void add_byte(unsigned char byte) {
    constexpr const char* digits = "0123456789abcdef";
    line_ += {digits[byte / 16], digits[byte % 16]};
    ++bytes_;
  }

  std::string line_;
  std::size_t bytes_ = 0;
};

}  // namespace cuda_emulator
