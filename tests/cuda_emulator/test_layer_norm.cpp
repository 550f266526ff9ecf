// The kernels of layer_norm against plain loops in double: rows for teams of every size, in vectors and element by element
// at any alignment, and too long for registers; with and without mean, weight and cotangents; each result alone; small
// grids, and the end of a matrix of more than 2^31 elements.
#include "layer_norm.cuh"

#include <algorithm>

#include "testing.h"

namespace {

using rk::cuda::LayerNormCall;
using namespace testing;

// What the kernels are given, and what they leave.
template <class S>
struct Problem {
  using A = rk::cuda::accumulation_t<S>;
  std::int64_t rows, cols;
  bool centred, weighted, has_u, affine;
  Buffer<S> x, g, u, gg_grad, grad_x;
  Buffer<A> weight, a, b, mean, rstd, bends, partial_weight, partial_bias, grad_weight, grad_bias;

  Problem(Draw& draw, std::int64_t row_count, std::int64_t columns)
      : rows(row_count),
        cols(columns),
        centred(draw(0, 1) == 1),
        weighted(draw(0, 1) == 1),
        has_u(draw(0, 4) > 0),
        affine(draw(0, 1) == 1),
        x(rows * cols, offset(draw)),
        g(rows * cols, offset(draw)),
        u(rows * cols, offset(draw)),
        gg_grad(rows * cols, offset(draw)),
        grad_x(rows * cols, offset(draw)),
        weight(cols),
        a(cols),
        b(cols),
        mean(rows),
        rstd(rows),
        bends(6 * rows),
        partial_weight(rows * cols),
        partial_bias(rows * cols),
        grad_weight(cols),
        grad_bias(cols) {
    for (Buffer<S>* b : {&x, &g, &u}) b->fill_normal(draw.random);
    for (Buffer<A>* parameters : {&weight, &a, &b}) parameters->fill_normal(draw.random);
    for (std::int64_t row = 0; row < rows; ++row) {
      mean[row] = static_cast<A>(0.125 * draw(-4, 4));
      rstd[row] = static_cast<A>(0.25 * draw(1, 8));
    }
  }

  // Rows of whole vectors are aligned.
  std::size_t offset(Draw& draw) const { return rk::cuda::in_words<S>(cols) ? 0 : draw(0, 8); }

  LayerNormCall<S> call(bool second) {
    LayerNormCall<S> c{};
    c.rows = rows;
    c.cols = cols;
    rk::cuda::set_shares(c);
    c.x = x.data();
    c.g = g.data();
    if (second && has_u) c.u = u.data();
    if (weighted) c.weight = weight.data();
    if (second && affine) c.a = a.data();
    if (second && affine) c.b = b.data();
    if (centred) c.mean = mean.data();
    c.rstd = rstd.data();
    if (second) c.gg_grad = gg_grad.data();
    c.grad_x = grad_x.data();
    c.bends = reinterpret_cast<rk::NormBends<A>*>(bends.data());
    c.partial_weight = partial_weight.data();
    c.grad_weight = grad_weight.data();
    if (!second) c.partial_bias = partial_bias.data();
    if (!second) c.grad_bias = grad_bias.data();
    return c;
  }

  std::string text() const {
    return shape_of<S>({rows, cols}) + (centred ? ", centred" : "") + (weighted ? ", weighted" : "") +
           (affine ? ", every cotangent" : "");
  }
};

// A row in double, and r P(v).
struct Row {
  std::vector<double> xh, g, h, u, a, b, w;
  double r;
  bool centred;

