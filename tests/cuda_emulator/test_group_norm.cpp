// The kernels of group_norm against plain loops in double, in both layouts: planes of one piece and of several, groups that
// a block holds and larger ones, strips of several groups and of one; in vectors, and element by element at any alignment;
// with and without weight and cotangents, small grids, and the end of a tensor of more than 2^31 elements.
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
  Buffer<A> weight, a, b, mean, rstd, scratch, sample_weight, sample_bias, grad_weight, grad_bias;

  Problem(Draw& draw, bool rows, std::int64_t n, std::int64_t group_count, std::int64_t width, std::int64_t s)
      : samples(n),
        channels(group_count * width),
        positions(s),
        groups(group_count),
        innermost(rows),
        weighted(draw(0, 1) == 1),
        has_u(draw(0, 4) > 0),
        affine(draw(0, 1) == 1),
        x(n * channels * s, offset(draw)),
        g(n * channels * s, offset(draw)),
        u(n * channels * s, offset(draw)),
        gg_grad(n * channels * s, offset(draw)),
        grad_x(n * channels * s, offset(draw)),
        weight(channels),
        a(channels),
        b(channels),
        mean(n * groups),
        rstd(n * groups),
        scratch(numbers()),
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

  GroupNormCall<S> shape() const {
    GroupNormCall<S> c{};
    c.samples = samples;
    c.channels = channels;
    c.positions = positions;
    c.groups = groups;
    rk::cuda::set_units(c, innermost);
    return c;
  }
  // Whole vectors are aligned.
  std::size_t offset(Draw& draw) const { return rk::cuda::in_words(innermost, shape()) ? 0 : draw(0, 8); }
  std::size_t numbers() const {
    GroupNormCall<S> c = shape();
    A sum = 0;
    c.grad_weight = &sum;
    return rk::cuda::scratch_size(c, innermost);
  }
  std::int64_t at(std::int64_t n, std::int64_t c, std::int64_t s) const {
    return innermost ? (n * positions + s) * channels + c : (n * channels + c) * positions + s;
  }

  GroupNormCall<S> call(bool second) {
    GroupNormCall<S> c = shape();
    c.second = second;
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
    c.scratch = scratch.data();
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
void test_small_grid(Draw& draw, bool innermost, std::int64_t positions) {
  using rk::cuda::Words;
  Problem<float> t(draw, innermost, 3, 5, 4, positions);
  const GroupNormCall<float> c = t.call(true);
  const auto kernel = innermost          ? rk::cuda::group_norm_rows_kernel<true, float, Words<float>>
                      : c.threads <= 256 ? rk::cuda::group_norm_planes_kernel<true, true, float, Words<float>>
                                         : rk::cuda::group_norm_planes_kernel<false, true, float, Words<float>>;
  expect_success(
      rk::cuda::launch(kernel, dim3(2), dim3(c.threads), innermost ? 20 * c.threads * sizeof(float) : 0, nullptr, c));
  expect_success(rk::cuda::launch_column_totals<float>(c.sample_weight, t.grad_weight.data(), nullptr, nullptr,
                                                       t.samples, t.channels, nullptr));
  compare(t, true);
}

// Each result alone is what it is among all; what is not asked for is not written.
template <class S>
void test_needs(Problem<S>&& t) {
  for (const bool second : {false, true}) {
    expect_success(rk::cuda::launch_group_norm(t.innermost, t.call(second), nullptr));
    const std::string gg_grad = t.gg_grad.bytes(), grad_x = t.grad_x.bytes(), grad_weight = t.grad_weight.bytes(),
                      grad_bias = t.grad_bias.bytes();
    for (int wanted = 0; wanted < 3; ++wanted) {
      t.gg_grad.fill_with_nan();
      t.grad_x.fill_with_nan();
      t.grad_weight.fill_with_nan();
      t.grad_bias.fill_with_nan();
      GroupNormCall<S> c = t.call(second);
      if (wanted != 0) c.grad_x = nullptr;
      if (wanted != 1) c.grad_weight = c.sample_weight = nullptr;
      if (wanted != 2) {
        c.gg_grad = nullptr;
        c.grad_bias = c.sample_bias = nullptr;
      }
      expect_success(rk::cuda::launch_group_norm(t.innermost, c, nullptr));
      const bool same = wanted == 0   ? t.grad_x.bytes() == grad_x
                        : wanted == 1 ? t.grad_weight.bytes() == grad_weight
                        : second      ? t.gg_grad.bytes() == gg_grad
                                      : t.grad_bias.bytes() == grad_bias;
      expect_close(same, 1, 0, "result " + std::to_string(wanted) + " alone, " + t.text());
    }
    t.gg_grad.fill_with_nan();
  }
}

// Vectors that are not aligned are refused rather than read.
void test_misaligned(Draw& draw, bool innermost) {
  Problem<float> t(draw, innermost, 1, 2, 4, 8);
  GroupNormCall<float> c = t.call(false);
  c.g += 1;
  expect_close(rk::cuda::launch_group_norm(innermost, c, nullptr), cudaErrorMisalignedAddress, 0, "misaligned vectors");
}

// The last of so many samples that its elements' flat index passes 2^31; the others do not exist.
void test_huge(bool innermost) {
  constexpr std::int64_t samples = 140000, channels = 16, positions = 1024;
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
  std::vector<float> mean(samples, 0.0f), rstd(samples, 1.0f);
  c.x = x.data();
  c.g = g.data();
  c.mean = mean.data();
  c.rstd = rstd.data();
  c.grad_x = grad_x.data();
  const FirstBlock first(samples - 1);
  expect_success(rk::cuda::launch_group_norm(innermost, c, nullptr));
  expect_close(to_double(grad_x.last_row()[channels * positions - 1]), 1.0, 1e-3, "grad_x of the last element");
}

template <class S>
void test_type(const Options& options, Draw& draw, bool innermost) {
  constexpr int V = rk::cuda::Words<S>::kSize;
  const auto problem = [&](std::int64_t width, std::int64_t positions) {
    return Problem<S>(draw, innermost, draw(1, 3), draw(1, 6), width, positions);
  };
  test_problem(options, problem(draw(1, 9), draw(3, 60)));
  if (innermost)
    test_problem(options, Problem<S>(draw, true, draw(1, 3), V, draw(1, 9), draw(1, 40)));
  else
    test_problem(options, problem(draw(1, 9), V * draw(1, 40)));
  if (options.huge) test_needs(problem(draw(1, 9), V * draw(1, 20)));
}

}  // namespace

