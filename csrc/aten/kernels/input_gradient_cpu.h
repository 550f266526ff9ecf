// The gradient of a convolution in its input, on the CPU, for few input channels: a first layer's, patch embeddings included.
#pragma once

#include <ATen/ATen.h>

namespace rk::aten {

// One dimension of a convolution without dilation.
struct ConvolutionAxis {
  int64_t in, out, kernel, stride, padding;
};

// grad_x [N, C, H, W], in this memory format, from g [N, O, OH, OW] and w [O, C, KH, KW] of one dtype, which is one of the
// four.  Sums are in the accumulation type.  Every bit is independent of N and of the number of threads.
at::Tensor convolution_input_gradient(const at::Tensor& g, const at::Tensor& w, const ConvolutionAxis& height,
                                      const ConvolutionAxis& width, at::MemoryFormat format);

}  // namespace rk::aten
