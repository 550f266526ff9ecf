// The Python module robustkern._C: importing it registers the operators of ops.cpp and their CPU kernels; it answers
// what it was built with.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/simd.h"

#if !defined(RK_TORCH_VERSION) || !defined(RK_VERSION)
#error "setup.py defines RK_VERSION and RK_TORCH_VERSION"
#endif

namespace {

std::string compiler() {
#if defined(__clang__)
  return std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  return std::string("gcc ") + __VERSION__;
#else
  return "unknown";
#endif
}

std::string vector_level() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    return "AVX-512";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "AVX2";
  return "baseline x86-64";
#else
  return "the compiler's default";
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Operator schemas and CPU kernels of robustkern.";
  m.def("build_info", [] {
    pybind11::dict info;
    info["version"] = RK_VERSION;
    info["torch"] = RK_TORCH_VERSION;
    info["compiler"] = compiler();
    info["compiled_for"] = RK_MULTIVERSION_NAMES;
    info["cpu_runs"] = vector_level();
    return info;
  });
}
