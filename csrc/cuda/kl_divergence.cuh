// Kernels of kl_divergence.  Formulas: math/kl_divergence.h.
//
// Rows as in rows.cuh.  Bytes: both logits for the value; logits and results for the backward; logits, cotangents and
// results for the double backward.  A backward that is asked for grad_q alone needs no sums, a double backward without u
// none of e: those sweeps are left out.
#pragma once

#include <cstdint>

#include "../math/fixed.h"
#include "../math/kl_divergence.h"
#include "rows.cuh"
#include "running_row.cuh"

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

// Vectors of every input in a round: of two inputs, or of up to four.
constexpr int kKlVectors = 2, kKlDoubleVectors = 1;

// A row's numbers, with the exponents of p and q in powers of two: a multiply-add each.
template <class A>
struct KlScale {
  A inverse_t, p_max, q_max, p_log2_sum, q_log2_sum, log_ratio;  // log_ratio: of the two sums
  explicit __device__ __forceinline__ KlScale(const KlRow<A>& r)
      : inverse_t(r.inverse_t),
        p_max(r.p_max),
        q_max(r.q_max),
        p_log2_sum(r.p_log_sum * kLog2E<A>),
        q_log2_sum(r.q_log_sum * kLog2E<A>),
        log_ratio(r.p_log_sum - r.q_log_sum) {}
};

// p, q and d of one class; d is `d_of_none` where p is zero.
template <class A>
struct KlClass {
  A p, q, d;
  __device__ __forceinline__ KlClass(const KlScale<A>& r, A a, A b, A d_of_none = A(0)) {
    const A below_a = fused(a, r.inverse_t, -r.p_max), below_b = fused(b, r.inverse_t, -r.q_max);
    p = exp2_nonpositive(fused(below_a, kLog2E<A>, -r.p_log2_sum));
    q = exp2_nonpositive(fused(below_b, kLog2E<A>, -r.q_log2_sum));
    d = p == A(0) ? d_of_none : (below_a - below_b) - r.log_ratio;
  }
};

// max and log sum exp of z / T from what its threads know together.  What rounding takes from the one is in the other.
template <class A>
__device__ __forceinline__ void kl_measure(RunningRow<A, false>& row, A k, A inverse_t, A& max, A& log_sum) {
  row.join(k);
  max = row.max * inverse_t;
  log_sum = std::log(row.sum) + fused(row.max, inverse_t, -max);
}

template <class S, int kVectors, class A>
__device__ __forceinline__ void kl_take(RunningRow<A, false>& row, const Words<S> (&z)[kVectors], A k) {
  A max = row.max;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    A top = z[i][0];
#pragma unroll
    for (int j = 1; j < Words<S>::kSize; ++j) top = Larger{}(top, z[i][j]);
    max = Larger{}(max, top);
  }
  row.raise_to(max, k);
  const A pivot = row.pivot();
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    A sum = 0;
#pragma unroll
    for (int j = 0; j < Words<S>::kSize; ++j) sum += exp2_nonpositive((z[i][j] - pivot) * k);
    row.sum += sum;
  }
}

template <bool kAligned, class S>
__global__ void __launch_bounds__(512, kAligned ? 2 : 1) kl_divergence_kernel(const KlCall<S> c) {
  using A = accumulation_t<S>;
  using ShareOfRow = Share<kAligned, S, kKlVectors>;
  constexpr int V = Words<S>::kSize;
  constexpr A none = RunningRow<A, false>::kNone;
  const A k = c.inverse_t * kLog2E<A>;
  for_rows(c.rows, [&](std::int64_t row) {
    const std::int64_t first = row * c.classes;
    const int rounds = ShareOfRow::rounds(c.classes);
    Words<S> a[kKlVectors], b[kKlVectors];
    const auto load_round = [&](const ShareOfRow& share) {
      share.load(a, c.p_logits + first, words_of<S>(none));
      share.load(b, c.q_logits + first, words_of<S>(none));
    };
    RunningRow<A, false> of_a, of_b;
    for (int round = rounds - 1; round >= 0; --round) {
      load_round(ShareOfRow(round, c.classes));
      kl_take(of_a, a, k);
      kl_take(of_b, b, k);
    }
    KlRow<A> r{};
    r.inverse_t = c.inverse_t;
    kl_measure(of_a, k, c.inverse_t, r.p_max, r.p_log_sum);
    kl_measure(of_b, k, c.inverse_t, r.q_max, r.q_log_sum);
    const KlScale<A> z(r);
    A sums[1] = {}, top = none;
    for (int round = 0; round < rounds; ++round) {
      const ShareOfRow share(round, c.classes);
      if (round > 0) load_round(share);
#pragma unroll
      for (int i = 0; i < kKlVectors; ++i) {
        A sum = 0, vector_top = none;
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const KlClass<A> x(z, a[i][j], b[i][j], A(1));  // not small: what is left of the term is q
          sum += kl_term(x.p, x.q, x.d);
          if (a[i][j] == of_a.max) vector_top = Larger{}(vector_top, x.d);
        }
        sums[0] += sum;
        if (share.has(i)) top = Larger{}(top, vector_top);
      }
    }
    row_sums(sums);
    top = block_reduce(top, none, Larger{});
    if (threadIdx.x != 0) return;
    A* const statistics = c.statistics + row * kKlStatistics;
    c.per_row[row] = sums[0];
    statistics[0] = r.p_max;
    statistics[1] = r.p_log_sum;
    statistics[2] = r.q_max;
    statistics[3] = r.q_log_sum;
    statistics[4] = top;
  });
}

