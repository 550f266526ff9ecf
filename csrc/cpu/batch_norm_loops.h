// The inner loops of batch_norm_double_backward on data in the accumulation type.  "Along": runs of one channel, S
// adjacent elements and then a stride.  "Across": rows of C adjacent channels.
#pragma once

#include <algorithm>

#include "../math/batch_norm.h"
#include "simd.h"

namespace rk::cpu {

using Sums = BatchNormSums<double>;

// The tensors of a call at one place, in the accumulation type.  An output that is not wanted is null, and so is x where
// nothing depends on it: then only sum u g is taken, and grad = grad_u u + grad_1 written.
template <class A>
struct Place {
  const A *u, *g, *x;
  A *grad, *grad_x;
};

// Lanes of one vector register or two: five sums of them stay in registers.
template <class A>
inline constexpr int kSumLanes = 64 / sizeof(A);

// Adds the sums over `runs` runs of `length` to s, those with xh still without their factor r.
template <class A>
RK_HOST_DEVICE void sums_along_of(const A* __restrict__ u, const A* __restrict__ g, const A* __restrict__ x,
                                  int64_t runs, int64_t stride, int64_t length, A mean, Sums& s) {
  constexpr int L = kSumLanes<A>;
  if (!x) {
    for (int64_t run = 0; run < runs; ++run)
      s.ug +=
          lane_sum<A>(length, [=](int64_t j) RK_INLINE_LAMBDA { return u[run * stride + j] * g[run * stride + j]; });
    return;
  }
  A su[L] = {}, sg[L] = {}, sug[L] = {}, sux[L] = {}, sgx[L] = {};
  for (int64_t run = 0; run < runs; ++run, u += stride, g += stride, x += stride) {
    int64_t j = 0;
    for (; j + L <= length; j += L)
      for (int k = 0; k < L; ++k) {
        const A d = x[j + k] - mean, v = u[j + k], w = g[j + k];
        su[k] += v;
        sg[k] += w;
        sug[k] += v * w;
        sux[k] += v * d;
        sgx[k] += w * d;
      }
    for (int k = 0; j < length; ++j, ++k) {
      const A d = x[j] - mean, v = u[j], w = g[j];
      su[k] += v;
      sg[k] += w;
      sug[k] += v * w;
      sux[k] += v * d;
      sgx[k] += w * d;
    }
  }
  for (int k = 0; k < L; ++k) {
    s.u += su[k];
    s.g += sg[k];
    s.ug += sug[k];
    s.ux += sux[k];
    s.gx += sgx[k];
  }
}

template <class A>
RK_HOST_DEVICE void apply_along_of(const Place<A>& p, int64_t runs, int64_t stride, int64_t length, A mean,
                                   const BatchNormCoefficients<A>& c) {
  const A* __restrict__ u = p.u, * __restrict__ g = p.g, * __restrict__ x = p.x;
  A* __restrict__ grad = p.grad, * __restrict__ grad_x = p.grad_x;
  for (int64_t run = 0; run < runs; ++run) {
    const int64_t o = run * stride;
    if (!x) {
      for (int64_t j = o; j < o + length; ++j) grad[j] = c.grad_u * u[j] + c.grad_1;
    } else if (grad && grad_x) {
      for (int64_t j = o; j < o + length; ++j) {
        const A d = x[j] - mean, v = u[j];
        grad[j] = c.grad_u * v + (c.grad_x * d + c.grad_1);
        grad_x[j] = c.x_u * v + (c.x_g * g[j] + (c.x_x * d + c.x_1));
      }
    } else if (grad) {
      for (int64_t j = o; j < o + length; ++j) grad[j] = c.grad_u * u[j] + (c.grad_x * (x[j] - mean) + c.grad_1);
    } else if (grad_x) {
      for (int64_t j = o; j < o + length; ++j)
        grad_x[j] = c.x_u * u[j] + (c.x_g * g[j] + (c.x_x * (x[j] - mean) + c.x_1));
    }
  }
}

// Adds the sums over `rows` rows to sums[channel], a strip of channels at a time, which stays in registers.
template <class A>
RK_HOST_DEVICE void sums_across_of(const A* __restrict__ u, const A* __restrict__ g, const A* __restrict__ x,
                                   int64_t rows, int64_t channels, const A* __restrict__ mean, Sums* sums) {
  constexpr int L = kSumLanes<A>;
  if (!x) {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t j = 0; j < channels; ++j) sums[j].ug += u[row * channels + j] * g[row * channels + j];
    return;
  }
  for (int64_t begin = 0; begin < channels; begin += L) {
    A su[L] = {}, sg[L] = {}, sug[L] = {}, sux[L] = {}, sgx[L] = {};
    const int width = int(std::min<int64_t>(L, channels - begin));
    if (width == L) {
      A m[L];
      for (int k = 0; k < L; ++k) m[k] = mean[begin + k];
      for (int64_t o = begin; o < begin + rows * channels; o += channels)
        for (int k = 0; k < L; ++k) {
          const A d = x[o + k] - m[k], v = u[o + k], w = g[o + k];
          su[k] += v;
          sg[k] += w;
          sug[k] += v * w;
          sux[k] += v * d;
          sgx[k] += w * d;
        }
    } else {
      for (int64_t o = begin; o < begin + rows * channels; o += channels)
        for (int k = 0; k < width; ++k) {
          const A d = x[o + k] - mean[begin + k], v = u[o + k], w = g[o + k];
          su[k] += v;
          sg[k] += w;
          sug[k] += v * w;
          sux[k] += v * d;
          sgx[k] += w * d;
        }
    }
    for (int k = 0; k < width; ++k) {
      Sums& s = sums[begin + k];
      s.u += su[k];
      s.g += sg[k];
      s.ug += sug[k];
      s.ux += sux[k];
      s.gx += sgx[k];
    }
  }
}

