// Kernels of softmax_cross_entropy.  Formulas: math/softmax_cross_entropy.h.
//
// Rows as in rows.cuh.  The value is one sweep: a thread's maximum grows as it goes, and its sums are rescaled when it
// does.  So is the backward.  The double backward sums and then writes, two sweeps.  Bytes: logits for the value; logits
// and result for the backward; logits, cotangent and result for the double backward (and the target, where it is a row of
// probabilities).
//
// A target that is an index costs nothing per element: its class is treated apart, and what label smoothing gives to all
// classes is a coefficient.
#pragma once

#include <cstdint>

#include "../math/fixed.h"
#include "../math/softmax_cross_entropy.h"
#include "rows.cuh"
#include "running_row.cuh"

namespace rk::cuda {

// What a row's target is: an index; an index with label smoothing; probabilities.
enum class Target { kIndex, kSmoothedIndex, kProbabilities };

// Vectors of every input in a round: many float32 of the only input of the value, so that a warp has 1000 at once; few
// where probabilities, or single elements of two inputs, need registers of their own.
template <Target kTarget, Layout kLayout, class S>
constexpr int cross_entropy_vectors(Order order) {
  const bool few =
      kTarget == Target::kProbabilities || (order == Order::kDoubleBackward && kLayout == Layout::kElements);
  return round_vectors<kLayout, S>(few ? 2 : order == Order::kValue && sizeof(S) == 4 ? 8 : 4);
}
template <Target kTarget, Layout kLayout, class S, Order kOrder>
using CrossEntropyShare = Share<kLayout, S, cross_entropy_vectors<kTarget, kLayout, S>(kOrder)>;

template <class S>
struct CrossEntropyCall {
  using A = accumulation_t<S>;
  std::int64_t rows, classes;
  const S *logits, *u;                   // [rows, classes]; u: cotangent of grad_logits
  std::int64_t logits_stride, u_stride;  // elements between rows
  const std::int64_t* indices;           // [rows], or null
  const S* narrow_target;                // [rows, classes] probabilities as fine as the logits, or null
  const A* wide_target;                  // the same in the accumulation type, or null
  std::int64_t target_stride, ignore_index;
  A label_smoothing, inverse_t;
  const A *grad, *statistics_in;  // [rows], [rows, 2]
  A *per_row, *statistics;        // [rows], [rows, 2] outputs
  S* out;                         // [rows, classes] output
};

// The target of one row.  A class that does not exist makes everything about its row NaN: raising would need the host.
template <Target kTarget, class S>
struct RowTarget {
  using A = accumulation_t<S>;
  static constexpr int V = Words<S>::kSize;
  const S* narrow = nullptr;
  const A* wide = nullptr;
  std::int64_t index = -1;
  bool ignored = false, invalid = false;
  Smoothing<A> smoothing;

  __device__ __forceinline__ RowTarget(const CrossEntropyCall<S>& c, std::int64_t row)
      : smoothing(c.label_smoothing, A(c.classes)) {
    if constexpr (kTarget == Target::kProbabilities) {
      if (c.narrow_target) narrow = c.narrow_target + row * c.target_stride;
      if (c.wide_target) wide = c.wide_target + row * c.target_stride;
    } else {
      index = c.indices[row];
      ignored = index == c.ignore_index;
      invalid = !ignored && (index < 0 || index >= c.classes);
    }
  }

  // q of probabilities: of a vector's elements, and zeros where it has none.
  template <class ShareOfRow>
  __device__ __forceinline__ void weights(const ShareOfRow& share, int i, A (&q)[V]) const {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const std::int64_t j = share.element(i, k);
      q[k] = share.has(i, k) ? smoothing.q(wide ? wide[j] : load(narrow[j])) : A(0);
    }
  }

  // sum_c q_c, in every thread.
  template <class ShareOfRow>
  __device__ __forceinline__ A total_q(std::int64_t classes, RowRounds rounds) const {
    if constexpr (kTarget != Target::kProbabilities) return smoothing.keep + smoothing.floor * A(classes);
    A total[1] = {};
    for (int round = 0; round < rounds.all; ++round) {
      const ShareOfRow share(round, rounds);
      for (int i = 0; i < ShareOfRow::kCount; ++i) {
        A q[V];
        weights(share, i, q);
#pragma unroll
        for (int k = 0; k < V; ++k) total[0] += q[k];
      }
    }
    row_sums(total);
    return total[0];
  }
};

