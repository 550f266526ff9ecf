// The kernels of kl_divergence against plain loops in double: random shapes and alignments, temperature, logits of -inf,
// cotangents and gradients that are not there, rows that are not finite, small grids, and the end of a matrix of more than 2^31 elements.
#include "kl_divergence.cuh"

#include <algorithm>

#include "testing.h"

namespace {

using rk::kKlStatistics;
using rk::cuda::KlCall;
using rk::cuda::Order;
using namespace testing;

// What the kernels are given, and what they leave.
template <class S>
struct Problem {
  using A = rk::cuda::accumulation_t<S>;
  std::int64_t rows, classes;
  double temperature;
  bool has_u, has_v, need_p, need_q;
  Buffer<S> a, b, u, v, grad_p, grad_q;
  Buffer<A> grad, per_row, statistics, statistics_in;

  // Tensors begin up to `most_offset` elements behind a multiple of 16 bytes.
  Problem(Draw& draw, std::int64_t row_count, std::int64_t class_count, int most_offset)
      : rows(row_count),
        classes(class_count),
        temperature(draw.one_of({1.0, 0.5, 4.0})),
        has_u(draw(0, 3) > 0),
        has_v(draw(0, 3) > 0),
        need_p(draw(0, 3) > 0),
        need_q(draw(0, 3) > 0),
        a(rows * classes, draw(0, most_offset)),
        b(rows * classes, draw(0, most_offset)),
        u(rows * classes, draw(0, most_offset)),
        v(rows * classes, draw(0, most_offset)),
        grad_p(rows * classes, draw(0, most_offset)),
        grad_q(rows * classes, draw(0, most_offset)),
        grad(rows),
        per_row(rows),
        statistics(kKlStatistics * rows),
        statistics_in(kKlStatistics * rows) {
    a.fill_normal(draw.random, draw.one_of({1.0, 4.0}));
    b.fill_normal(draw.random);
    u.fill_normal(draw.random);
    v.fill_normal(draw.random);
    grad.fill_normal(draw.random);
    for (std::int64_t i = 0; i < rows * classes; i += classes + 3)
      if (i % classes) a[i] = b[i] = from_double<S>(-INFINITY);
  }

  KlCall<S> call(Order order) {
    KlCall<S> c{};
    c.rows = rows;
    c.classes = classes;
    c.inverse_t = static_cast<A>(1.0 / temperature);
    c.p_logits = a.data();
    c.q_logits = b.data();
    if (has_u) c.u = u.data();
    if (has_v) c.v = v.data();
    c.grad = grad.data();
    c.statistics_in = statistics_in.data();
    if (order != Order::kBackward) c.per_row = per_row.data();
    if (order == Order::kValue) c.statistics = statistics.data();
    if (order != Order::kValue && need_p) c.grad_p = grad_p.data();
    if (order != Order::kValue && need_q) c.grad_q = grad_q.data();
    return c;
  }
  std::string text(const char* what, std::int64_t row, std::int64_t j = -1) const {
    return std::string(what) + " " + std::to_string(row) + (j < 0 ? "" : "," + std::to_string(j)) + " of " +
           shape_of<S>({rows, classes});
  }
};

std::vector<double> log_softmax(std::vector<double> z) {
  const double max = *std::max_element(z.begin(), z.end());
  double sum = 0.0;
  for (const double v : z) sum += std::exp(v - max);
  for (double& v : z) v -= max + std::log(sum);
  return z;
}

// One row in double.
struct Row {
  std::vector<double> p, q, d, u, v;
  double kl = 0.0, u_p = 0.0, v_p = 0.0, v_q = 0.0, cross = 0.0;