// The coefficients of all channels, one array for each.
template <class A>
struct ChannelCoefficients {
  const A *mean, *grad_u, *grad_x, *grad_1, *x_u, *x_g, *x_x, *x_1;
};

template <class A>
RK_HOST_DEVICE void apply_across_of(const Place<A>& p, int64_t rows, int64_t channels,
                                    const ChannelCoefficients<A>& c) {
  const A* __restrict__ u = p.u, * __restrict__ g = p.g, * __restrict__ x = p.x;
  A* __restrict__ grad = p.grad, * __restrict__ grad_x = p.grad_x;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t o = row * channels;
    if (!x) {
      for (int64_t j = 0; j < channels; ++j) grad[o + j] = c.grad_u[j] * u[o + j] + c.grad_1[j];
    } else if (grad && grad_x) {
      for (int64_t j = 0; j < channels; ++j) {
        const A d = x[o + j] - c.mean[j], v = u[o + j];
        grad[o + j] = c.grad_u[j] * v + (c.grad_x[j] * d + c.grad_1[j]);
        grad_x[o + j] = c.x_u[j] * v + (c.x_g[j] * g[o + j] + (c.x_x[j] * d + c.x_1[j]));
      }
    } else if (grad) {
      for (int64_t j = 0; j < channels; ++j)
        grad[o + j] = c.grad_u[j] * u[o + j] + (c.grad_x[j] * (x[o + j] - c.mean[j]) + c.grad_1[j]);
    } else if (grad_x) {
      for (int64_t j = 0; j < channels; ++j)
        grad_x[o + j] = c.x_u[j] * u[o + j] + (c.x_g[j] * g[o + j] + (c.x_x[j] * (x[o + j] - c.mean[j]) + c.x_1[j]));
    }
  }
}

#define RK_BATCH_NORM_LOOPS(A)                                                                                     \
  RK_MULTIVERSION static void sums_along(const A* u, const A* g, const A* x, int64_t runs, int64_t stride,         \
                                         int64_t length, A mean, Sums& s) {                                        \
    sums_along_of<A>(u, g, x, runs, stride, length, mean, s);                                                      \
  }                                                                                                                \
  RK_MULTIVERSION static void apply_along(const Place<A>& p, int64_t runs, int64_t stride, int64_t length, A mean, \
                                          const BatchNormCoefficients<A>& c) {                                     \
    apply_along_of<A>(p, runs, stride, length, mean, c);                                                           \
  }                                                                                                                \
  RK_MULTIVERSION static void sums_across(const A* u, const A* g, const A* x, int64_t rows, int64_t channels,      \
                                          const A* mean, Sums* sums) {                                             \
    sums_across_of<A>(u, g, x, rows, channels, mean, sums);                                                        \
  }                                                                                                                \
  RK_MULTIVERSION static void apply_across(const Place<A>& p, int64_t rows, int64_t channels,                      \
                                           const ChannelCoefficients<A>& c) {                                      \
    apply_across_of<A>(p, rows, channels, c);                                                                      \
  }
RK_BATCH_NORM_LOOPS(float)
RK_BATCH_NORM_LOOPS(double)
#undef RK_BATCH_NORM_LOOPS

}  // namespace rk::cpu
