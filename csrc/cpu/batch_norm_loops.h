// The inner loops of batch_norm_double_backward on data in the accumulation type.  "Along": runs of one channel, S
// adjacent elements and then a stride.  "Across": rows of C adjacent channels.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../math/batch_norm.h"
#include "norm_sums.h"

namespace rk::cpu {

using Sums = BatchNormSums<double>;

RK_HOST_DEVICE void add(Sums& to, const Sums& from) {
  to.u += from.u;
  to.g += from.g;
  to.ug += from.ug;
  to.ux += from.ux;
  to.gx += from.gx;
}

// The tensors of a call at one place, in the accumulation type or as BFloat16.  An output that is not wanted is null, and
// so is x where nothing depends on it: then only sum u g is taken, and grad = grad_u u + grad_1 written.
template <class S>
struct Place {
  const S *u, *g, *x;
  S *grad, *grad_x;
  bool adds;  // to grad_x
};

// Lane by lane to sums[0], sums[1], ...
template <class A>
RK_HOST_DEVICE void add_lanes(const NormLanes<A>& from, Sums* sums, int lanes) {
  for (int k = 0; k < lanes; ++k) add(sums[k], {from.u[k], from.h[k], from.uh[k], from.ux[k], from.hx[k]});
}

// Adds the sums over `runs` runs of `length` to s, those with xh still without their factor r.  Fetches the run behind
// each, since runs end before the processor has noticed them.
template <class S, class A>
RK_MULTIVERSION static void sums_along(const S* __restrict__ u, const S* __restrict__ g, const S* __restrict__ x,
                                       int64_t runs, int64_t stride, int64_t length, A mean, Sums& s) {
  constexpr int L = kLanes<A>;
  if (!x) {
    for (int64_t run = 0; run < runs; ++run)
      s.ug += sum_over<A>(
          length, [=](int64_t j) RK_INLINE_LAMBDA { return load(u[run * stride + j]) * load(g[run * stride + j]); });
    return;
  }
  NormLanes<A> first, second;  // two, to hide the latency of the additions
  Lanes<A> v, w, d, v_2, w_2, d_2;
  for (int64_t run = 0; run < runs; ++run, u += stride, g += stride, x += stride) {
    int64_t j = 0;
    for (; j + 2 * L <= length; j += 2 * L) {
      __builtin_prefetch(u + j + stride);
      __builtin_prefetch(g + j + stride);
      __builtin_prefetch(x + j + stride);
      load_two(v, v_2, u + j);
      load_two(w, w_2, g + j);
      load_two(d, d_2, x + j);
      first.template add<true>(d - mean, w, v);
      second.template add<true>(d_2 - mean, w_2, v_2);
    }
    if constexpr (std::is_same_v<S, A>)
      if (j + L <= length) {
        load_lanes<A>(v, u + j);
        load_lanes<A>(w, g + j);
        load_lanes<A>(d, x + j);
        first.template add<true>(d - mean, w, v);
        j += L;
      }
    for (; j < length; j += L) {  // behind the end u and g are zero, and so is all they are part of
      const int64_t n = std::min<int64_t>(L, length - j);
      load_lanes(v, u + j, n);
      load_lanes(w, g + j, n);
      load_lanes(d, x + j, n);
      second.template add<true>(d - mean, w, v);
    }
  }
  s.u += horizontal_sum_in_double<A>(first.u, second.u);
  s.g += horizontal_sum_in_double<A>(first.h, second.h);
  s.ug += horizontal_sum_in_double<A>(first.uh, second.uh);
  s.ux += horizontal_sum_in_double<A>(first.ux, second.ux);
  s.gx += horizontal_sum_in_double<A>(first.hx, second.hx);
}

template <class A>
RK_MULTIVERSION static void apply_along(const Place<A>& p, int64_t runs, int64_t stride, int64_t length, A mean,
                                        const BatchNormCoefficients<A>& c) {
  const A* __restrict__ u = p.u, * __restrict__ g = p.g, * __restrict__ x = p.x;
  A* __restrict__ grad = p.grad, * __restrict__ grad_x = p.grad_x;
  for (int64_t run = 0; run < runs; ++run) {
    const int64_t o = run * stride;
    if (!x) {
      for (int64_t j = o; j < o + length; ++j) grad[j] = c.grad_u * u[j] + c.grad_1;
    } else if (grad && grad_x && !p.adds) {
      for (int64_t j = o; j < o + length; ++j) {
        const A d = x[j] - mean, v = u[j];
        grad[j] = c.grad_u * v + (c.grad_x * d + c.grad_1);
        grad_x[j] = c.x_u * v + (c.x_g * g[j] + (c.x_x * d + c.x_1));
      }
    } else {
      for (int64_t j = o; grad && j < o + length; ++j)
        grad[j] = c.grad_u * u[j] + (c.grad_x * (x[j] - mean) + c.grad_1);
      for (int64_t j = o; grad_x && !p.adds && j < o + length; ++j)
        grad_x[j] = c.x_u * u[j] + (c.x_g * g[j] + (c.x_x * (x[j] - mean) + c.x_1));
      for (int64_t j = o; grad_x && p.adds && j < o + length; ++j)
        grad_x[j] += c.x_u * u[j] + (c.x_g * g[j] + (c.x_x * (x[j] - mean) + c.x_1));
    }
  }
}

// The same for BFloat16 as it is stored; grad_x is not added to.
RK_MULTIVERSION static void apply_along(const Place<BFloat16>& p, int64_t runs, int64_t stride, int64_t length,
                                        float mean, const BatchNormCoefficients<float>& c) {
  constexpr int64_t step = 2 * kLanes<float>;
  Lanes<float> v, w = {}, d = {}, v_2, w_2 = {}, d_2 = {};
  for (int64_t run = 0; run < runs; ++run) {
    int64_t j = run * stride;
    const int64_t end = j + length;
    for (; j + step <= end; j += step) {
      load_two(v, v_2, p.u + j);
      if (p.x) {  // else d stays zero
        load_two(d, d_2, p.x + j);
        d -= mean;
        d_2 -= mean;
      }
      if (p.grad)
        store_two(p.grad + j, c.grad_u * v + (c.grad_x * d + c.grad_1), c.grad_u * v_2 + (c.grad_x * d_2 + c.grad_1));
      if (!p.grad_x) continue;
      load_two(w, w_2, p.g + j);
      store_two(p.grad_x + j, c.x_u * v + (c.x_g * w + (c.x_x * d + c.x_1)),
                c.x_u * v_2 + (c.x_g * w_2 + (c.x_x * d_2 + c.x_1)));
    }
    for (; j < end; ++j) {
      const float u = load(p.u[j]), x = p.x ? load(p.x[j]) - mean : 0.0f;
      if (p.grad) p.grad[j] = store<BFloat16>(c.grad_u * u + (c.grad_x * x + c.grad_1));
      if (p.grad_x) p.grad_x[j] = store<BFloat16>(c.x_u * u + (c.x_g * load(p.g[j]) + (c.x_x * x + c.x_1)));
    }
  }
}

// Adds the sums over `rows` rows to sums[channel], a strip of channels at a time, which stays in registers.
template <class A>
RK_MULTIVERSION static void sums_across(const A* __restrict__ u, const A* __restrict__ g, const A* __restrict__ x,
                                        int64_t rows, int64_t channels, const A* __restrict__ mean, Sums* sums) {
  constexpr int L = kLanes<A>;
  if (!x) {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t j = 0; j < channels; ++j) sums[j].ug += u[row * channels + j] * g[row * channels + j];
    return;
  }
  Lanes<A> v, w, d;
  int64_t begin = 0;
  for (; begin + 2 * L <= channels; begin += 2 * L) {  // a cache line of float32
    NormLanes<A> first, second;
    Lanes<A> mean_1, mean_2;
    load_lanes<A>(mean_1, mean + begin);
    load_lanes<A>(mean_2, mean + begin + L);
    for (int64_t o = begin; o < begin + rows * channels; o += channels) {
      const int64_t next = o + rows * channels;  // the tile behind this one, which comes next
      __builtin_prefetch(u + next, 0, 2);
      __builtin_prefetch(g + next, 0, 2);
      __builtin_prefetch(x + next, 0, 2);
      load_lanes<A>(v, u + o);
      load_lanes<A>(w, g + o);
      load_lanes<A>(d, x + o);
      first.template add<true>(d - mean_1, w, v);
      load_lanes<A>(v, u + o + L);
      load_lanes<A>(w, g + o + L);
      load_lanes<A>(d, x + o + L);
      second.template add<true>(d - mean_2, w, v);
    }
    add_lanes(first, sums + begin, L);
    add_lanes(second, sums + begin + L, L);
  }
  for (; begin < channels; begin += L) {
    const int width = int(std::min<int64_t>(L, channels - begin));
    NormLanes<A> strip;
    Lanes<A> means;
    load_lanes<A>(means, mean + begin, width);
    for (int64_t o = begin; o < begin + rows * channels; o += channels) {
      load_lanes<A>(v, u + o, width);
      load_lanes<A>(w, g + o, width);
      load_lanes<A>(d, x + o, width);
      strip.template add<true>(d - means, w, v);
    }
    add_lanes(strip, sums + begin, width);
  }
}

