// Kernels of softmax_double_backward.  Formulas: math/softmax.h.
//
// Rows whose classes are adjacent (inner = 1): as in rows.cuh.  Rows side by side, as the pixels of an image: one thread
// each, or two of 16 bits, neighbours reading neighbours.  Both make two sweeps, the second of which finds its row in
// registers or in a cache: device memory is read once, u, grad and output, and written once, gg_grad and grad_output.
#pragma once

#include <cstdint>

#include "../math/softmax.h"
#include "rows.cuh"

namespace rk::cuda {

template <class S>
struct SoftmaxCall {
  std::int64_t batch, classes, inner;
  const S *u, *grad, *output;  // [batch, classes, inner]
  S *gg_grad, *grad_output;    // null: not needed
};

// One element's numbers on the way in and out.
template <bool kLog, class A>
struct SoftmaxElement {
  A p, u, g;

  __device__ __forceinline__ SoftmaxElement(A output, A u, A grad)
      : p(Softmax<kLog, A>::probability(output)), u(u), g(grad) {}

  __device__ __forceinline__ void add_to(A& total_g, A& mean_u) const {
    total_g += Softmax<kLog, A>::total_g_term(p, g);
    mean_u += p * u;
  }
  __device__ __forceinline__ A gg_grad(A mean_u) const { return Softmax<kLog, A>::gg_grad(p, u, mean_u); }
  __device__ __forceinline__ A grad_output(A total_g, A mean_u) const {
    return Softmax<kLog, A>::grad_output(p, u, g, total_g, mean_u);
  }
};

constexpr int kSoftmaxVectors = 2, kSoftmaxInputs = 3;  // vectors of every input in a round

template <bool kLog, Layout kLayout, class S>
__global__ void __launch_bounds__(kMostRowThreads<kLayout, S>, 1)
    softmax_double_backward_rows_kernel(const SoftmaxCall<S> c, const RowRounds rounds) {
  using A = accumulation_t<S>;
  using Element = SoftmaxElement<kLog, A>;
  constexpr int kVectors = round_vectors<kLayout, S>(kSoftmaxVectors), V = Words<S>::kSize;
  using ShareOfRow = Share<kLayout, S, kVectors>;
  const KeptRounds<S, kSoftmaxInputs * kVectors> kept(rounds);
  for_rows(c.batch, [&](std::int64_t row) {
    const std::int64_t first = row * c.classes;
    typename ShareOfRow::Vector o[kVectors], u[kVectors], g[kVectors];
    const auto load_round = [&](const ShareOfRow& share) {
      share.load(o, c.output, 0);
      share.load(u, c.u, 0);
      share.load(g, c.grad, 0);
    };
    A sums[2] = {};
    const auto add_round = [&] {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        A total_g = 0, mean_u = 0;
#pragma unroll
        for (int k = 0; k < V; ++k) Element(o[i][k], u[i][k], g[i][k]).add_to(total_g, mean_u);
        sums[0] += total_g;
        sums[1] += mean_u;
      }
    };
    const auto write_round = [&](const ShareOfRow& share) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        A gg_grad[V], grad_output[V];
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const Element e(o[i][k], u[i][k], g[i][k]);
          gg_grad[k] = e.gg_grad(sums[1]);
          grad_output[k] = e.grad_output(sums[0], sums[1]);
        }
        if (c.gg_grad) share.store(c.gg_grad, i, gg_grad);
        if (c.grad_output) share.store(c.grad_output, i, grad_output);
      }
    };
    for (int round = rounds.all - 1; round > 0; --round) {
      load_round(ShareOfRow(round, rounds, first));
      if (kept.has(round)) kept.keep(round, o, u, g);
      add_round();
    }
    const ShareOfRow share(0, rounds, first);
    load_round(share);
    add_round();
    row_sums(sums);
    write_round(share);
    for (int round = 1; round < rounds.all; ++round) {
      const ShareOfRow share(round, rounds, first);
      if (kept.has(round))
        kept.take(round, o, u, g);
      else
        load_round(share);
      write_round(share);
    }
  });
}

// Adjacent elements of one class.
template <class S, int kWidth>
struct alignas(sizeof(S) * kWidth) Adjacent {
  S element[kWidth];
};

