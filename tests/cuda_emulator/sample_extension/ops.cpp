// A one-operator extension that tests build.py: does an emulated kernel's error reach Python, and does
// AddressSanitizer see a kernel that leaves a tensor?
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(emulator_sample, m) { m.def("double_rows(Tensor x, int bug) -> Tensor"); }
