// Kernels of kl_divergence.  Formulas: math/kl_divergence.h.
//
// Rows as in rows.cuh.  The value takes two sweeps, the first for maxima and sums, and leaves what is a row's own to the
// derivatives: the backward needs one, the double backward two.  Bytes: both logits for the value; logits and results
// for the backward; logits, cotangents and results for the double backward.
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
template <Layout kLayout, class S>
constexpr int kl_vectors(Order order) {
  return round_vectors<kLayout, S>(order == Order::kDoubleBackward && sizeof(S) == 8 ? 1 : 2);
}
constexpr int kMostKlDoubleThreads = 512;  // four inputs need registers

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
  // As of KlPowers: nothing is missing but the sums' ratio.
  static constexpr A p_more = 0, q_more = 0;
  __device__ __forceinline__ A d_more() const { return -log_ratio; }
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

// p, q, and d less `shift` and log_ratio, or 0 where p is zero.
template <class A>
struct KlShifted {
  A p, q, d;
  __device__ __forceinline__ KlShifted(const KlScale<A>& r, A a, A b, A shift) {
    const A below_a = fused(a, r.inverse_t, -r.p_max), below_b = fused(b, r.inverse_t, -r.q_max);
    p = exp2_nonpositive(fused(below_a, kLog2E<A>, -r.p_log2_sum));
    q = exp2_nonpositive(fused(below_b, kLog2E<A>, -r.q_log2_sum));
    d = p == A(0) ? A(0) : (below_a - below_b) - shift;
  }
};

// For 16 bits, the same with one multiply-add an exponent.  What rounding takes from the constant in it, which may be large, is a
// factor of all p or all q of a row, to be put right in what is made of them: 1 + p_more, 1 + q_more.
template <class A>
struct KlPowers {
  A k, p_log2_sum, q_log2_sum, p_more, q_more;  // k = log2(e) / T; sums of 2^(a k), 2^(b k)
  explicit __device__ __forceinline__ KlPowers(const KlRow<A>& r) : k(r.inverse_t * kLog2E<A>) {
    const A off = fused(-r.inverse_t, kLog2E<A>, k) / r.inverse_t;  // a k is a log2(e) / T and this part of a / T
    set(r.p_max, r.p_log_sum, off, p_log2_sum, p_more);
    set(r.q_max, r.q_log_sum, off, q_log2_sum, q_more);
  }
  // How much is missing from d, of what the powers say it is.
  __device__ __forceinline__ A d_more() const { return p_more - q_more; }

 private:
  static __device__ __forceinline__ void set(A max, A log_sum, A off, A& log2_sum, A& more) {
    log2_sum = fused(max, kLog2E<A>, log_sum * kLog2E<A>);
    more = (fused(-max, kLog2E<A>, log2_sum) - fused(log_sum, kLog2E<A>, max * off)) * kLn2<A>;
  }
};
template <class A>
struct KlPower {
  A p, q, d;
  __device__ __forceinline__ KlPower(const KlPowers<A>& r, A a, A b, A shift) {
    const A log2_p = fused(a, r.k, -r.p_log2_sum), log2_q = fused(b, r.k, -r.q_log2_sum);
    p = exp2_nonpositive(log2_p);
    q = exp2_nonpositive(log2_q);
    d = p == A(0) ? A(0) : fused(log2_p - log2_q, kLn2<A>, -shift);
  }
};

// max and log sum exp of z / T from what its threads know together.  What rounding takes from the one is in the other.
template <class A>
__device__ __forceinline__ void kl_measure(RunningRow<A, false>& row, A k, A inverse_t, A& max, A& log_sum) {
  row.join(k);
  max = row.max * inverse_t;
  log_sum = std::log(row.sum) + fused(row.max, inverse_t, -max);
}

template <class Vector, int kVectors, int V, class A>
__device__ __forceinline__ void kl_take(RunningRow<A, false>& row, const Vector (&z)[kVectors], A k) {
  A max = row.max;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    A top = z[i][0];
#pragma unroll
    for (int j = 1; j < V; ++j) top = Larger{}(top, z[i][j]);
    max = Larger{}(max, top);
  }
  row.raise_to(max, k);
  const A pivot = row.pivot();
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    A sum = 0;
#pragma unroll
    for (int j = 0; j < V; ++j) sum += exp2_nonpositive((z[i][j] - pivot) * k);
    row.sum += sum;
  }
}

