// A library that was linked with a later glibc runs with 2.28, too, as the tag manylinux_2_28 of a wheel promises.
#include <features.h>

#if defined(__GLIBC__) && defined(__x86_64__)

extern "C" {

// libstdc++ asks it, where glibc has it (2.32), whether a shared count may do without atomics.  Here it never may.
__attribute__((visibility("hidden"))) extern char __libc_single_threaded;
char __libc_single_threaded = 0;

// Since 2.29 under a second version, which sets errno in another way; the value is the same.  The linker sends every call
// here (setup.py).
__asm__(".symver rk_log, log@GLIBC_2.2.5");
__asm__(".symver rk_pow, pow@GLIBC_2.2.5");
double rk_log(double);
double rk_pow(double, double);
__attribute__((visibility("hidden"))) double __wrap_log(double x) { return rk_log(x); }
__attribute__((visibility("hidden"))) double __wrap_pow(double x, double y) { return rk_pow(x, y); }

}  // extern "C"

#endif