  template <class S>
  Row(const Problem<S>& t, std::int64_t row) {
    std::vector<double> a, b;
    for (std::int64_t j = row * t.classes; j < (row + 1) * t.classes; ++j) {
      a.push_back(to_double(t.a[j]) / t.temperature);
      b.push_back(to_double(t.b[j]) / t.temperature);
      u.push_back(t.has_u ? to_double(t.u[j]) : 0.0);
      v.push_back(t.has_v ? to_double(t.v[j]) : 0.0);
    }
    const std::vector<double> log_p = log_softmax(a), log_q = log_softmax(b);
    for (std::size_t j = 0; j < a.size(); ++j) {
      p.push_back(std::exp(log_p[j]));
      q.push_back(std::exp(log_q[j]));
      d.push_back(p[j] == 0.0 ? 0.0 : log_p[j] - log_q[j]);
      kl += p[j] * d[j];
      u_p += p[j] * u[j];
      v_p += p[j] * v[j];
      v_q += q[j] * v[j];
    }
    for (std::size_t j = 0; j < a.size(); ++j) cross += p[j] * (u[j] - u_p) * (d[j] - kl);
  }
};

template <class S>
void test_problem(const Options& options, Problem<S>& t) {
  using A = rk::cuda::accumulation_t<S>;
  const double loose = 4000 * epsilon<A>(), store = epsilon<S>(), i = 1.0 / t.temperature;
  const auto run = [&](Order order, auto&... outputs) {
    const auto call = [&] { return rk::cuda::launch_kl_divergence(order, t.call(order), nullptr); };
    run_in_all_orders(options, t.text("output", 0), call, outputs...);
  };
  std::vector<Row> want;
  for (std::int64_t row = 0; row < t.rows; ++row) want.emplace_back(t, row);

  run(Order::kValue, t.per_row, t.statistics);
  for (std::int64_t row = 0; row < t.rows; ++row) {
    for (int k = 0; k < kKlStatistics; ++k)
      t.statistics_in[kKlStatistics * row + k] = t.statistics[kKlStatistics * row + k];
    expect_close(t.per_row[row], want[row].kl, loose * (1.0 + want[row].kl), t.text("divergence", row));
  }

  if (t.need_p && t.need_q)
    run(Order::kBackward, t.grad_p, t.grad_q);
  else if (t.need_p)
    run(Order::kBackward, t.grad_p);
  else if (t.need_q)
    run(Order::kBackward, t.grad_q);
  for (std::int64_t row = 0; row < t.rows; ++row) {
    const Row& w = want[row];
    const double factor = t.grad[row] * i, size = std::fabs(factor) * (1.0 + w.kl);
    for (std::int64_t j = 0; j < t.classes; ++j) {
      const double slope_p = factor * w.p[j] * (w.d[j] - w.kl), slope_q = factor * (w.q[j] - w.p[j]);
      if (t.need_p)
        expect_close(to_double(t.grad_p[row * t.classes + j]), slope_p,
                     store * std::fabs(slope_p) + loose * size + 1e-7, t.text("grad_p", row, j));
      if (t.need_q)
        expect_close(to_double(t.grad_q[row * t.classes + j]), slope_q,
                     store * std::fabs(slope_q) + loose * size + 1e-7, t.text("grad_q", row, j));
    }
  }

  t.grad_p.fill_with_nan();
  t.grad_q.fill_with_nan();
  if (t.need_p && t.need_q)
    run(Order::kDoubleBackward, t.per_row, t.grad_p, t.grad_q);
  else if (t.need_p)
    run(Order::kDoubleBackward, t.per_row, t.grad_p);
  else if (t.need_q)
    run(Order::kDoubleBackward, t.per_row, t.grad_q);
  else
    run(Order::kDoubleBackward, t.per_row);
  for (std::int64_t row = 0; row < t.rows; ++row) {
    const Row& w = want[row];
    const double factor = t.grad[row] * i * i, size = (1.0 + w.kl + std::fabs(w.cross)) * 10.0;
    expect_close(t.per_row[row], (w.cross + w.v_q - w.v_p) * i, loose * size * i, t.text("gg_grad", row));
    for (std::int64_t j = 0; j < t.classes; ++j) {
      const double du = w.u[j] - w.u_p;
      const double bend_p = factor * w.p[j] * ((w.d[j] - w.kl + 1.0) * du - w.cross - (w.v[j] - w.v_p));
      const double bend_q = factor * (w.q[j] * (w.v[j] - w.v_q) - w.p[j] * du);
      const double slack = loose * size * std::fabs(factor) + 1e-7;
      if (t.need_p)
        expect_close(to_double(t.grad_p[row * t.classes + j]), bend_p, store * std::fabs(bend_p) + slack,
                     t.text("second grad_p", row, j));
      if (t.need_q)
        expect_close(to_double(t.grad_q[row * t.classes + j]), bend_q, store * std::fabs(bend_q) + slack,
                     t.text("second grad_q", row, j));
    }
  }
}

template <class S>
void test_shapes(const Options& options, Draw& draw, int rows, int classes) {
  if (draw(0, 1)) classes = (classes + 7) / 8 * 8;  // whole vectors
  Problem<S> problem(draw, rows, classes, draw.one_of({0, 8}));
  if (draw(0, 1))  // several first choices
    for (std::int64_t j = 0; j < std::int64_t{rows} * classes; ++j)
      problem.a[j] = from_double<S>(std::round(to_double(problem.a[j])));
  test_problem(options, problem);
}

// No bit depends on where the tensors lie.
template <class S>
void test_alignment(Draw& draw, std::int64_t classes) {
  Problem<S> t(draw, 3, classes, 0);
  t.need_p = t.need_q = true;
  Buffer<S> a(3 * classes, 1);
  std::copy_n(t.a.data(), 3 * classes, a.data());
  const auto bits = [&](Order order, bool elsewhere) {
    auto c = t.call(order);
    if (elsewhere) c.p_logits = a.data();
    expect_success(rk::cuda::launch_kl_divergence(order, c, nullptr));
    if (order == Order::kValue) std::copy_n(t.statistics.data(), 3 * kKlStatistics, t.statistics_in.data());
    return t.per_row.bytes() + t.statistics.bytes() + t.grad_p.bytes() + t.grad_q.bytes();
  };
  for (const Order order : {Order::kValue, Order::kBackward, Order::kDoubleBackward})
    expect_close(bits(order, false) == bits(order, true), 1, 0, t.text("bits elsewhere", static_cast<int>(order)));
}

// Fewer blocks than rows: each block does several, one after another, with the same shared memory.
void test_small_grid(Draw& draw) {
  Problem<float> t(draw, 7, 300, 0);
  for (const dim3 block : {dim3(96), dim3(32, 3)}) {
    constexpr auto layout = rk::cuda::Layout::kVectors;
    const rk::cuda::RowRounds rounds(300, block.x * 4 * rk::cuda::kl_vectors<layout, float>(Order::kValue));
    expect_success(rk::cuda::launch(rk::cuda::kl_divergence_kernel<layout, float>, dim3(2), block, 0, nullptr,
                                    t.call(Order::kValue), rounds));
    for (std::int64_t row = 0; row < t.rows; ++row) {
      const Row want(t, row);
      expect_close(t.per_row[row], want.kl, 1e-4 * (1.0 + want.kl), "divergence in a small grid");
    }
    t.per_row.fill_with_nan();
  }
}

// Rows that are not finite touch no other.
void test_infinite(Draw& draw, int classes) {
  Problem<float> t(draw, 5, classes, 0);
  t.has_u = t.has_v = t.need_p = t.need_q = true;
  for (int j = 0; j < classes; ++j) t.a[j] = -INFINITY;
  t.b[t.classes + classes / 2] = NAN;
  t.a[2 * t.classes] = INFINITY;
  for (int j = 1; j < classes; ++j) t.a[3 * t.classes + j] = -INFINITY;  // certain
  t.a[3 * t.classes] = 1.0f;
  expect_success(rk::cuda::launch_kl_divergence(Order::kValue, t.call(Order::kValue), nullptr));
  std::copy_n(t.statistics.data(), 5 * kKlStatistics, t.statistics_in.data());
  for (const int row : {0, 1, 2}) expect_nan(t.per_row[row], t.text("divergence of no distribution", row));
  for (const int row : {3, 4}) {
    const Row want(t, row);
    expect_close(t.per_row[row], want.kl, 1e-4 * (1.0 + want.kl), t.text("divergence beside rows of NaN", row));
  }
  for (const Order order : {Order::kBackward, Order::kDoubleBackward}) {
    expect_success(rk::cuda::launch_kl_divergence(order, t.call(order), nullptr));
    for (int j = 0; j < classes; ++j) {
      for (const int row : {0, 1, 2}) expect_nan(t.grad_p[row * t.classes + j], t.text("grad_p", row, j));
      for (const int row : {3, 4})
        expect_close(std::isfinite(t.grad_p[row * t.classes + j]) && std::isfinite(t.grad_q[row * t.classes + j]), 1, 0,
                     t.text("finite gradients", row, j));
    }
  }
}

// The last of so many rows that its elements' flat index passes 2^31; the others do not exist.
void test_huge() {
  constexpr std::int64_t rows = 70000, classes = 40000;
  LastRowOnly<__half> a(rows, classes), b(rows, classes), grad_p(rows, classes), grad_q(rows, classes);
  std::fill_n(a.last_row(), classes, from_double<__half>(0.0));
  std::fill_n(b.last_row(), classes, from_double<__half>(0.0));
  a.last_row()[classes - 1] = from_double<__half>(20.0);
  std::vector<float> per_row(rows), statistics(kKlStatistics * rows), grad(rows, 1000.0f);
  KlCall<__half> c{};
  c.rows = rows;
  c.classes = classes;
  c.inverse_t = 1.0f;
  c.p_logits = a.data();
  c.q_logits = b.data();
  c.grad = grad.data();
  c.per_row = per_row.data();
  c.statistics = statistics.data();
  const FirstBlock first(rows - 1);
  expect_success(rk::cuda::launch_kl_divergence(Order::kValue, c, nullptr));
  expect_close(per_row[rows - 1], std::log(double{classes}), 1e-2, "divergence of the last row");
  c.statistics_in = statistics.data();
  c.statistics = nullptr;
  c.per_row = nullptr;
  c.grad_p = grad_p.data();
  c.grad_q = grad_q.data();
  expect_success(rk::cuda::launch_kl_divergence(Order::kBackward, c, nullptr));
  expect_close(to_double(grad_q.last_row()[classes - 1]), -1000.0, 1.0, "grad_q of the last element");
  c.per_row = per_row.data();
  expect_success(rk::cuda::launch_kl_divergence(Order::kDoubleBackward, c, nullptr));
  expect_close(to_double(grad_q.last_row()[classes - 1]), 0.0, 1e-3, "second grad_q of the last element");
}

}  // namespace

int main(int argc, char** argv) {
  const Options options(argc, argv);
  Draw draw{std::mt19937(options.seed)};
  for (int round = 0; round < options.rounds; ++round) {
    test_shapes<float>(options, draw, draw(1, 5), draw(1, 700));
    test_shapes<__half>(options, draw, draw(1, 5), draw(1, 700));
    test_shapes<double>(options, draw, draw(1, 3), draw(1, 300));
    test_small_grid(draw);
    test_alignment<float>(draw, draw(1, 700));
    test_alignment<__nv_bfloat16>(draw, 8 * draw(1, 90));
    test_infinite(draw, draw(2, 500));
  }
  for (const std::size_t kilobytes : {227, 70, 1}) {  // several rounds, of which shared memory keeps all, some, none
    cuda_emulator::configuration().dynamic_shared_limit = kilobytes << 10;
    test_shapes<float>(options, draw, 2, 9001);
    test_shapes<__nv_bfloat16>(options, draw, 2, 20000);
  }
  if (options.huge) test_huge();
  return finish();
}