// What a row's second sweep adds up: the value, and for h the classes but p's first choices, and those.
template <class A>
struct KlTotals {
  A value = 0, rest_p = 0, rest_pd = 0, tops = 0, top_d = 0, top = RunningRow<A, false>::kNone;

  // One vector's classes, whose logits are a and b.  Few vectors hold a first choice; those are gone through again.
  template <class ShareOfRow, class S>
  __device__ __forceinline__ void add(const KlScale<A>& z, const typename ShareOfRow::Vector& a,
                                      const typename ShareOfRow::Vector& b, A max, const ShareOfRow& share, int i,
                                      const S* p_logits, const S* q_logits) {
    A sum = 0, sum_p = 0, sum_pd = 0;
    bool has_top = false;
#pragma unroll
    for (int j = 0; j < ShareOfRow::V; ++j) {
      const KlClass<A> x(z, a[j], b[j], A(1));  // not small: what is left of the term is q
      sum += kl_term(x.p, x.q, x.d);
      sum_p += x.p;
      sum_pd += x.p * x.d;
      has_top |= a[j] == max;
    }
    if (has_top) {
      sum_p = sum_pd = 0;
#pragma unroll 1
      for (int j = 0; j < ShareOfRow::V; ++j) {
        if (!share.has(i, j)) continue;
        const std::int64_t at = share.element(i, j);
        const A a_j = load(p_logits[at]);
        const KlClass<A> x(z, a_j, load(q_logits[at]), A(1));
        if (a_j == max) {
          tops += A(1);
          top_d += x.d;
          top = Larger{}(top, x.d);
        } else {
          sum_p += x.p;
          sum_pd += x.p * x.d;
        }
      }
    }
    value += sum;
    rest_p += sum_p;
    rest_pd += sum_pd;
  }
  // Of all threads of a row together, in each of them.
  __device__ __forceinline__ void join() {
    A sums[5] = {value, rest_p, rest_pd, tops, top_d};
    row_sums(sums);
    top = block_reduce(top, RunningRow<A, false>::kNone, Larger{});
    value = sums[0], rest_p = sums[1], rest_pd = sums[2], tops = sums[3], top_d = sums[4];
  }
  __device__ __forceinline__ A mean_e(A p_top) const {
    return (rest_pd - top * rest_p) + (tops == A(1) ? A(0) : p_top * (top_d - tops * top));
  }
};

template <Layout kLayout, class S>
__global__ void __launch_bounds__(kMostRowThreads<kLayout, S>, 1)
    kl_divergence_kernel(const KlCall<S> c, const RowRounds rounds) {
  using A = accumulation_t<S>;
  constexpr int kVectors = kl_vectors<kLayout, S>(Order::kValue), V = Words<S>::kSize;
  using ShareOfRow = Share<kLayout, S, kVectors>;
  const KeptRounds<S, 2 * kVectors> kept(rounds);
  const A k = c.inverse_t * kLog2E<A>;
  for_rows(c.rows, [&](std::int64_t row) {
    const std::int64_t first = row * c.classes;
    typename ShareOfRow::Vector a[kVectors], b[kVectors];
    const auto load_round = [&](const ShareOfRow& share) {
      share.load(a, c.p_logits, RunningRow<A, false>::kNone);
      share.load(b, c.q_logits, RunningRow<A, false>::kNone);
    };
    RunningRow<A, false> of_a, of_b;
    for (int round = rounds.all - 1; round >= 0; --round) {
      load_round(ShareOfRow(round, rounds, first));
      if (kept.has(round)) kept.keep(round, a, b);
      kl_take<typename ShareOfRow::Vector, kVectors, V>(of_a, a, k);
      kl_take<typename ShareOfRow::Vector, kVectors, V>(of_b, b, k);
    }
    KlRow<A> r{};
    r.inverse_t = c.inverse_t;
    kl_measure(of_a, k, c.inverse_t, r.p_max, r.p_log_sum);
    kl_measure(of_b, k, c.inverse_t, r.q_max, r.q_log_sum);
    const KlScale<A> z(r);
    KlTotals<A> totals;
    for (int round = 0; round < rounds.all; ++round) {
      const ShareOfRow share(round, rounds, first);
      if (kept.has(round))
        kept.take(round, a, b);
      else if (round > 0)
        load_round(share);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) totals.add(z, a[i], b[i], of_a.max, share, i, c.p_logits, c.q_logits);
    }
    totals.join();
    if (threadIdx.x != 0) return;
    A* const statistics = c.statistics + row * kKlStatistics;
    c.per_row[row] = totals.value;
    statistics[0] = r.p_max;
    statistics[1] = r.p_log_sum;
    statistics[2] = r.q_max;
    statistics[3] = r.q_log_sum;
    statistics[4] = totals.top;
    statistics[5] = totals.mean_e(exp2_nonpositive(-z.p_log2_sum));
  });
}