template <class S>
__device__ __forceinline__ KlRow<accumulation_t<S>> kl_row(const KlCall<S>& c, std::int64_t row) {
  const accumulation_t<S>* const s = c.statistics_in + row * kKlStatistics;
  return {s[0], s[1], s[2], s[3], s[4], c.inverse_t};
}

template <bool kAligned, class S>
__global__ void __launch_bounds__(512, kAligned ? 2 : 1) kl_divergence_backward_kernel(const KlCall<S> c) {
  using A = accumulation_t<S>;
  using ShareOfRow = Share<kAligned, S, kKlVectors>;
  constexpr int V = Words<S>::kSize;
  for_rows(c.rows, [&](std::int64_t row) {
    const std::int64_t first = row * c.classes;
    const int rounds = ShareOfRow::rounds(c.classes);
    const KlRow<A> r = kl_row(c, row);
    const KlScale<A> z(r);
    const A factor = c.grad[row] * r.inverse_t;
    Words<S> a[kKlVectors], b[kKlVectors];
    const auto load_round = [&](const ShareOfRow& share) {  // absent classes are those of -inf in both
      share.load(a, c.p_logits + first, words_of<S>(RunningRow<A, false>::kNone));
      share.load(b, c.q_logits + first, words_of<S>(RunningRow<A, false>::kNone));
    };
    A sums[1] = {};
    if (c.grad_p) {
      for (int round = rounds - 1; round >= 0; --round) {
        load_round(ShareOfRow(round, c.classes));
#pragma unroll
        for (int i = 0; i < kKlVectors; ++i) {
          A mean_e = 0;
#pragma unroll
          for (int j = 0; j < V; ++j) {
            const KlClass<A> x(z, a[i][j], b[i][j]);
            mean_e += x.p * (x.d - r.d_top);
          }
          sums[0] += mean_e;
        }
      }
      row_sums(sums);
    }
    for (int round = 0; round < rounds; ++round) {
      const ShareOfRow share(round, c.classes);
      if (round > 0 || !c.grad_p) load_round(share);
#pragma unroll
      for (int i = 0; i < kKlVectors; ++i) {
        A grad_p[V], grad_q[V];
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const KlClass<A> x(z, a[i][j], b[i][j]);
          grad_p[j] = factor * kl_slope_p(x.p, x.d - r.d_top, sums[0], A(1));
          grad_q[j] = factor * kl_slope_q(x.p, x.q, A(1));
        }
        if (c.grad_p) share.store(c.grad_p + first, i, grad_p);
        if (c.grad_q) share.store(c.grad_q + first, i, grad_q);
      }
    }
  });
}

