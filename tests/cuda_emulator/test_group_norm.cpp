// The kernels of group_norm against plain loops in double: random shapes and alignments in both layouts, planes of several
// stretches, groups wider than a strip, with and without weight and cotangents, small grids, and the end of a tensor of
// more than 2^31 elements.
#include "group_norm.cuh"

#include <algorithm>

#include "testing.h"

namespace {

using rk::cuda::GroupNormCall;
using namespace testing;

// What the kernels are given, and what they leave.
template <class S>
struct Problem {
  using A = rk::cuda::accumulation_t<S>;
  std::int64_t samples, channels, positions, groups;
  bool innermost, weighted, has_u, affine;
  Buffer<S> x, g, u, gg_grad, grad_x;
  Buffer<A> weight, a, b, mean, rstd, sums, sample_weight, sample_bias, grad_weight, grad_bias;

  Problem(Draw& draw, bool rows, std::int64_t n, std::int64_t group_count, std::int64_t width, std::int64_t s)
      : samples(n),
        channels(group_count * width),
        positions(s),
        groups(group_count),
        innermost(rows),
        weighted(draw(0, 1) == 1),
        has_u(draw(0, 4) > 0),
        affine(draw(0, 1) == 1),
        x(n * channels * s, draw(0, 8)),
        g(n * channels * s, draw(0, 8)),
        u(n * channels * s, draw(0, 8)),
        gg_grad(n * channels * s, draw(0, 8)),
        grad_x(n * channels * s, draw(0, 8)),
        weight(channels),
        a(channels),
        b(channels),
        mean(n * groups),
        rstd(n * groups),
        sums(n * channels * slots() * 5),
        sample_weight(n * channels),
        sample_bias(n * channels),
        grad_weight(channels),
        grad_bias(channels) {
    for (Buffer<S>* b : {&x, &g, &u}) b->fill_normal(draw.random);
    for (Buffer<A>* parameters : {&weight, &a, &b}) parameters->fill_normal(draw.random);
    for (std::int64_t i = 0; i < n * groups; ++i) {
      mean[i] = static_cast<A>(0.125 * draw(-4, 4));
      rstd[i] = static_cast<A>(0.25 * draw(1, 8));
    }
  }

  std::int64_t slots() const {
    GroupNormCall<S> c{};
    c.channels = channels;
    c.positions = positions;
    c.groups = groups;
    rk::cuda::set_units(c, innermost);
    return c.slots;
  }
  std::int64_t at(std::int64_t n, std::int64_t c, std::int64_t s) const {
    return innermost ? (n * positions + s) * channels + c : (n * channels + c) * positions + s;
  }

  GroupNormCall<S> call(bool second) {
    GroupNormCall<S> c{};
    c.second = second;
    c.samples = samples;
    c.channels = channels;
    c.positions = positions;
    c.groups = groups;
    rk::cuda::set_units(c, innermost);
    c.x = x.data();
    c.g = g.data();
    if (second && has_u) c.u = u.data();
    if (weighted) c.weight = weight.data();
    if (second && affine) c.a = a.data();
    if (second && affine) c.b = b.data();
    c.mean = mean.data();
    c.rstd = rstd.data();
    if (second) c.gg_grad = gg_grad.data();
    c.grad_x = grad_x.data();
    c.sums = sums.data();
    c.sample_weight = sample_weight.data();
    c.grad_weight = grad_weight.data();
    if (!second) c.sample_bias = sample_bias.data();
    if (!second) c.grad_bias = grad_bias.data();
    return c;
  }

