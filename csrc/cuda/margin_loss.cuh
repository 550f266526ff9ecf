// The kernels of margin_loss.  Formulas: math/margin_loss.h.  A warp to a row: the lanes' leaders meet in a tree.
#pragma once

#include <cstdint>

#include "../math/margin_loss.h"
#include "vector.cuh"

namespace rk::cuda {

constexpr unsigned kMarginThreads = 128;  // four rows at a time

template <class S>
struct MarginCall {
  using A = accumulation_t<S>;
  std::int64_t rows;
  int classes;
  Margin kind;
  const S* logits;                       // [rows, classes]
  const std::int64_t *target, *towards;  // [rows]; towards null: the best class but target
  A* loss;                               // [rows]
  S* slopes;                             // [rows, classes]
};

template <class S>
__global__ void __launch_bounds__(128, 1) margin_loss_kernel(const MarginCall<S> c) {
  using A = accumulation_t<S>;
  constexpr unsigned all = 0xffffffffu;
  const int lane = threadIdx.x % 32;
  const std::int64_t warps = std::int64_t{gridDim.x} * (blockDim.x / 32);
  for (std::int64_t row = blockIdx.x * std::int64_t{blockDim.x / 32} + threadIdx.x / 32; row < c.rows; row += warps) {
    const S* const z = c.logits + row * c.classes;
    Leaders<A> best;
    A poison = A(0);
    for (int k = lane; k < c.classes; k += 32) {
      const A v = load(z[k]);
      best.meet(v, k);
      poison = v == v ? poison : v;
    }
#pragma unroll
    for (int d = 16; d; d /= 2) {
      A value[4];
      int index[4];
      for (int k = 0; k < 4; ++k) {
        value[k] = __shfl_xor_sync(all, best.value[k], d);
        index[k] = __shfl_xor_sync(all, static_cast<int>(best.index[k]), d);
      }
      for (int k = 0; k < 4; ++k)
        if (index[k] >= 0) best.meet(value[k], index[k]);
      poison += __shfl_xor_sync(all, poison, d);
    }
    const std::int64_t y = c.target[row];
    const std::int64_t o = c.towards ? c.towards[row] : best.index[best.index[0] == y ? 1 : 0];
    const bool exist = y >= 0 && y < c.classes && o >= 0 && o < c.classes;
    if (!exist) poison = A(NAN);
    const MarginSlopes<A> s(c.kind, best, y, exist ? load(z[y]) : A(0), o, exist ? load(z[o]) : A(0),
                            c.towards != nullptr);
    if (lane == 0) c.loss[row] = s.loss + poison;
    for (int k = lane; k < c.classes; k += 32) c.slopes[row * c.classes + k] = store<S>(s.at(k) + poison);
  }
}

template <class S>
struct MarginBackwardCall {
  using A = accumulation_t<S>;
  std::int64_t elements, classes;
  const A* grad;  // [rows]
  const S* slopes;
  S* result;
};

template <class S>
__global__ void __launch_bounds__(256, 1) margin_loss_backward_kernel(const MarginBackwardCall<S> c) {
  for (std::int64_t j = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; j < c.elements;
       j += std::int64_t{gridDim.x} * blockDim.x)
    c.result[j] = store<S>(c.grad[j / c.classes] * load(c.slopes[j]));
}

template <class S>
cudaError_t launch_margin_loss(const MarginCall<S>& c, cudaStream_t stream) {
  constexpr std::int64_t rows = kMarginThreads / 32;
  return launch(margin_loss_kernel<S>, grid_for((c.rows + rows - 1) / rows), dim3(kMarginThreads), 0, stream, c);
}

template <class S>
cudaError_t launch_margin_loss_backward(const MarginBackwardCall<S>& c, cudaStream_t stream) {
  return launch(margin_loss_backward_kernel<S>, grid_for((c.elements + 255) / 256), dim3(256), 0, stream, c);
}

}  // namespace rk::cuda