// The coefficients of all channels, one array for each.
template <class A>
struct ChannelCoefficients {
  const A *mean, *grad_u, *grad_x, *grad_1, *x_u, *x_g, *x_x, *x_1;
};

// One vector of a row, or `width` elements of one: written out, since gcc gives up on so many arrays.
template <bool kGrad, bool kX, class A>
RK_HOST_DEVICE void apply_lanes(const Place<A>& p, int64_t o, int64_t j, int64_t width,
                                const ChannelCoefficients<A>& c) {
  constexpr int L = kLanes<A>;
  const auto get = [=](const A* from) RK_INLINE_LAMBDA {
    Lanes<A> to;
    if (width == L)
      load_lanes<A>(to, from);
    else
      load_lanes<A>(to, from, width);
    return to;
  };
  const auto put = [=](A* to, const Lanes<A>& from) RK_INLINE_LAMBDA { std::memcpy(to, &from, width * sizeof(A)); };
  const Lanes<A> d = get(p.x + o + j) - get(c.mean + j), v = get(p.u + o + j);
  if constexpr (kGrad) put(p.grad + o + j, get(c.grad_u + j) * v + (get(c.grad_x + j) * d + get(c.grad_1 + j)));
  if constexpr (kX) {
    const Lanes<A> w = get(p.g + o + j);
    Lanes<A> sum = get(c.x_u + j) * v + (get(c.x_g + j) * w + (get(c.x_x + j) * d + get(c.x_1 + j)));
    if (p.adds) sum += get(p.grad_x + o + j);
    put(p.grad_x + o + j, sum);
  }
}