template <class S>
__device__ __forceinline__ KlRow<accumulation_t<S>> kl_row(const KlCall<S>& c, std::int64_t row) {
  const accumulation_t<S>* const s = c.statistics_in + row * kKlStatistics;
  return {s[0], s[1], s[2], s[3], s[4], s[5], c.inverse_t};
}

template <Layout kLayout, class S>
__global__ void __launch_bounds__(kMostThreadsOfOneSweep, kLayout == Layout::kVectors ? 4 : 2)
    kl_divergence_backward_kernel(const KlCall<S> c, const RowRounds rounds) {
  using A = accumulation_t<S>;
  constexpr int kVectors = kl_vectors<kLayout, S>(Order::kBackward), V = Words<S>::kSize;
  using ShareOfRow = Share<kLayout, S, kVectors>;
  for_rows(c.rows, [&](std::int64_t row) {
    const std::int64_t first = row * c.classes;
    const KlRow<A> r = kl_row(c, row);
    const KlScale<A> z(r);
    const A factor = c.grad[row] * r.inverse_t;
    for (int round = 0; round < rounds.all; ++round) {
      const ShareOfRow share(round, rounds, first);
      typename ShareOfRow::Vector a[kVectors], b[kVectors];
      share.load(a, c.p_logits, RunningRow<A, false>::kNone);
      share.load(b, c.q_logits, RunningRow<A, false>::kNone);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        A grad_p[V], grad_q[V];
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const KlClass<A> x(z, a[i][j], b[i][j]);
          grad_p[j] = factor * kl_slope_p(x.p, x.d - r.d_top, r.mean_e, A(1));
          grad_q[j] = factor * kl_slope_q(x.p, x.q, A(1));
        }
        if (c.grad_p) share.store(c.grad_p, i, grad_p);
        if (c.grad_q) share.store(c.grad_q, i, grad_q);
      }
    }
  });
}

