// Kernels of kl_divergence.  Formulas: math/kl_divergence.h.
//
// One block a row, with as many threads as the row has 16-byte vectors, up to 512.  The sweeps after the first find
// their row in the L1 or L2 cache, so device memory is read once: both logits for the value; logits and results for the
// backward; logits, cotangents and results for the double backward.
#pragma once

#include <cstdint>

#include "../math/kl_divergence.h"
#include "reduce.cuh"
#include "vector.cuh"

namespace rk::cuda {

template <class S>
struct KlCall {
  using A = accumulation_t<S>;
  std::int64_t rows, classes;
  A inverse_t;
  const S *p_logits, *q_logits, *u, *v;  // [rows, classes]; a cotangent may be null: zeros
  const A *grad, *statistics_in;         // [rows], [rows, kKlStatistics]
  A *per_row, *statistics;               // [rows], [rows, kKlStatistics] outputs
  S *grad_p, *grad_q;                    // [rows, classes] outputs; null: not needed
};

// max and log sum exp of z / T, in every thread
template <class S, class A>
__device__ __forceinline__ void kl_measure(const S* z, std::int64_t classes, A inverse_t, A& max, A& log_sum) {
  max = -static_cast<A>(INFINITY);
  read(z, classes, Counter{}, [&](std::int64_t, A v) { max = Maximum{}(max, v); });
  max = block_max(max, -static_cast<A>(INFINITY)) * inverse_t;
  A sum = 0;
  read(z, classes, Counter{}, [&](std::int64_t, A v) { sum += exp_nonpositive(v * inverse_t - max); });
  log_sum = std::log(block_sum(sum));
}

template <class S>
__global__ void __launch_bounds__(512, 1) kl_divergence_kernel(const KlCall<S> c) {
  using A = accumulation_t<S>;
  for (std::int64_t row = blockIdx.x; row < c.rows; row += gridDim.x) {
    const S *a = c.p_logits + row * c.classes, *b = c.q_logits + row * c.classes;
    KlRow<A> r{};
    r.inverse_t = c.inverse_t;
    kl_measure(a, c.classes, c.inverse_t, r.p_max, r.p_log_sum);
    kl_measure(b, c.classes, c.inverse_t, r.q_max, r.q_log_sum);
    A sum = 0, top = -static_cast<A>(INFINITY);
    read(a, b, c.classes, Counter{}, [&](std::int64_t, A v, A w) {
      const KlPoint<A> x(r, v, w);
      sum += kl_term(x.p, x.q, x.d);
      if (kl_is_top(r, v)) top = Maximum{}(top, x.d);
    });
    sum = block_sum(sum);
    top = block_max(top, -static_cast<A>(INFINITY));
    if (threadIdx.x == 0) {
      A* const statistics = c.statistics + row * kKlStatistics;
      c.per_row[row] = sum;
      statistics[0] = r.p_max;
      statistics[1] = r.p_log_sum;
      statistics[2] = r.q_max;
      statistics[3] = r.q_log_sum;
      statistics[4] = top;
    }
  }
}

template <class S>
__device__ __forceinline__ KlRow<accumulation_t<S>> kl_row(const KlCall<S>& c, std::int64_t row) {
  const accumulation_t<S>* const s = c.statistics_in + row * kKlStatistics;
  return {s[0], s[1], s[2], s[3], s[4], c.inverse_t};
}

template <class S>
__global__ void __launch_bounds__(512, 1) kl_divergence_backward_kernel(const KlCall<S> c) {
  using A = accumulation_t<S>;
  for (std::int64_t row = blockIdx.x; row < c.rows; row += gridDim.x) {
    const S *a = c.p_logits + row * c.classes, *b = c.q_logits + row * c.classes;
    const KlRow<A> r = kl_row(c, row);
    const A grad = c.grad[row];
    A mean_e = 0;
    read(a, b, c.classes, Counter{}, [&](std::int64_t, A v, A w) {
      const KlPoint<A> x(r, v, w);
      mean_e += x.p * (x.d - r.d_top);
    });
    mean_e = block_sum(mean_e);
    if (c.grad_p)
      transform(a, b, c.grad_p + row * c.classes, c.classes, Counter{}, [&](std::int64_t, A v, A w) {
        const KlPoint<A> x(r, v, w);
        return grad * kl_slope_p(x.p, x.d - r.d_top, mean_e, r.inverse_t);
      });
    if (c.grad_q)
      transform(a, b, c.grad_q + row * c.classes, c.classes, Counter{}, [&](std::int64_t, A v, A w) {
        const KlPoint<A> x(r, v, w);
        return grad * kl_slope_q(x.p, x.q, r.inverse_t);
      });
  }
}

template <class S>
__device__ __forceinline__ accumulation_t<S> kl_cotangent(const S* row, std::int64_t j) {
  return row ? load(row[j]) : accumulation_t<S>(0);
}

template <class S>
__global__ void __launch_bounds__(512, 1) kl_divergence_double_backward_kernel(const KlCall<S> c) {
  using A = accumulation_t<S>;
  for (std::int64_t row = blockIdx.x; row < c.rows; row += gridDim.x) {
    const std::int64_t first = row * c.classes;
    const S *a = c.p_logits + first, *b = c.q_logits + first;
    const S *us = c.u ? c.u + first : nullptr, *vs = c.v ? c.v + first : nullptr;
    const KlRow<A> r = kl_row(c, row);
    const A grad = c.grad[row];
    KlSums<A> s{};
    A v_difference = 0;
    read(a, b, c.classes, Counter{}, [&](std::int64_t j, A z, A w) {
      const KlPoint<A> x(r, z, w);
      const A u = kl_cotangent(us, j), v = kl_cotangent(vs, j);
      s.mean_e += x.p * (x.d - r.d_top);
      s.u_p += x.p * u;
      s.v_q += x.q * v;
      v_difference += (x.q - x.p) * v;  // the difference first: the two sums nearly agree where the predictions do
    });
    s.mean_e = block_sum(s.mean_e);
    s.u_p = block_sum(s.u_p);
    s.v_q = block_sum(s.v_q);
    v_difference = block_sum(v_difference);
    s.v_p = s.v_q - v_difference;
    A cross = 0;
    read(a, b, c.classes, Counter{}, [&](std::int64_t j, A z, A w) {
      const KlPoint<A> x(r, z, w);
      cross += kl_cross_term(x.p, x.d - r.d_top, kl_cotangent(us, j), s);
    });
    s.cross = block_sum(cross);
    if (threadIdx.x == 0) c.per_row[row] = (s.cross + v_difference) * r.inverse_t;
    if (c.grad_p)
      transform(a, b, c.grad_p + first, c.classes, Counter{}, [&](std::int64_t j, A z, A w) {
        const KlPoint<A> x(r, z, w);
        return grad * kl_bend_p(x.p, x.d - r.d_top, kl_cotangent(us, j), kl_cotangent(vs, j), s, r.inverse_t);
      });
    if (c.grad_q)
      transform(a, b, c.grad_q + first, c.classes, Counter{}, [&](std::int64_t j, A z, A w) {
        const KlPoint<A> x(r, z, w);
        return grad * kl_bend_q(x.p, x.q, kl_cotangent(us, j), kl_cotangent(vs, j), s, r.inverse_t);
      });
  }
}

template <class S>
cudaError_t launch_kl_divergence(Order order, const KlCall<S>& c, cudaStream_t stream) {
  const dim3 block(threads_for<S>(c.classes, 512)), grid = grid_for(c.rows);
  switch (order) {
    case Order::kValue: return launch(kl_divergence_kernel<S>, grid, block, 0, stream, c);
    case Order::kBackward: return launch(kl_divergence_backward_kernel<S>, grid, block, 0, stream, c);
    default: return launch(kl_divergence_double_backward_kernel<S>, grid, block, 0, stream, c);
  }
}

}  // namespace rk::cuda