template <bool kGrad, bool kX, class A>
RK_HOST_DEVICE void apply_rows(const Place<A>& p, int64_t rows, int64_t channels, const ChannelCoefficients<A>& c) {
  constexpr int L = kLanes<A>;
  for (int64_t o = 0; o < rows * channels; o += channels) {
    const int64_t next = o + rows * channels;  // the rows behind these, which come next
    int64_t j = 0;
    for (; j + L <= channels; j += L) {
      __builtin_prefetch(p.x + next + j);
      __builtin_prefetch(p.u + next + j);
      if constexpr (kX) __builtin_prefetch(p.g + next + j);
      if constexpr (kGrad) __builtin_prefetch(p.grad + next + j, 1);
      if constexpr (kX) __builtin_prefetch(p.grad_x + next + j, 1);
      apply_lanes<kGrad, kX>(p, o, j, L, c);
    }
    if (j < channels) apply_lanes<kGrad, kX>(p, o, j, channels - j, c);
  }
}

template <class A>
RK_MULTIVERSION static void apply_across(const Place<A>& p, int64_t rows, int64_t channels,
                                         const ChannelCoefficients<A>& c) {
  if (!p.x) {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t j = 0; j < channels; ++j)
        p.grad[row * channels + j] = c.grad_u[j] * p.u[row * channels + j] + c.grad_1[j];
  } else if (p.grad && p.grad_x) {
    apply_rows<true, true>(p, rows, channels, c);
  } else if (p.grad) {
    apply_rows<true, false>(p, rows, channels, c);
  } else if (p.grad_x) {
    apply_rows<false, true>(p, rows, channels, c);
  }
}

}  // namespace rk::cpu