template <class S>
__device__ __forceinline__ void fill_row(const CrossEntropyCall<S>& c, std::int64_t row, accumulation_t<S> value) {
  if (c.out)
    for (std::int64_t j = threadIdx.x; j < c.classes; j += blockDim.x) c.out[row * c.classes + j] = store<S>(value);
  if (threadIdx.x != 0) return;
  if (c.per_row) c.per_row[row] = value;
  if (c.statistics) c.statistics[2 * row] = c.statistics[2 * row + 1] = accumulation_t<S>(0);
}

// Rows without anything to compute; true if this was one.
template <Target kTarget, class S>
__device__ __forceinline__ bool settle_row(const CrossEntropyCall<S>& c, const RowTarget<kTarget, S>& target,
                                           std::int64_t row) {
  if constexpr (kTarget == Target::kProbabilities) return false;
  if (!target.ignored && !target.invalid) return false;
  fill_row(c, row, target.ignored ? accumulation_t<S>(0) : accumulation_t<S>(NAN));
  return true;
}

template <Target kTarget, Layout kLayout, class S>
__global__ void __launch_bounds__(kMostThreadsOfOneSweep, kLayout == Layout::kVectors ? 4 : 2)
    softmax_cross_entropy_kernel(const CrossEntropyCall<S> c, const RowRounds rounds) {
  using A = accumulation_t<S>;
  using ShareOfRow = CrossEntropyShare<kTarget, kLayout, S, Order::kValue>;
  constexpr int V = Words<S>::kSize;
  const A k = c.inverse_t * kLog2E<A>;
  for_rows(c.rows, [&](std::int64_t row) {
    const RowTarget<kTarget, S> target(c, row);
    if (settle_row(c, target, row)) return;
    const S* const z = c.logits + row * c.logits_stride;
    RunningRow<A, kTarget != Target::kIndex> r;
    for (int round = 0; round < rounds.all; ++round) {
      const ShareOfRow share(round, rounds);
      typename ShareOfRow::Vector x[ShareOfRow::kCount];
      share.load(x, z, -static_cast<A>(INFINITY));
      A max = r.max;
#pragma unroll
      for (int i = 0; i < ShareOfRow::kCount; ++i) {
        if (share.ends_at(i)) break;
        A top = x[i][0];
#pragma unroll
        for (int j = 1; j < V; ++j) top = Larger{}(top, x[i][j]);
        max = Larger{}(max, top);
      }
      r.raise_to(max, k);
      const A pivot = r.pivot();
#pragma unroll
      for (int i = 0; i < ShareOfRow::kCount; ++i) {
        if (share.ends_at(i)) break;
        A sum = 0, weight = 0, gaps = 0;
        [[maybe_unused]] A q[V];
        if constexpr (kTarget == Target::kProbabilities) target.weights(share, i, q);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const A t = (x[i][j] - pivot) * k;
          sum += exp2_nonpositive(t);
          if constexpr (kTarget == Target::kSmoothedIndex) {
            if (kLayout == Layout::kVectors || share.has(i, j)) gaps += t;
          }
          if constexpr (kTarget == Target::kProbabilities) {
            weight += q[j];
            gaps += cross_entropy_term(q[j], t);
          }
        }
        r.sum += sum;
        if constexpr (kTarget == Target::kSmoothedIndex) {
          if (share.has(i)) r.gaps += gaps;
        }
        if constexpr (kTarget == Target::kProbabilities) {
          r.weight += weight;
          r.gaps += gaps;
        }
      }
      if constexpr (kTarget == Target::kSmoothedIndex) r.weight += A(share.count_all(round + 1 == rounds.all));
    }
    r.join(k);
    if (threadIdx.x != 0) return;
    const A log_sum = std::log(r.sum);
    A total_q = r.weight, gap = r.gaps * A(-0.69314718055994530942);  // of natural logarithms
    if constexpr (kTarget != Target::kProbabilities) {
      const Smoothing<A>& s = target.smoothing;
      const A of_index = cross_entropy_term(s.keep, (r.max - load(z[target.index])) * c.inverse_t);
      gap = kTarget == Target::kIndex ? of_index : of_index + s.floor * gap;
      total_q = s.keep + s.floor * A(c.classes);
    }
    c.per_row[row] = cross_entropy_value(log_sum, total_q, gap);
    // What rounding takes from the maximum is given to the sum.
    const A max = r.max * c.inverse_t;
    c.statistics[2 * row] = max;
    c.statistics[2 * row + 1] = log_sum + fused(r.max, c.inverse_t, -max);
  });
}