// kWidth divides inner, and every tensor's address divides into so many elements.
template <bool kLog, int kWidth, class S>
__global__ void __launch_bounds__(256) softmax_double_backward_columns_kernel(const SoftmaxCall<S> c) {
  using A = accumulation_t<S>;
  using Element = SoftmaxElement<kLog, A>;
  using Columns = Adjacent<S, kWidth>;
  constexpr std::int64_t together = 32;  // classes summed before their sum is: rounding grows with 32 + classes / 32
  const std::int64_t inner = c.inner / kWidth, blocks = (inner + blockDim.x - 1) / blockDim.x;
  const auto at = [](const S* tensor, std::int64_t j) { return reinterpret_cast<const Columns*>(tensor)[j]; };
  for (std::int64_t unit = blockIdx.x; unit < c.batch * blocks; unit += gridDim.x) {
    const std::int64_t column = unit % blocks * blockDim.x + threadIdx.x;
    if (column >= inner) continue;
    const std::int64_t first = unit / blocks * c.classes * inner + column;
    A total_g[kWidth] = {}, mean_u[kWidth] = {};
    for (std::int64_t k = 0; k < c.classes;) {
      const std::int64_t end = k + together < c.classes ? k + together : c.classes;
      A part_g[kWidth] = {}, part_u[kWidth] = {};
#pragma unroll 4
      for (; k < end; ++k) {
        const std::int64_t j = first + k * inner;
        const Columns o = at(c.output, j), u = at(c.u, j), g = at(c.grad, j);
#pragma unroll
        for (int i = 0; i < kWidth; ++i)
          Element(load(o.element[i]), load(u.element[i]), load(g.element[i])).add_to(part_g[i], part_u[i]);
      }
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        total_g[i] += part_g[i];
        mean_u[i] += part_u[i];
      }
    }
#pragma unroll 4
    for (std::int64_t k = 0; k < c.classes; ++k) {
      const std::int64_t j = first + k * inner;
      const Columns o = at(c.output, j), u = at(c.u, j), g = at(c.grad, j);
      Columns gg_grad, grad_output;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const Element e(load(o.element[i]), load(u.element[i]), load(g.element[i]));
        gg_grad.element[i] = store<S>(e.gg_grad(mean_u[i]));
        grad_output.element[i] = store<S>(e.grad_output(total_g[i], mean_u[i]));
      }
      if (c.gg_grad) reinterpret_cast<Columns*>(c.gg_grad)[j] = gg_grad;
      if (c.grad_output) reinterpret_cast<Columns*>(c.grad_output)[j] = grad_output;
    }
  }
}

template <bool kLog, class S>
cudaError_t launch_softmax_rows(const SoftmaxCall<S>& c, cudaStream_t stream) {
  const Layout layout = layout_of_rows<S>(c.classes, c.classes, c.u, c.grad, c.output, c.gg_grad, c.grad_output);
  return with_layout<S>(layout, [&](auto known) {
    constexpr Layout kLayout = known;
    const auto g =
        rows_geometry<kLayout, S>(c.batch, c.classes, round_vectors<kLayout, S>(kSoftmaxVectors), kSoftmaxInputs, true);
    return launch(softmax_double_backward_rows_kernel<kLog, kLayout, S>, g.grid, g.block, g.shared, stream, c,
                  g.rounds);
  });
}

template <bool kLog, int kWidth, class S>
cudaError_t launch_softmax_columns(const SoftmaxCall<S>& c, cudaStream_t stream) {
  const std::int64_t inner = c.inner / kWidth, threads = inner >= 256 ? 256 : (inner + 31) / 32 * 32;
  if (threads == 0) return cudaSuccess;
  const std::int64_t blocks = (inner + threads - 1) / threads;
  return launch(softmax_double_backward_columns_kernel<kLog, kWidth, S>, grid_for(c.batch * blocks),
                dim3(static_cast<unsigned>(threads)), 0, stream, c);
}

template <bool kLog, class S>
cudaError_t launch_softmax_as(const SoftmaxCall<S>& c, cudaStream_t stream) {
  if (c.inner == 1) return launch_softmax_rows<kLog>(c, stream);
  if constexpr (sizeof(S) == 2) {
    const auto in_pairs = [](const S* tensor) { return reinterpret_cast<std::uintptr_t>(tensor) % 4 == 0; };
    if (c.inner % 2 == 0 && in_pairs(c.u) && in_pairs(c.grad) && in_pairs(c.output) && in_pairs(c.gg_grad) &&
        in_pairs(c.grad_output))
      return launch_softmax_columns<kLog, 2>(c, stream);
  }
  return launch_softmax_columns<kLog, 1>(c, stream);
}

template <class S>
cudaError_t launch_softmax_double_backward(bool log, const SoftmaxCall<S>& c, cudaStream_t stream) {
  return log ? launch_softmax_as<true>(c, stream) : launch_softmax_as<false>(c, stream);
}

}  // namespace rk::cuda
