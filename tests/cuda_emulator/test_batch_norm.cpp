// The kernels of batch_norm_double_backward against plain loops in double: random shapes in both layouts, alignments,
// absent cotangents and outputs, fixed statistics, one and several cotangents, one launch and several.
#include "batch_norm.cuh"

#include <algorithm>
#include <vector>

#include "testing.h"

namespace {

using rk::cuda::BatchNormCall;
using rk::cuda::BatchNormLimits;
using namespace testing;

template <class S>
struct Problem {
  using A = rk::cuda::accumulation_t<S>;
  std::int64_t images, channels, inner, cotangents;
  bool training, has_u, has_a, writes_grad, writes_x;
  BatchNormLimits limits;
  Buffer<S> u, g, x, grad, grad_x;
  Buffer<A> weight, a, b, mean, invstd, grad_weight, partial, coefficients;

  // `place`: of each tensor, in elements behind an aligned address, or -1 for one of its own.
  Problem(Draw& draw, std::int64_t n, std::int64_t c, std::int64_t s, std::int64_t k, int place,
          const BatchNormLimits& within)
      : images(n),
        channels(c),
        inner(s),
        cotangents(k),
        training(draw(0, 2) > 0),
        has_u(draw(0, 4) > 0),
        has_a(k == 1 && draw(0, 1)),
        writes_grad(draw(0, 4) > 0),
        writes_x(draw(0, 2) > 0),
        limits(within),
        u(k * n * c * s, place < 0 ? draw(0, 8) : place),
        g(k * n * c * s, place < 0 ? draw(0, 8) : place),
        x(n * c * s, place < 0 ? draw(0, 8) : place),
        grad(k * n * c * s, place < 0 ? draw(0, 8) : place),
        grad_x(n * c * s, place < 0 ? draw(0, 8) : place),
        weight(c),
        a(c),
        b(c),
        mean(c),
        invstd(c),
        grad_weight(c),
        partial(rk::cuda::partial_size(call())),
        coefficients(rk::cuda::coefficients_size(call())) {
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
    rk::cuda::arrange(c, limits);
    c.partial = partial.data();
    c.coefficients = coefficients.data();
    return c;
  }
};

// What depends on shapes alone: of the random choices, only those that say which data there are.
template <class S>
void test_shape(const Options& options, Draw& draw, std::int64_t n, std::int64_t c, std::int64_t s,
                const BatchNormLimits& limits = {}, int place = -1) {
  using A = rk::cuda::accumulation_t<S>;
  Problem<S> t(draw, n, c, s, draw(0, 1) ? 1 : draw(2, 4), place, limits);
  const std::string shape = std::to_string(t.cotangents) + " cotangents of [" + std::to_string(n) + "," +
                            std::to_string(c) + "," + std::to_string(s) + "] as " + std::to_string(sizeof(S)) +
                            " bytes, " + (t.training ? "" : "fixed statistics, ");
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

// Wherever tensors lie, the results are the same to the last bit.
template <class S>
void test_places(Draw& draw, std::int64_t n, std::int64_t c, std::int64_t s, const BatchNormLimits& limits = {}) {
  cuda_emulator::configuration().order = cuda_emulator::forward;
  const Draw start = draw;
  std::string first;
  for (const int place : {0, 8, 3}) {
    draw = start;
    Problem<S> t(draw, n, c, s, draw(1, 2), place, limits);
    expect_success(rk::cuda::launch_batch_norm(t.call(), nullptr));
    std::string results = t.grad_weight.bytes();
    for (const Buffer<S>* result : {&t.grad, &t.grad_x})
      results.append(reinterpret_cast<const char*>(result->data()), result->size() * sizeof(S));
    if (place == 0) first = results;
    ++checks;
    if (results != first) report("the result of tensors at other addresses", 1, 0);
  }
}

// Offsets beyond 31 bits: the last block alone, on memory that is otherwise not there.  With the statistics of the
// batch one launch takes a channel along; with fixed ones one launch takes rows across.
void test_huge(bool training) {
  const std::int64_t rows = training ? 300000 : 60000, size = training ? 8192 : 65536;  // rows: what a block takes
  LastRowOnly<__half> u(rows, size), g(rows, size), x(rows, size), grad(rows, size), grad_x(rows, size);
  for (const auto* tensor : {&u, &g, &x})
    for (std::int64_t j = 0; j < size; ++j) tensor->last_row()[j] = from_double<__half>(1.0);
  BatchNormCall<__half> c{};
  c.images = training ? 1 : rows * 32;
  c.channels = training ? rows : size / 32;
  c.inner = training ? size : 1;
  c.cotangents = 1;
  c.training = training;
  const std::vector<float> mean(c.channels, 1.0f), invstd(c.channels, 1.0f), weight(c.channels, 2.0f);
  c.u = u.data();
  c.g = g.data();
  c.x = x.data();
  c.grad = grad.data();
  c.grad_x = grad_x.data();
  c.mean = mean.data();
  c.invstd = invstd.data();
  c.weight = weight.data();
  BatchNormLimits limits;
  limits.blocks = rows * 8;  // across: of eight strips
  rk::cuda::arrange(c, limits);
  std::vector<float> partial(rk::cuda::partial_size(c));
  c.partial = partial.data();
  const FirstBlock first(c.shares * (training ? c.channels : c.strips) - 1);
  expect_success(rk::cuda::launch_batch_norm(c, nullptr));
  // u is constant: P(u) is zero with the statistics of the batch.
  expect_close(to_double(grad.last_row()[size - 1]), training ? 0.0 : 2.0, 1e-3, "grad of the last element");
  expect_close(to_double(grad_x.last_row()[size - 1]), 0.0, 1e-3, "grad_x of the last element");
}

}  // namespace

int main(int argc, char** argv) {
  const Options options(argc, argv);
  Draw draw{std::mt19937(options.seed)};
  BatchNormLimits small;  // as if the data were many times as large
  small.share_vectors = 16;
  small.blocks = 3;
  small.block_rows = 0;
  for (int round = 0; round < options.rounds; ++round) {
    const auto any = draw(0, 1) ? small : BatchNormLimits{};
    const int place = draw(0, 2) ? 0 : -1;
    test_shape<float>(options, draw, draw(1, 9), draw(1, 5), draw(2, 40), any, place);
    test_shape<__half>(options, draw, draw(1, 9), draw(1, 5), draw(2, 40), any, place);
    test_shape<__half>(options, draw, draw(1, 9), draw(1, 5), 8 * draw(1, 5), any, place);
    test_shape<float>(options, draw, draw(1, 60), draw(1, 40), 1, any, place);
    test_shape<__half>(options, draw, draw(1, 60), draw(1, 40), 1, any, place);
    test_shape<__half>(options, draw, draw(1, 60), 8 * draw(1, 5), 1, any, place);
    test_places<__half>(draw, draw(1, 9), draw(1, 5), draw(2, 40), any);
    test_places<__nv_bfloat16>(draw, draw(1, 60), draw(1, 40), 1, any);
  }
  test_shape<double>(options, draw, 5, 3, 7);
  test_shape<double>(options, draw, 50, 3, 1);
  test_shape<float>(options, draw, 3, 2, 900);  // several vectors of a thread at once
  test_shape<__half>(options, draw, 1, 2, 9001, {}, 0);
  test_shape<float>(options, draw, 40, 2, 333, small, 0);  // planes that begin and end within a vector
  test_shape<__half>(options, draw, 600, 5, 1, {}, 0);     // columns, and a last row that is not whole
  test_shape<float>(options, draw, 2100, 4, 1, {}, 0);
  test_shape<float>(options, draw, 2, 140, 1, small, 0);  // strips
  test_places<float>(draw, 3, 2, 700);
  test_places<float>(draw, 700, 4, 1);
  if (options.huge) {
    test_huge(true);
    test_huge(false);
  }
  return finish();
}
