// The kernels of batch_norm_double_backward against plain loops in double: random shapes in both layouts, alignments,
// absent cotangents and outputs, fixed statistics, one and several cotangents.
#include "batch_norm.cuh"

#include <algorithm>
#include <vector>

#include "testing.h"

namespace {

using rk::cuda::BatchNormCall;
using namespace testing;

template <class S>
struct Problem {
  using A = rk::cuda::accumulation_t<S>;
  std::int64_t images, channels, inner, cotangents;
  bool training, has_u, has_a, writes_grad, writes_x;
  Buffer<S> u, g, x, grad, grad_x;
  Buffer<A> weight, a, b, mean, invstd, grad_weight, partial, coefficients;

  Problem(Draw& draw, std::int64_t n, std::int64_t c, std::int64_t s, std::int64_t k)
      : images(n),
        channels(c),
        inner(s),
        cotangents(k),
        training(draw(0, 2) > 0),
        has_u(draw(0, 4) > 0),
        has_a(k == 1 && draw(0, 1)),
        writes_grad(draw(0, 4) > 0),
        writes_x(draw(0, 2) > 0),
        u(k * n * c * s, draw(0, 8)),
        g(k * n * c * s, draw(0, 8)),
        x(n * c * s, draw(0, 8)),
        grad(k * n * c * s, draw(0, 8)),
        grad_x(n * c * s, draw(0, 8)),
        weight(c),
        a(c),
        b(c),
        mean(c),
        invstd(c),
        grad_weight(c),
        partial(k * rk::cuda::batch_norm_shares(call()) * rk::cuda::kBatchNormSums * c),
        coefficients(k * rk::cuda::kBatchNormCoefficients * c) {
    for (auto* image : {&u, &g, &x}) image->fill_normal(draw.random);
    for (auto* values : {&weight, &a, &b}) values->fill_normal(draw.random);
    for (std::int64_t k = 0; k < c; ++k) {
      double total = 0, square = 0;
      for_channel(k, [&](std::int64_t i) {
        total += to_double(x[i]);
        square += to_double(x[i]) * to_double(x[i]);
      });
      const double count = static_cast<double>(n * s), m = total / count;
      mean[k] = static_cast<A>(m);
      invstd[k] = static_cast<A>(1.0 / std::sqrt(square / count - m * m + 0.1));
    }
  }

  template <class F>
  void for_channel(std::int64_t channel, const F& f) const {
    for (std::int64_t n = 0; n < images; ++n)
      for (std::int64_t s = 0; s < inner; ++s) f((n * channels + channel) * inner + s);
  }

  BatchNormCall<S> call() {
    BatchNormCall<S> c{};
    c.images = images;
    c.channels = channels;
    c.inner = inner;
    c.cotangents = cotangents;
    c.u = has_u ? u.data() : nullptr;
    c.g = g.data();
    c.x = training || has_a || writes_x ? x.data() : nullptr;
    c.grad = writes_grad ? grad.data() : nullptr;
    c.grad_x = writes_x ? grad_x.data() : nullptr;
    c.weight = weight.data();
    c.a = has_a ? a.data() : nullptr;
    c.b = has_a ? b.data() : nullptr;
    c.mean = mean.data();
    c.invstd = invstd.data();
    c.grad_weight = grad_weight.data();
    c.training = training;
    c.shares = rk::cuda::batch_norm_shares(c);
    c.partial = partial.data();
    c.coefficients = coefficients.data();
    return c;
  }
};

template <class S>
void test_shape(const Options& options, Draw& draw, std::int64_t n, std::int64_t c, std::int64_t s) {
  using A = rk::cuda::accumulation_t<S>;
  Problem<S> t(draw, n, c, s, draw(0, 1) ? 1 : draw(2, 4));
  const std::string shape = std::to_string(t.cotangents) + " cotangents of [" + std::to_string(n) + "," +
                            std::to_string(c) + "," + std::to_string(s) + "] ";
  run_in_all_orders(
      options, shape, [&] { return rk::cuda::launch_batch_norm(t.call(), nullptr); }, t.grad, t.grad_x, t.grad_weight);
  const double count = static_cast<double>(n * s), loose = 100 * epsilon<A>();
  for (std::int64_t k = 0; k < c; ++k) {
    const double m = t.mean[k], r = t.invstd[k], w = t.weight[k], a = t.has_a ? t.a[k] : 0, b = t.has_a ? t.b[k] : 0;
    const double size = (1 + std::fabs(w) + std::fabs(a) + std::fabs(b)) * (1 + r) * (1 + r) * 10;
    std::vector<double> second(n * c * s);  // grad_x, the sum over the cotangents
    double weight = 0;
    for (std::int64_t cotangent = 0; cotangent < t.cotangents; ++cotangent) {
      const std::int64_t offset = cotangent * n * c * s;
      const auto u = [&](std::int64_t i) { return t.has_u ? to_double(t.u[offset + i]) : 0.0; };
      double su = 0, sg = 0, sug = 0, sux = 0, sgx = 0;
      t.for_channel(k, [&](std::int64_t i) {
        const double xh = (to_double(t.x[i]) - m) * r, g = to_double(t.g[offset + i]);
        su += u(i);
        sg += g;
        sug += u(i) * g;
        sux += u(i) * xh;
        sgx += g * xh;
      });
      const double kk = t.training ? sug - su * sg / count - sux * sgx / count : sug;
      weight += r * kk;
      t.for_channel(k, [&](std::int64_t i) {
        const double xh = (to_double(t.x[i]) - m) * r, g = to_double(t.g[offset + i]);
        const double pu = t.training ? u(i) - su / count - xh * sux / count : u(i);
        const double pg = t.training ? g - sg / count - xh * sgx / count : g;
        const double grad = w * r * pu + a * xh + b;
        second[i] += (t.training ? -(w * r * r / count) * (kk * xh + sgx * pu + sux * pg) : 0.0) + a * r * pg;
        if (t.writes_grad)
          expect_close(to_double(t.grad[offset + i]), grad, epsilon<S>() * std::fabs(grad) + loose * size,
                       shape + "grad");
      });
    }
    expect_close(t.grad_weight[k], weight, loose * size * (1 + count) * double(t.cotangents), shape + "grad_weight");
    t.for_channel(k, [&](std::int64_t i) {
      if (t.writes_x)
        expect_close(to_double(t.grad_x[i]), second[i],
                     epsilon<S>() * std::fabs(second[i]) + loose * size * double(t.cotangents), shape + "grad_x");
    });
  }
}

}  // namespace

int main(int argc, char** argv) {
  const Options options(argc, argv);
  Draw draw{std::mt19937(options.seed)};
  for (int round = 0; round < options.rounds; ++round) {
    test_shape<float>(options, draw, draw(1, 9), draw(1, 5), draw(2, 40));
    test_shape<__half>(options, draw, draw(1, 9), draw(1, 5), draw(2, 40));
    test_shape<float>(options, draw, draw(1, 60), draw(1, 40), 1);
    test_shape<__half>(options, draw, draw(1, 60), draw(1, 40), 1);
  }
  test_shape<float>(options, draw, 600, 5, 1);
  test_shape<float>(options, draw, 3, 2, 900);
  return finish();
}