// p of one row's logits, divided by `scale`: the exponent is a multiply-add, and what it loses in rounding the row's sum
// is the same for all classes.
template <class A>
struct RowSoftmax {
  A inverse_t, max, log2_sum, scale;
  template <class S>
  __device__ __forceinline__ RowSoftmax(const CrossEntropyCall<S>& c, std::int64_t row)
      : inverse_t(c.inverse_t), max(c.statistics_in[2 * row]) {
    const A log_sum = c.statistics_in[2 * row + 1];
    log2_sum = log_sum * kLog2E<A>;
    scale = A(1) - fused(log_sum, kLog2E<A>, -log2_sum) * A(0.69314718055994530942);
  }
  __device__ __forceinline__ A operator()(A z) const {
    return exp2_nonpositive(fused(fused(z, inverse_t, -max), kLog2E<A>, -log2_sum));
  }
};

template <Target kTarget, Layout kLayout, class S>
__global__ void __launch_bounds__(kMostThreadsOfOneSweep, kLayout == Layout::kVectors ? 4 : 2)
    softmax_cross_entropy_backward_kernel(const CrossEntropyCall<S> c, const RowRounds rounds) {
  using A = accumulation_t<S>;
  using ShareOfRow = CrossEntropyShare<kTarget, kLayout, S, Order::kBackward>;
  constexpr int V = Words<S>::kSize;
  for_rows(c.rows, [&](std::int64_t row) {
    const RowTarget<kTarget, S> target(c, row);
    if (settle_row(c, target, row)) return;
    const S* const z = c.logits + row * c.logits_stride;
    S* const out = c.out + row * c.classes;
    const RowSoftmax<A> p(c, row);
    const A grad = c.grad[row], inverse_t = c.inverse_t,
            total_q_t = target.template total_q<ShareOfRow>(c.classes, rounds) * inverse_t * p.scale;
    const auto slope = [&](A z_j, A q_j) {  // 1 / T in the sum and the target once, instead of in every element
      return grad * cross_entropy_slope(p(z_j), q_j * inverse_t, total_q_t, A(1));
    };
    [[maybe_unused]] bool has_index = false;
    for (int round = 0; round < rounds.all; ++round) {
      const ShareOfRow share(round, rounds);
      typename ShareOfRow::Vector x[ShareOfRow::kCount];
      share.load(x, z, 0);
#pragma unroll
      for (int i = 0; i < ShareOfRow::kCount; ++i) {
        A values[V], q[V];
        if constexpr (kTarget == Target::kProbabilities)
          target.weights(share, i, q);
        else
          has_index |= share.contains(i, target.index);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const A q_j = kTarget == Target::kProbabilities ? q[j] : target.smoothing.floor;
          values[j] = slope(x[i][j], q_j);
        }
        share.store(out, i, values);
      }
    }
    if constexpr (kTarget != Target::kProbabilities) {
      // The thread that wrote the target's class as if it were any other.
      if (has_index) out[target.index] = store<S>(slope(load(z[target.index]), target.smoothing.q(A(1))));
    }
  });
}