// kU, kV: whether there is that cotangent.
template <bool kU, bool kV, bool kAligned, class S>
__global__ void __launch_bounds__(512, kAligned ? 2 : 1) kl_divergence_double_backward_kernel(const KlCall<S> c) {
  using A = accumulation_t<S>;
  constexpr int kVectors = kKlDoubleVectors;
  using ShareOfRow = Share<kAligned, S, kVectors>;
  constexpr int V = Words<S>::kSize;
  for_rows(c.rows, [&](std::int64_t row) {
    const std::int64_t first = row * c.classes;
    const int rounds = ShareOfRow::rounds(c.classes);
    const KlRow<A> r = kl_row(c, row);
    const KlScale<A> z(r);
    Words<S> a[kVectors], b[kVectors], u[kVectors], v[kVectors];
    const auto load_round = [&](const ShareOfRow& share) {
      share.load(a, c.p_logits + first, words_of<S>(RunningRow<A, false>::kNone));
      share.load(b, c.q_logits + first, words_of<S>(RunningRow<A, false>::kNone));
      if constexpr (kU) share.load(u, c.u + first, {});
      if constexpr (kV) share.load(v, c.v + first, {});
    };
    A sums[4] = {};
    for (int round = rounds - 1; round >= 0; --round) {
      load_round(ShareOfRow(round, c.classes));
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        A mean_e = 0, u_p = 0, v_q = 0, v_difference = 0;
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const KlClass<A> x(z, a[i][j], b[i][j]);
          if constexpr (kU) {
            mean_e += x.p * (x.d - r.d_top);
            u_p += x.p * u[i][j];
          }
          if constexpr (kV) {
            v_q += x.q * v[i][j];
            v_difference += (x.q - x.p) * v[i][j];  // the difference first: the two sums nearly agree where p and q do
          }
        }
        sums[0] += mean_e;
        sums[1] += u_p;
        sums[2] += v_q;
        sums[3] += v_difference;
      }
    }
    row_sums(sums);
    KlSums<A> s{sums[0], sums[1], sums[2] - sums[3], sums[2], A(0)};
    if constexpr (kU) {
      A cross[1] = {};
      for (int round = 0; round < rounds; ++round) {
        if (round > 0) load_round(ShareOfRow(round, c.classes));
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
          A sum = 0;
#pragma unroll
          for (int j = 0; j < V; ++j) {
            const KlClass<A> x(z, a[i][j], b[i][j]);
            sum += kl_cross_term(x.p, x.d - r.d_top, u[i][j], s);
          }
          cross[0] += sum;
        }
      }
      row_sums(cross);
      s.cross = cross[0];
    }
    if (threadIdx.x == 0) c.per_row[row] = (s.cross + sums[3]) * r.inverse_t;
    const A factor = c.grad[row] * (r.inverse_t * r.inverse_t);
    // Back again where the round in registers is the last.
    for (int step = 0; step < rounds; ++step) {
      const int round = kU ? rounds - 1 - step : step;
      const ShareOfRow share(round, c.classes);
      if (step > 0) load_round(share);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        A grad_p[V], grad_q[V];
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const KlClass<A> x(z, a[i][j], b[i][j]);
          A u_j = 0, v_j = 0;
          if constexpr (kU) u_j = u[i][j];
          if constexpr (kV) v_j = v[i][j];
          grad_p[j] = factor * kl_bend_p<kU, kV>(x.p, x.d - r.d_top, u_j, v_j, s, A(1));
          grad_q[j] = factor * kl_bend_q<kU, kV>(x.p, x.q, u_j, v_j, s, A(1));
        }
        if (c.grad_p) share.store(c.grad_p + first, i, grad_p);
        if (c.grad_q) share.store(c.grad_q + first, i, grad_q);
      }
    }
  });
}

template <bool kAligned, class S>
cudaError_t launch_kl_as(Order order, const KlCall<S>& c, cudaStream_t stream) {
  const auto with = [&](auto kernel, int round) {
    const dim3 block = block_for_rows<S>(c.classes, round);
    return launch(kernel, grid_for_rows(c.rows, block), block, 0, stream, c);
  };
  if (order == Order::kValue) return with(kl_divergence_kernel<kAligned, S>, kKlVectors);
  if (order == Order::kBackward) return with(kl_divergence_backward_kernel<kAligned, S>, kKlVectors);
  if (c.u && c.v) return with(kl_divergence_double_backward_kernel<true, true, kAligned, S>, kKlDoubleVectors);
  if (c.u) return with(kl_divergence_double_backward_kernel<true, false, kAligned, S>, kKlDoubleVectors);
  if (c.v) return with(kl_divergence_double_backward_kernel<false, true, kAligned, S>, kKlDoubleVectors);
  return with(kl_divergence_double_backward_kernel<false, false, false, S>, kKlDoubleVectors);  // of nothing: zeros
}

template <class S>
cudaError_t launch_kl_divergence(Order order, const KlCall<S>& c, cudaStream_t stream) {
  if constexpr (sizeof(S) < 8) {
    if (aligned_rows<S>(c.classes, c.classes, c.p_logits, c.q_logits, c.u, c.v, c.grad_p, c.grad_q))
      return launch_kl_as<true>(order, c, stream);
  }
  return launch_kl_as<false>(order, c, stream);
}

}  // namespace rk::cuda