  std::string text() const {
    return shape_of<S>({samples, channels, positions}) + " in " + std::to_string(groups) + " groups" +
           (innermost ? ", channels innermost" : "") + (weighted ? ", weighted" : "") +
           (affine ? ", every cotangent" : "");
  }
};

double product(const std::vector<double>& v, const std::vector<double>& w) {
  double sum = 0.0;
  for (std::size_t j = 0; j < v.size(); ++j) sum += v[j] * w[j];
  return sum / static_cast<double>(v.size());
}

// v - mean(v) - xh mean(v xh)
std::vector<double> project(std::vector<double> v, const std::vector<double>& xh) {
  const double average = product(v, std::vector<double>(v.size(), 1.0)), slope = product(v, xh);
  for (std::size_t j = 0; j < v.size(); ++j) v[j] = v[j] - average - xh[j] * slope;
  return v;
}

template <class S>
void expect_near(const Buffer<S>& actual, std::int64_t i, double expected, double scale, const std::string& what) {
  using A = rk::cuda::accumulation_t<S>;
  expect_close(to_double(actual[i]), expected,
               300 * epsilon<A>() * scale + epsilon<S>() * std::fabs(expected) + (sizeof(S) == 2 ? 1e-7 : 0.0), what);
}

// Compares the outputs of the first or second derivative.
template <class S>
void compare(const Problem<S>& t, bool second) {
  const std::string text = (second ? "second derivative, " : "first derivative, ") + t.text();
  const std::int64_t width = t.channels / t.groups;
  std::vector<double> grad_weight(t.channels), grad_bias(t.channels);
  for (std::int64_t n = 0; n < t.samples; ++n)
    for (std::int64_t group = 0; group < t.groups; ++group) {
      const std::int64_t row = n * t.groups + group;
      const double mean = to_double(t.mean[row]), r = to_double(t.rstd[row]);
      std::vector<double> xh, g, h, u, ag;
      for (std::int64_t i = 0; i < width * t.positions; ++i) {
        const std::int64_t c = group * width + i / t.positions, at = t.at(n, c, i % t.positions);
        xh.push_back((to_double(t.x[at]) - mean) * r);
        g.push_back(to_double(t.g[at]));
        h.push_back((t.weighted ? to_double(t.weight[c]) : 1.0) * g.back());
        u.push_back(t.has_u ? to_double(t.u[at]) : 0.0);
        ag.push_back(t.affine ? to_double(t.a[c]) * g.back() : 0.0);
      }
      const std::vector<double> pu = project(u, xh), ph = project(h, xh), pag = project(ag, xh);
      const double k = product(u, ph), hx = product(h, xh), ux = product(u, xh);
      for (std::int64_t i = 0; i < width * t.positions; ++i) {
        const std::int64_t c = group * width + i / t.positions, at = t.at(n, c, i % t.positions);
        const std::string where = text + " at " + std::to_string(at);
        const double w = t.weighted ? to_double(t.weight[c]) : 1.0;
        const double a = t.affine ? to_double(t.a[c]) : 0.0, b = t.affine ? to_double(t.b[c]) : 0.0;
        const double scale = 4 * (1 + r) * (1 + r) * (1 + std::fabs(xh[i]));
        grad_bias[c] += g[i];
        grad_weight[c] += second ? g[i] * r * pu[i] : g[i] * xh[i];
        if (!second) {
          expect_near(t.grad_x, at, r * ph[i], scale, "grad_x, " + where);
        } else {
          expect_near(t.gg_grad, at, w * r * pu[i] + a * xh[i] + b, scale, "gg_grad, " + where);
          expect_near(t.grad_x, at, -r * r * (k * xh[i] + hx * pu[i] + ux * ph[i]) + r * pag[i], scale,
                      "grad_x, " + where);
        }
      }
    }
  const double many = 10.0 * static_cast<double>(t.samples * t.positions);
  for (std::int64_t c = 0; c < t.channels; ++c) {
    expect_near(t.grad_weight, c, grad_weight[c], many, "grad_weight, " + text);
    if (!second) expect_near(t.grad_bias, c, grad_bias[c], many, "grad_bias, " + text);
  }
}

template <class S>
void test_problem(const Options& options, Problem<S>&& t) {
  run_in_all_orders(
      options, t.text(), [&] { return rk::cuda::launch_group_norm(t.innermost, t.call(false), nullptr); }, t.grad_x,
      t.grad_weight, t.grad_bias);
  compare(t, false);
  t.grad_x.fill_with_nan();
  t.grad_weight.fill_with_nan();
  run_in_all_orders(
      options, t.text(), [&] { return rk::cuda::launch_group_norm(t.innermost, t.call(true), nullptr); }, t.gg_grad,
      t.grad_x, t.grad_weight);
  compare(t, true);
}

// Fewer blocks than units: each block does several, one after another, with the same shared memory.
void test_small_grid(Draw& draw, bool innermost) {
  Problem<float> t(draw, innermost, 3, 5, 12, 7);
  const GroupNormCall<float> c = t.call(true);
  expect_success(
      rk::cuda::launch(innermost ? rk::cuda::group_norm_rows_kernel<float> : rk::cuda::group_norm_planes_kernel<float>,
                       dim3(2), dim3(rk::cuda::kUnitThreads), 0, nullptr, c));
  expect_success(
      rk::cuda::launch_column_totals<float>(c.sample_weight, t.grad_weight.data(), t.samples, t.channels, nullptr));
  compare(t, true);
}

// The last of so many samples that its elements' flat index passes 2^31; the others do not exist.
void test_huge(bool innermost) {
  constexpr std::int64_t samples = 140000, channels = 4, positions = 4096;
  LastRowOnly<__half> x(samples, channels * positions), g(samples, channels * positions),
      grad_x(samples, channels * positions);
  for (std::int64_t i = 0; i < channels * positions; ++i) {
    x.last_row()[i] = from_double<__half>(i / 4 % 2 ? 1.0 : -1.0);
    g.last_row()[i] = from_double<__half>(i / 8 % 2 ? 1.0 : -1.0);
  }
  GroupNormCall<__half> c{};
  c.samples = samples;
  c.channels = channels;
  c.positions = positions;
  c.groups = 1;
  rk::cuda::set_units(c, innermost);
  std::vector<float> mean(samples, 0.0f), rstd(samples, 1.0f), sums(samples * channels * c.slots * 5);
  c.x = x.data();
  c.g = g.data();
  c.mean = mean.data();
  c.rstd = rstd.data();
  c.grad_x = grad_x.data();
  c.sums = sums.data();
  const FirstBlock first(samples - 1);
  expect_success(rk::cuda::launch_group_norm(innermost, c, nullptr));
  expect_close(to_double(grad_x.last_row()[channels * positions - 1]), 1.0, 1e-3, "grad_x of the last element");
}

}  // namespace

int main(int argc, char** argv) {
  const Options options(argc, argv);
  Draw draw{std::mt19937(options.seed)};
  for (const bool innermost : {false, true}) {
    for (int round = 0; round < options.rounds; ++round) {
      test_problem(options, Problem<float>(draw, innermost, draw(1, 3), draw(1, 6), draw(1, 9), draw(3, 60)));
      test_problem(options, Problem<__half>(draw, innermost, draw(1, 3), draw(1, 6), draw(1, 9), draw(3, 60)));
      test_small_grid(draw, innermost);
    }
    test_problem(options, Problem<float>(draw, innermost, 1, 2, 2, rk::cuda::kStretch + 77));
    test_problem(options, Problem<float>(draw, innermost, 2, 2, 45, 6));
    if (options.huge) test_huge(innermost);
  }
  return finish();
}