template <Target kTarget, Layout kLayout, class S>
__global__ void __launch_bounds__(kMostRowThreads<kLayout, S>, 1)
    softmax_cross_entropy_double_backward_kernel(const CrossEntropyCall<S> c, const RowRounds rounds) {
  using A = accumulation_t<S>;
  using ShareOfRow = CrossEntropyShare<kTarget, kLayout, S, Order::kDoubleBackward>;
  constexpr int V = Words<S>::kSize;
  const KeptRounds<S, 2 * ShareOfRow::kCount> kept(rounds);
  for_rows(c.rows, [&](std::int64_t row) {
    const RowTarget<kTarget, S> target(c, row);
    if (settle_row(c, target, row)) return;
    const S *const z = c.logits + row * c.logits_stride, *const u = c.u + row * c.u_stride;
    S* const out = c.out + row * c.classes;
    const RowSoftmax<A> p(c, row);
    const A grad = c.grad[row], inverse_t = c.inverse_t,
            total_q = target.template total_q<ShareOfRow>(c.classes, rounds);
    typename ShareOfRow::Vector x[ShareOfRow::kCount], y[ShareOfRow::kCount];
    const auto load_round = [&](const ShareOfRow& share) {
      // Past the end of a row stand logits of probability zero: 0, against a maximum far below, would be infinite.
      share.load(x, z, -static_cast<A>(INFINITY));
      share.load(y, u, 0);
    };
    A sums[2] = {};  // sum p u, and sum u or sum q u
    for (int round = rounds.all - 1; round >= 0; --round) {
      const ShareOfRow share(round, rounds);
      load_round(share);
      if (kept.has(round)) kept.keep(round, x, y);
#pragma unroll
      for (int i = 0; i < ShareOfRow::kCount; ++i) {
        [[maybe_unused]] A q[V];
        if constexpr (kTarget == Target::kProbabilities) target.weights(share, i, q);
        A mean_u = 0, dot = 0;
#pragma unroll
        for (int j = 0; j < V; ++j) {
          mean_u += p(x[i][j]) * y[i][j];
          if constexpr (kTarget == Target::kSmoothedIndex) dot += y[i][j];
          if constexpr (kTarget == Target::kProbabilities) dot += q[j] * y[i][j];
        }
        sums[0] += mean_u;
        sums[1] += dot;
      }
    }
    row_sums(sums);
    const A mean_u = sums[0] * p.scale, factor = grad * (total_q * inverse_t * inverse_t) * p.scale;
    if (threadIdx.x == 0) {
      A dot_qu = sums[1];
      if constexpr (kTarget != Target::kProbabilities)
        dot_qu = target.smoothing.floor * dot_qu + target.smoothing.keep * load(u[target.index]);
      c.per_row[row] = (total_q * mean_u - dot_qu) * inverse_t;
    }
    for (int round = 0; round < rounds.all; ++round) {
      const ShareOfRow share(round, rounds);
      if (kept.has(round))
        kept.take(round, x, y);
      else if (round > 0)
        load_round(share);
#pragma unroll
      for (int i = 0; i < ShareOfRow::kCount; ++i) {
        A values[V];
#pragma unroll
        for (int j = 0; j < V; ++j) values[j] = cross_entropy_bend(p(x[i][j]), y[i][j], mean_u, factor, A(1));
        share.store(out, i, values);
      }
    }
  });
}

template <Target kTarget, Layout kLayout, class S>
cudaError_t launch_cross_entropy_as(Order order, const CrossEntropyCall<S>& c, cudaStream_t stream) {
  constexpr Target kOfBackward = kTarget == Target::kSmoothedIndex ? Target::kIndex : kTarget;  // the same there
  const bool twice = order == Order::kDoubleBackward;
  const auto g = rows_geometry<kLayout, S>(c.rows, c.classes, cross_entropy_vectors<kTarget, kLayout, S>(order),
                                           twice ? 2 : 1, twice);
  const auto with = [&](auto kernel) { return launch(kernel, g.grid, g.block, g.shared, stream, c, g.rounds); };
  switch (order) {
    case Order::kValue: return with(softmax_cross_entropy_kernel<kTarget, kLayout, S>);
    case Order::kBackward: return with(softmax_cross_entropy_backward_kernel<kOfBackward, kLayout, S>);
    default: return with(softmax_cross_entropy_double_backward_kernel<kTarget, kLayout, S>);
  }
}

template <class S>
cudaError_t launch_softmax_cross_entropy(Order order, const CrossEntropyCall<S>& c, cudaStream_t stream) {
  Layout layout = layout_of_rows<S>(c.classes, c.logits_stride, c.logits, static_cast<const S*>(c.out));
  if (layout == Layout::kVectors && c.u && !aligned<S>(c.u_stride, c.u)) layout = Layout::kParts;
  return with_layout<S>(layout, [&](auto known) {
    constexpr Layout kLayout = known;
    if (!c.indices) return launch_cross_entropy_as<Target::kProbabilities, kLayout>(order, c, stream);
    return c.label_smoothing == 0 ? launch_cross_entropy_as<Target::kIndex, kLayout>(order, c, stream)
                                  : launch_cross_entropy_as<Target::kSmoothedIndex, kLayout>(order, c, stream);
  });
}

}  // namespace rk::cuda