  template <class S>
  Row(const Problem<S>& t, std::int64_t row) : r(to_double(t.rstd[row])), centred(t.centred) {
    for (std::int64_t j = 0; j < t.cols; ++j) {
      const std::int64_t at = row * t.cols + j;
      const double mean = centred ? to_double(t.mean[row]) : 0.0;
      xh.push_back((to_double(t.x[at]) - mean) * r);
      w.push_back(t.weighted ? to_double(t.weight[j]) : 1.0);
      g.push_back(to_double(t.g[at]));
      h.push_back(w[j] * g[j]);
      u.push_back(t.has_u ? to_double(t.u[at]) : 0.0);
      a.push_back(t.affine ? to_double(t.a[j]) : 0.0);
      b.push_back(t.affine ? to_double(t.b[j]) : 0.0);
    }
  }

  static double mean_of(const std::vector<double>& v, const std::vector<double>& w) {
    double sum = 0.0;
    for (std::size_t j = 0; j < v.size(); ++j) sum += v[j] * w[j];
    return sum / static_cast<double>(v.size());
  }
  std::vector<double> project(std::vector<double> v) const {
    const double average = centred ? mean_of(v, std::vector<double>(v.size(), 1.0)) : 0.0, slope = mean_of(v, xh);
    for (std::size_t j = 0; j < v.size(); ++j) v[j] = v[j] - average - xh[j] * slope;
    return v;
  }
};

double largest(const std::vector<double>& v) {
  double most = 0.0;
  for (const double e : v) most = std::max(most, std::fabs(e));
  return most;
}

template <class S>
void compare(const Buffer<S>& actual, std::int64_t from, const std::vector<double>& expected, double scale,
             const std::string& what) {
  using A = rk::cuda::accumulation_t<S>;
  const double room = 200 * epsilon<A>() * scale;
  for (std::size_t j = 0; j < expected.size(); ++j)
    expect_close(to_double(actual[from + j]), expected[j],
                 room + epsilon<S>() * std::fabs(expected[j]) + (sizeof(S) == 2 ? 1e-7 : 0.0),
                 what + " " + std::to_string(j));
}

template <class S>
void test_problem(const Options& options, Problem<S>& t) {
  const std::string text = t.text();
  std::vector<double> sum_slope(t.cols), sum_bias(t.cols), sum_bend(t.cols);

  run_in_all_orders(
      options, text, [&] { return rk::cuda::launch_layer_norm(false, t.call(false), nullptr); }, t.grad_x,
      t.grad_weight, t.grad_bias);
  for (std::int64_t i = 0; i < t.rows; ++i) {
    const Row row(t, i);
    std::vector<double> grad_x = row.project(row.h);
    for (double& v : grad_x) v *= row.r;
    compare(t.grad_x, i * t.cols, grad_x, 1 + largest(grad_x) + largest(row.xh), "grad_x, " + text);
    for (std::int64_t j = 0; j < t.cols; ++j) {
      sum_slope[j] += row.g[j] * row.xh[j];
      sum_bias[j] += row.g[j];
    }
  }
  const double many = static_cast<double>(t.rows);
  compare(t.grad_weight, 0, sum_slope, many, "grad_weight, " + text);
  compare(t.grad_bias, 0, sum_bias, many, "grad_bias, " + text);

  t.grad_x.fill_with_nan();
  t.grad_weight.fill_with_nan();
  run_in_all_orders(
      options, text, [&] { return rk::cuda::launch_layer_norm(true, t.call(true), nullptr); }, t.gg_grad, t.grad_x,
      t.grad_weight);
  for (std::int64_t i = 0; i < t.rows; ++i) {
    const Row row(t, i);
    const std::vector<double> pu = row.project(row.u), ph = row.project(row.h);
    std::vector<double> ag = row.a, gg_grad(t.cols), grad_x(t.cols);
    for (std::int64_t j = 0; j < t.cols; ++j) ag[j] *= row.g[j];
    const std::vector<double> pag = row.project(ag);
    const double k = Row::mean_of(row.u, ph), hx = Row::mean_of(row.h, row.xh), ux = Row::mean_of(row.u, row.xh);
    double scale = 1.0 + largest(row.xh);
    for (std::int64_t j = 0; j < t.cols; ++j) {
      const double second = k * row.xh[j] + hx * pu[j] + ux * ph[j];
      gg_grad[j] = row.w[j] * row.r * pu[j] + row.a[j] * row.xh[j] + row.b[j];
      grad_x[j] = -row.r * row.r * second + row.r * pag[j];
      sum_bend[j] += row.g[j] * row.r * pu[j];
      scale = std::max({scale, std::fabs(second) * row.r * row.r, std::fabs(gg_grad[j])});
    }
    compare(t.gg_grad, i * t.cols, gg_grad, scale, "gg_grad, " + text);
    compare(t.grad_x, i * t.cols, grad_x, scale, "second grad_x, " + text);
  }
  compare(t.grad_weight, 0, sum_bend, 4 * many, "second grad_weight, " + text);
}

// Several cotangents of one x: what one launch after the other gives.
template <class S>
void test_several(const Options& options, Draw& draw, std::int64_t count, std::int64_t cols) {
  using A = rk::cuda::accumulation_t<S>;
  Problem<S> t(draw, draw(1, 9), cols);
  t.affine = false;
  t.has_u = true;
  const std::int64_t n = t.rows * t.cols;
  Buffer<S> g(count * n, t.offset(draw)), u(count * n, t.offset(draw)), first(count * n),
      gg_grad(count * n, t.offset(draw));
  Buffer<A> bends(6 * count * t.rows);
  g.fill_normal(draw.random);
  u.fill_normal(draw.random);
  const auto several = [&](bool second) {
    LayerNormCall<S> c = t.call(second);
    c.cotangents = count;
    c.g = g.data();
    c.u = second ? u.data() : nullptr;
    c.grad_bias = c.partial_bias = nullptr;
    if (second) {
      c.gg_grad = gg_grad.data();
      c.bends = reinterpret_cast<rk::NormBends<A>*>(bends.data());
    } else {
      c.grad_x = first.data();
      c.grad_weight = c.partial_weight = nullptr;
    }
    return rk::cuda::launch_layer_norm(second, c, nullptr);
  };
  const std::string text = std::to_string(count) + " cotangents, " + t.text();
  run_in_all_orders(options, text, [&] { return several(false); }, first);
  run_in_all_orders(options, text, [&] { return several(true); }, gg_grad, t.grad_x, t.grad_weight);

  Buffer<S> summed(n);
  Buffer<A> summed_weight(t.cols);
  std::copy_n(t.grad_x.data(), n, summed.data());
  std::copy_n(t.grad_weight.data(), t.cols, summed_weight.data());
  std::vector<double> grad_x(n), grad_weight(t.cols);
  for (std::int64_t i = 0; i < count; ++i) {
    std::copy_n(g.data() + i * n, n, t.g.data());
    std::copy_n(u.data() + i * n, n, t.u.data());
    const auto as_doubles = [n](const Buffer<S>& b) {
      std::vector<double> v;
      for (std::int64_t j = 0; j < n; ++j) v.push_back(to_double(b[j]));
      return v;
    };
    expect_success(rk::cuda::launch_layer_norm(false, t.call(false), nullptr));
    compare(first, i * n, as_doubles(t.grad_x), 1.0, "grad_x of " + text);
    expect_success(rk::cuda::launch_layer_norm(true, t.call(true), nullptr));
    compare(gg_grad, i * n, as_doubles(t.gg_grad), 1.0, "gg_grad of " + text);
    const std::vector<double> part = as_doubles(t.grad_x);
    for (std::int64_t j = 0; j < n; ++j) grad_x[j] += part[j];
    for (std::int64_t j = 0; j < t.cols; ++j) grad_weight[j] += to_double(t.grad_weight[j]);
  }
  // each part of the expectation was rounded once
  const double rounding = static_cast<double>(count) * epsilon<S>() / epsilon<A>();
  compare(summed, 0, grad_x, 20.0 + rounding * largest(grad_x), "summed grad_x of " + text);
  compare(summed_weight, 0, grad_weight, 20.0 + largest(grad_weight), "summed grad_weight of " + text);
}

// Fewer blocks than chunks: each block does several, one after another, with the same shared memory.
void test_small_grid(Draw& draw) {
  Problem<float> t(draw, 300, 72);
  const LayerNormCall<float> c = t.call(false);
  expect_close(static_cast<double>(c.chunks), 10, 0, "the number of chunks");
  expect_success(rk::cuda::launch(rk::cuda::layer_norm_backward_kernel<float, rk::cuda::Words<float>, 3>, dim3(3),
                                  dim3(rk::cuda::kRowThreads), rk::cuda::kRowThreads / c.team * t.cols * sizeof(float),
                                  nullptr, c));
  expect_success(rk::cuda::launch_column_totals<float>(nullptr, nullptr, c.partial_bias, t.grad_bias.data(), c.chunks,
                                                       t.cols, nullptr));
  for (std::int64_t j = 0; j < t.cols; ++j) {
    double sum = 0.0;
    for (std::int64_t row = 0; row < t.rows; ++row) sum += t.g[row * t.cols + j];
    expect_close(t.grad_bias[j], sum, 1e-4, "grad_bias in a small grid");
  }
}

// Each result alone is what it is among all; what is not asked for is not written.
template <class S>
void test_needs(Draw& draw, std::int64_t cols) {
  Problem<S> t(draw, 5, cols);
  for (const bool second : {false, true}) {
    expect_success(rk::cuda::launch_layer_norm(second, t.call(second), nullptr));
    const std::string gg_grad = t.gg_grad.bytes(), grad_x = t.grad_x.bytes(), grad_weight = t.grad_weight.bytes(),
                      grad_bias = t.grad_bias.bytes();
    for (int wanted = 0; wanted < 3; ++wanted) {
      t.gg_grad.fill_with_nan();
      t.grad_x.fill_with_nan();
      t.grad_weight.fill_with_nan();
      t.grad_bias.fill_with_nan();
      LayerNormCall<S> c = t.call(second);
      if (wanted != 0) c.grad_x = nullptr;
      if (wanted != 1) c.grad_weight = c.partial_weight = nullptr;
      if (wanted != 2) {
        c.gg_grad = nullptr;
        c.grad_bias = c.partial_bias = nullptr;
      }
      expect_success(rk::cuda::launch_layer_norm(second, c, nullptr));
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
void test_misaligned(Draw& draw) {
  Problem<float> t(draw, 2, 8);
  LayerNormCall<float> c = t.call(false);
  c.g += 1;
  expect_close(rk::cuda::launch_layer_norm(false, c, nullptr), cudaErrorMisalignedAddress, 0, "misaligned vectors");
}

// The last of so many rows that its elements' flat index passes 2^31; the others do not exist.
void test_huge(std::int64_t rows, std::int64_t cols) {
  LastRowOnly<__half> x(rows, cols), g(rows, cols), u(rows, cols), gg_grad(rows, cols), grad_x(rows, cols);
  for (std::int64_t j = 0; j < cols; ++j) {
    x.last_row()[j] = from_double<__half>(j % 2 ? 1.0 : -1.0);
    g.last_row()[j] = from_double<__half>(j < cols / 2 ? 1.0 : -1.0);
    u.last_row()[j] = from_double<__half>(j % 4 < 2 ? 1.0 : -1.0);
  }
  std::vector<float> mean(rows, 0.0f), rstd(rows, 1.0f);
  std::vector<rk::NormBends<float>> bends(rows);
  LayerNormCall<__half> c{};
  c.rows = rows;
  c.cols = cols;
  rk::cuda::set_shares(c);
  c.chunk_rows = 1;
  c.chunks = rows;
  c.bends = bends.data();
  c.x = x.data();
  c.g = g.data();
  c.u = u.data();
  c.mean = mean.data();
  c.rstd = rstd.data();
  c.gg_grad = gg_grad.data();
  c.grad_x = grad_x.data();
  const FirstBlock first(rows - 1);
  expect_success(rk::cuda::launch_layer_norm(false, c, nullptr));
  expect_close(to_double(grad_x.last_row()[cols - 1]), -1.0, 1e-3, "grad_x of the last element");
  expect_success(rk::cuda::launch_layer_norm(true, c, nullptr));
  expect_close(to_double(gg_grad.last_row()[cols - 1]), -1.0, 1e-3, "gg_grad of the last element");
}

// Columns of so many 16-byte vectors, or of one element more.
template <class S>
std::int64_t columns(int vectors, int more = 0) {
  return vectors * rk::cuda::Words<S>::kSize + more;
}

// What the kernels leave for the sums down the columns, without the kernel that adds it up: fewer threads.
template <class S>
void test_partial_sums(const Options& options, Problem<S>&& t) {
  for (const bool second : {false, true}) {
    LayerNormCall<S> c = t.call(second);
    c.grad_weight = c.grad_bias = nullptr;
    t.partial_bias.fill_with_nan();
    const auto call = [&] { return rk::cuda::launch_layer_norm(second, c, nullptr); };
    run_in_all_orders(options, "partial sums, " + t.text(), call, t.partial_weight, t.partial_bias, t.grad_x);
  }
}

template <class S>
void test_type(const Options& options, Draw& draw) {
  constexpr int V = rk::cuda::Words<S>::kSize;
  Problem<S> in_vectors(draw, draw(1, 20), columns<S>(draw(1, 96 / V)));
  test_problem(options, in_vectors);
  Problem<S> element_by_element(draw, draw(1, 12), columns<S>(draw(0, 96 / V - 1), 1));
  test_problem(options, element_by_element);
  test_several<S>(options, draw, draw(1, 4), columns<S>(draw(1, 96 / V)));
  test_several<S>(options, draw, 3, columns<S>(draw(0, 96 / V - 1), 1));
  if (options.huge) test_needs<S>(draw, columns<S>(draw(1, 96 / V)));
}

}  // namespace

int main(int argc, char** argv) {
  const Options options(argc, argv);
  const bool thorough = options.huge;  // more threads than ThreadSanitizer follows
  Draw draw{std::mt19937(options.seed)};
  for (int round = 0; round < options.rounds; ++round) {
    test_type<float>(options, draw);
    test_type<__half>(options, draw);
    if (thorough && round % 4 == 0) test_type<__nv_bfloat16>(options, draw);
    if (thorough && round % 4 == 0) test_type<double>(options, draw);
  }
  test_small_grid(draw);
  test_misaligned(draw);
  Problem<float> no_rows(draw, 0, 8);
  test_problem(options, no_rows);
  test_partial_sums(options, Problem<float>(draw, 9, columns<float>(150)));
  test_partial_sums(options, Problem<__half>(draw, 3, columns<__half>(300)));
  test_partial_sums(options, Problem<float>(draw, 2, columns<float>(769)));
  if (!thorough) return finish();
  for (const int vectors : {40, 96, 97, 130, 192, 193, 300, 512, 700, 768}) {  // teams of one warp and of several
    Problem<__half> t(draw, 9, columns<__half>(vectors));
    test_problem(options, t);
  }
  test_several<__half>(options, draw, 2, columns<__half>(96));
  for (const int vectors : {769, 1600}) {  // too long for registers
    Problem<float> floats(draw, 3, columns<float>(vectors));
    test_problem(options, floats);
    test_several<__half>(options, draw, 2, columns<__half>(vectors));
    test_needs<float>(draw, columns<float>(vectors));
  }
  for (const int elements : {511, 1023, 1025, 1801}) {
    Problem<__half> t(draw, 10, elements);
    test_problem(options, t);
    test_several<float>(options, draw, 2, elements);
  }
  test_huge(140000, 16384);
  test_huge(560000, 4096);
  return finish();
}