int main(int argc, char** argv) {
  const Options options(argc, argv);
  const bool thorough = options.huge;  // more threads than ThreadSanitizer follows
  Draw draw{std::mt19937(options.seed)};
  for (const bool innermost : {false, true}) {
    for (int round = 0; round < options.rounds; ++round) {
      test_type<float>(options, draw, innermost);
      test_type<__half>(options, draw, innermost);
      if (thorough && round % 4 == 0) test_type<__nv_bfloat16>(options, draw, innermost);
      if (thorough && round % 4 == 0) test_type<double>(options, draw, innermost);
      test_small_grid(draw, innermost, 8);
    }
    test_misaligned(draw, innermost);
    if (thorough) test_huge(innermost);
  }
  // Planes of several pieces, which a block holds and does not hold; strips of many rows.
  test_problem(options, Problem<float>(draw, false, 1, 2, 2, 4 * 200));
  test_small_grid(draw, false, 4 * 260);
  test_problem(options, Problem<__half>(draw, true, 1, 1, 8, 1100));
  test_problem(options, Problem<float>(draw, true, 2, 2, 45, 6));
  test_problem(options, Problem<float>(draw, true, 2, 1, 1, 3));
  for (const bool innermost : {false, true}) test_problem(options, Problem<float>(draw, innermost, 0, 2, 2, 4));
  if (!thorough) return finish();
  test_problem(options, Problem<__half>(draw, false, 2, 2, 7, 8 * 130));
  test_problem(options, Problem<float>(draw, false, 1, 2, 2, 500));
  test_needs(Problem<__half>(draw, false, 1, 2, 5, 8 * 300));
  test_problem(options, Problem<float>(draw, false, 1, 2, 300, 8));
  test_problem(options, Problem<__half>(draw, false, 1, 1, 5, 8 * 128 + 1));
  // Strips of several passes, of numbers that shared memory does not hold.
  test_problem(options, Problem<__half>(draw, true, 1, 4, 8, 1100));
  test_problem(options, Problem<__half>(draw, true, 2, 2, 272, 6));
  test_needs(Problem<float>(draw, true, 2, 2, 136, 5));
  return finish();
}
