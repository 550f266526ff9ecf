// Products of float32 matrices on CPUs for which PyTorch's BLAS has no kernels of full width.
#pragma once

#include <ATen/ATen.h>

namespace rk::aten {

// Whether there is anything to gain: PyTorch calls MKL, which on CPUs of other makers than Intel computes with half of
// their vectors, while oneDNN, which PyTorch is linked with too, uses all of AVX-512.
bool has_faster_matmul();

// a b for a [M, R] and b [R, N].  A few shapes are computed here, those of a layer that is applied to many rows: the
// layer's output and its input's gradient (many M), its weight's gradient (many R).  All others are at::mm's.
// Every bit is independent of the number of threads.  Below autograd.
at::Tensor matrix_product(const at::Tensor& a, const at::Tensor& b);

}  // namespace rk::aten