// kU, kV: whether there is that cotangent.
template <bool kU, bool kV, Layout kLayout, class S>
__global__ void __launch_bounds__(kMostKlDoubleThreads, 1)
    kl_divergence_double_backward_kernel(const KlCall<S> c, const RowRounds rounds) {
  using A = accumulation_t<S>;
  constexpr int kVectors = kl_vectors<kLayout, S>(Order::kDoubleBackward), V = Words<S>::kSize;
  using Class = std::conditional_t<sizeof(S) == 2, KlPower<A>, KlShifted<A>>;
  using ShareOfRow = Share<kLayout, S, kVectors>;
  const KeptRounds<S, 4 * kVectors> kept(rounds);
  for_rows(c.rows, [&](std::int64_t row) {
    const std::int64_t first = row * c.classes;
    const KlRow<A> r = kl_row(c, row);
    const std::conditional_t<sizeof(S) == 2, KlPowers<A>, KlScale<A>> z(r);
    typename ShareOfRow::Vector a[kVectors] = {}, b[kVectors] = {}, u[kVectors] = {}, v[kVectors] = {};
    const auto load_round = [&](const ShareOfRow& share) {  // absent classes are those of -inf in both
      share.load_there(a, c.p_logits, RunningRow<A, false>::kNone);
      share.load_there(b, c.q_logits, RunningRow<A, false>::kNone);
      if constexpr (kU) share.load_there(u, c.u, 0);
      if constexpr (kV) share.load_there(v, c.v, 0);
    };
    A some_u =
        0;  // D is summed about it, and moved to the means afterwards: near the others, if these are far from zero
    if constexpr (kU) some_u = load(c.u[first]);
    A u_p = 0, cross = 0, rest = 0, v_q = 0, v_difference = 0;
    const A about = r.d_top + r.mean_e - z.d_more();  // what d is summed about: what rounding takes from it, rest finds
    for (int round = rounds.all - 1; round >= 0; --round) {
      const ShareOfRow share(round, rounds, first);
      load_round(share);
      if (kept.has(round)) kept.keep(round, a, b, u, v);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        if (!share.there(i)) continue;
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const Class x(z, a[i][j], b[i][j], about);
          if constexpr (kU) {
            u_p += x.p * u[i][j];
            cross += x.p * (u[i][j] - some_u) * x.d;
            rest += x.p * x.d;
          }
          if constexpr (kV) {
            v_q += x.q * v[i][j];
            v_difference += (x.q - x.p) * v[i][j];  // the difference first: the two sums nearly agree where p and q do
          }
        }
      }
    }
    A sums[5] = {u_p, cross, rest, v_q, v_difference};
    row_sums(sums);
    const A p_factor = A(1) + z.p_more, q_factor = A(1) + z.q_more;
    u_p = sums[0] * p_factor, cross = sums[1] * p_factor, rest = sums[2] * p_factor, v_q = sums[3] * q_factor;
    v_difference = sums[4] + (z.q_more * sums[3] - z.p_more * (sums[3] - sums[4]));
    // rest: how far the value's h is from that of these p.
    const KlSums<A> s{r.mean_e + rest, u_p, v_q - v_difference, v_q, cross - (u_p - some_u) * rest};
    if (threadIdx.x == 0) c.per_row[row] = (s.cross + v_difference) * r.inverse_t;
    const A factor = c.grad[row] * (r.inverse_t * r.inverse_t);
    const A below_rise = r.d_top + (s.mean_e - A(1)) - z.d_more();
    for (int round = 0; round < rounds.all; ++round) {
      const ShareOfRow share(round, rounds, first);
      if (kept.has(round))
        kept.take(round, a, b, u, v);
      else if (round > 0)
        load_round(share);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        if (!share.there(i)) continue;
        A grad_p[V], grad_q[V];
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const Class x(z, a[i][j], b[i][j], below_rise);
          A u_j = 0, v_j = 0;
          if constexpr (kU) u_j = u[i][j];
          if constexpr (kV) v_j = v[i][j];
          const A p = x.p * (factor * p_factor), q = x.q * (factor * q_factor);  // both gradients are linear in them
          grad_p[j] = kl_bend_p_of_rise<kU, kV>(p, x.d, u_j, v_j, s, A(1));
          grad_q[j] = kl_bend_q<kU, kV>(p, q, u_j, v_j, s, A(1));
        }
        if (c.grad_p) share.store(c.grad_p, i, grad_p);
        if (c.grad_q) share.store(c.grad_q, i, grad_q);
      }
    }
  });
}

template <Layout kLayout, class S>
cudaError_t launch_kl_as(Order order, const KlCall<S>& c, cudaStream_t stream) {
  const auto with = [&](auto kernel, int inputs) {
    const bool twice = order != Order::kBackward;
    const int most = order == Order::kDoubleBackward ? kMostKlDoubleThreads : kMostRowThreads<kLayout, S>;
    const auto g = rows_geometry<kLayout, S>(c.rows, c.classes, kl_vectors<kLayout, S>(order), inputs, twice, most);
    return launch(kernel, g.grid, g.block, g.shared, stream, c, g.rounds);
  };
  if (order == Order::kValue) return with(kl_divergence_kernel<kLayout, S>, 2);
  if (order == Order::kBackward) return with(kl_divergence_backward_kernel<kLayout, S>, 2);
  if (c.u && c.v) return with(kl_divergence_double_backward_kernel<true, true, kLayout, S>, 4);
  if (c.u) return with(kl_divergence_double_backward_kernel<true, false, kLayout, S>, 4);
  if (c.v) return with(kl_divergence_double_backward_kernel<false, true, kLayout, S>, 4);
  return with(kl_divergence_double_backward_kernel<false, false, Layout::kParts, S>, 4);  // of nothing: zeros
}

template <class S>
cudaError_t launch_kl_divergence(Order order, const KlCall<S>& c, cudaStream_t stream) {
  const Layout layout = layout_of_rows<S>(c.classes, c.classes, c.p_logits, c.q_logits, c.u, c.v,
                                          static_cast<const S*>(c.grad_p), static_cast<const S*>(c.grad_q));
  return with_layout<S>(layout, [&](auto known) {
    constexpr Layout kLayout = known;
    return launch_kl_as<kLayout>(order, c, stream);
  });
}

}  // namespace rk::cuda
