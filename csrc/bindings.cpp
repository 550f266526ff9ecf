// The Python module robustkern._C: importing it registers the operators of ops.cpp and their CPU kernels; it answers
// what it was built with.
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030A0000  // one binary for every Python
#endif
#include <Python.h>

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

PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s,s:s,s:s,s:s,s:s}", "version", RK_VERSION, "torch", RK_TORCH_VERSION, "compiler",
                       compiler().c_str(), "compiled_for", RK_MULTIVERSION_NAMES, "cpu_runs", vector_level().c_str());
}

PyMethodDef methods[] = {{"build_info", build_info, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};

PyModuleDef module{PyModuleDef_HEAD_INIT,
                   "_C",
                   "Operator schemas and CPU kernels of robustkern.",
                   -1,
                   methods,
                   nullptr,
                   nullptr,
                   nullptr,
                   nullptr};

}  // namespace

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() { return PyModule_Create(&module); }
