// The kernels of row_norm against plain loops in double: random shapes and alignments, rows of several chunks, weights,
// ties, rows of zeros and of extreme numbers, small grids, and the end of a matrix of more than 2^31 elements.
#include "row_norm.cuh"

#include <algorithm>

#include "testing.h"

namespace {

using rk::Norm;
using rk::cuda::Order;
using rk::cuda::RowNormCall;
using namespace testing;

const char* name_of(Norm norm) {
  static const char* const names[] = {"L1", "L2", "squared L2", "Linf", "Lp"};
  return names[static_cast<int>(norm)];
}

// What the kernels are given, and what they leave.
template <class S>
struct Problem {
  using A = rk::cuda::accumulation_t<S>;
  std::int64_t rows, cols, chunks, stride, inner, channels;
  Norm norm;
  double p;
  bool weighted;
  Buffer<S> x, u, out;
  Buffer<A> weight, grad, norms, per_row, partial, ties;
  Buffer<std::uint64_t> queue;

  Problem(Draw& draw, Norm kind, double exponent, std::int64_t row_count, std::int64_t groups, std::int64_t run,
          bool with_weight)
      : rows(row_count),
        cols(groups * run),
        chunks((cols + rk::cuda::row_chunk<S>(kind) - 1) / rk::cuda::row_chunk<S>(kind)),
        stride(cols + draw(0, 1) * draw(0, 9)),
        inner(run),
        channels(groups),
        norm(kind),
        p(exponent),
        weighted(with_weight),
        x(rows * stride, draw(0, 8)),
        u(rows * stride, draw(0, 8)),
        out(rows * cols, draw(0, 8)),
        weight(channels),
        grad(rows),
        norms(rows),
        per_row(rows),
        partial(rows * chunks),
        ties(rows * chunks),
        queue(rk::cuda::RowQueue::words(rows)) {
    const bool whole_numbers = draw(0, 2) == 0;  // ties
    for (std::int64_t row = 0; row < rows; ++row) {
      const int kind_of_row = draw(0, 7);
      const double scale = kind_of_row == 0                    ? 0.0
                           : kind_of_row == 1 && sizeof(S) > 2 ? 1e-30
                           : kind_of_row == 2 && sizeof(S) > 2 ? 1e25
                                                               : 1.0;
      std::normal_distribution<double> normal;
      for (std::int64_t j = 0; j < cols; ++j) {
        const double value = whole_numbers ? draw(-3, 3) : normal(draw.random);
        x[row * stride + j] = from_double<S>(scale * value);
      }
    }
    u.fill_normal(draw.random);
    grad.fill_normal(draw.random);
    for (std::int64_t i = 0; i < channels; ++i) weight[i] = static_cast<A>(0.25 * draw(1, 8));
  }

  double w(std::int64_t j) const { return weighted ? to_double(weight[j / inner % channels]) : 1.0; }
  double a(std::int64_t row, std::int64_t j) const { return w(j) * to_double(x[row * stride + j]); }

  RowNormCall<S> call() {
    RowNormCall<S> c{};
    c.norm = norm;
    c.p = static_cast<A>(p);
    c.rows = rows;
    c.cols = cols;
    c.chunks = chunks;
    c.x = x.data();
    c.u = u.data();
    c.x_stride = c.u_stride = stride;
    c.grad = grad.data();
    c.norms = norms.data();
    if (weighted) c.weights = {weight.data(), channels, inner, cols};
    c.queue = reinterpret_cast<std::uint32_t*>(queue.data());
    c.partial = partial.data();
    c.ties = ties.data();
    c.per_row = per_row.data();
    c.out = out.data();
    return c;
  }
  std::string text() const {
    return std::string(name_of(norm)) + " of " + shape_of<S>({rows, cols}) + (weighted ? ", weighted" : "");
  }
};

double norm_of_row(const std::vector<double>& a, Norm norm, double p) {
  double largest = 0.0, sum = 0.0;
  for (const double v : a) largest = std::max(largest, std::fabs(v));
  if (norm == Norm::kInf || largest == 0.0) return largest;
  const double exponent = norm == Norm::kL1 ? 1.0 : norm == Norm::kP ? p : 2.0;
  for (const double v : a) sum += std::pow(std::fabs(v) / largest, exponent);
  const double n = largest * std::pow(sum, 1.0 / exponent);
  return norm == Norm::kSquaredL2 ? n * n : n;
}

// The derivative of the norm at a.
std::vector<double> slopes(const std::vector<double>& a, double n, Norm norm, double p) {
  std::vector<double> result(a.size());
  const auto ties = static_cast<double>(std::count_if(a.begin(), a.end(), [&](double v) { return std::fabs(v) == n; }));
  for (std::size_t j = 0; j < a.size(); ++j) {
    const double sign = (a[j] > 0.0) - (a[j] < 0.0);
    switch (norm) {
      case Norm::kL1: result[j] = sign; break;
      case Norm::kL2: result[j] = n == 0.0 ? 0.0 : a[j] / n; break;
      case Norm::kSquaredL2: result[j] = 2.0 * a[j]; break;
      case Norm::kInf: result[j] = std::fabs(a[j]) == n ? sign / ties : 0.0; break;
      case Norm::kP: result[j] = n == 0.0 ? 0.0 : sign * std::pow(std::fabs(a[j]) / n, p - 1.0); break;
    }
  }
  return result;
}

// The derivative of <v, slopes> at a, for the norms that have one.
std::vector<double> bends(const std::vector<double>& a, const std::vector<double>& v, double s, double n, Norm norm,
                          double p) {
  std::vector<double> result(a.size());
  for (std::size_t j = 0; j < a.size(); ++j) {
    if (norm == Norm::kSquaredL2) {
      result[j] = 2.0 * v[j];
    } else if (norm == Norm::kL2) {
      result[j] = n == 0.0 ? 0.0 : (v[j] - a[j] / n * s) / n;
    } else if (n != 0.0 && a[j] != 0.0) {
      const double r = std::fabs(a[j]) / n, q = std::pow(r, p - 2.0);
      result[j] = (p - 1.0) * (q * v[j] - (a[j] > 0.0 ? 1.0 : -1.0) * q * r * s) / n;
    }
  }
  return result;
}

template <class S>
void test_problem(const Options& options, Problem<S>& t) {
  using A = rk::cuda::accumulation_t<S>;
  const std::string text = t.text();
  const double eps = epsilon<A>(), loose = 400 * eps, store = epsilon<S>();
  const auto run = [&](Order order, auto&... outputs) {
    run_in_all_orders(options, text, [&] { return rk::cuda::launch_row_norm(order, t.call(), nullptr); }, outputs...);
  };

  run(Order::kValue, t.per_row);
  std::vector<std::vector<double>> a(t.rows), slope(t.rows);
  for (std::int64_t row = 0; row < t.rows; ++row) {
    for (std::int64_t j = 0; j < t.cols; ++j) a[row].push_back(t.a(row, j));
    const double n = norm_of_row(a[row], t.norm, t.p);
    if (n > std::numeric_limits<A>::max()) return;  // a squared norm may overflow
    expect_close(t.per_row[row], n, loose * n + t.cols * double{std::numeric_limits<A>::min()},
                 "norm " + std::to_string(row) + ", " + text);
    t.norms[row] = t.per_row[row];
    slope[row] = slopes(a[row], t.norm == Norm::kInf ? n : to_double(t.norms[row]), t.norm, t.p);
  }

  run(Order::kBackward, t.out);
  for (std::int64_t row = 0; row < t.rows; ++row) {
    for (std::int64_t j = 0; j < t.cols; ++j) {
      const double want = t.grad[row] * t.w(j) * slope[row][j];
      expect_close(to_double(t.out[row * t.cols + j]), want, (loose + store) * std::fabs(want) + 1e-7,
                   "grad_x " + std::to_string(row) + "," + std::to_string(j) + ", " + text);
    }
  }

  t.out.fill_with_nan();
  run(Order::kDoubleBackward, t.per_row, t.out);
  for (std::int64_t row = 0; row < t.rows; ++row) {
    std::vector<double> v;
    double s = 0.0, size = 0.0, largest = 0.0;
    for (std::int64_t j = 0; j < t.cols; ++j) {
      v.push_back(t.w(j) * to_double(t.u[row * t.stride + j]));
      s += v[j] * slope[row][j];
      size += std::fabs(v[j] * slope[row][j]);
    }
    expect_close(t.per_row[row], s, loose * size, "gg_grad " + std::to_string(row) + ", " + text);
    if (t.norm == Norm::kL1 || t.norm == Norm::kInf) continue;
    std::vector<double> bend = bends(a[row], v, s, to_double(t.norms[row]), t.norm, t.p);
    for (std::int64_t j = 0; j < t.cols; ++j) largest = std::max(largest, std::fabs(bend[j] *= t.grad[row] * t.w(j)));
    if (largest > std::numeric_limits<A>::max() || largest > 1e4 * (sizeof(S) == 2 ? 1 : 1e30)) continue;
    for (std::int64_t j = 0; j < t.cols; ++j) {
      expect_close(to_double(t.out[row * t.cols + j]), bend[j],
                   (loose + store) * std::fabs(bend[j]) + 10 * loose * largest + 1e-7,
                   "second grad_x " + std::to_string(row) + "," + std::to_string(j) + ", " + text);
    }
  }
}

template <class S>
void test_shapes(const Options& options, Draw& draw) {
  const Norm norm = draw.one_of({Norm::kL1, Norm::kL2, Norm::kSquaredL2, Norm::kInf, Norm::kP});
  const double p = draw.one_of({1.5, 3.0, 4.0});
  const bool weighted = draw(0, 1) == 1;
  Problem<S> one_chunk(draw, norm, p, draw(1, 5), draw(1, 6), draw(1, 150), weighted);
  test_problem(options, one_chunk);
}

template <class S>
void test_long_rows(const Options& options, Draw& draw, Norm norm) {
  Problem<S> chunks(draw, norm, 3.0, 2, 3, static_cast<int>(rk::cuda::row_chunk<S>(norm) * 2 / 3) + draw(1, 40), true);
  test_problem(options, chunks);
  Problem<S> long_runs(draw, norm, 3.0, 1, 1, static_cast<int>(rk::cuda::row_chunk<S>(norm)) + draw(1, 40),
                       draw(0, 1) == 1);
  test_problem(options, long_runs);
}

// Bits do not depend on where x, u and the result lie.
template <class S>
void test_alignment(Draw& draw, Norm norm, std::int64_t cols) {
  Problem<S> t(draw, norm, 3.0, 2, 1, cols, false);
  const auto run = [&](int offset, Order order) {
    Buffer<S> x(t.rows * cols, offset), u(t.rows * cols, offset), out(t.rows * cols, offset);
    for (std::int64_t row = 0; row < t.rows; ++row) {
      std::copy_n(t.x.data() + row * t.stride, cols, x.data() + row * cols);
      std::copy_n(t.u.data() + row * t.stride, cols, u.data() + row * cols);
    }
    auto c = t.call();
    c.x = x.data(), c.u = u.data(), c.out = out.data();
    c.x_stride = c.u_stride = cols;
    expect_success(rk::cuda::launch_row_norm(order, c, nullptr));
    std::vector<double> got(t.per_row.data(), t.per_row.data() + t.rows);
    if (order == Order::kValue) std::copy_n(t.per_row.data(), t.rows, t.norms.data());
    if (order != Order::kValue)
      for (std::size_t j = 0; j < out.size(); ++j) got.push_back(to_double(out[j]));
    return got;
  };
  for (const Order order : {Order::kValue, Order::kBackward, Order::kDoubleBackward}) {
    const std::vector<double> want = run(0, order), got = run(1, order);
    for (std::size_t j = 0; j < want.size(); ++j)
      if (want[j] == want[j] || got[j] == got[j]) expect_close(got[j], want[j], 0.0, t.text() + " one element further");
  }
}

// Fewer blocks than rows: each block does several, one after another, with the same shared memory.
void test_small_grid(Draw& draw) {
  Problem<float> t(draw, Norm::kL2, 2.0, 7, 1, 600, false);
  expect_success(
      rk::cuda::launch(rk::cuda::row_norm_kernel<Norm::kL2, float>, dim3(2), dim3(160), 0, nullptr, t.call()));
  for (std::int64_t row = 0; row < t.rows; ++row) {
    std::vector<double> a;
    for (std::int64_t j = 0; j < t.cols; ++j) a.push_back(t.a(row, j));
    const double n = norm_of_row(a, Norm::kL2, 2.0);
    expect_close(t.per_row[row], n, 1e-4 * n, "norm in a small grid");
  }
}

// The last of so many rows that its elements' flat index passes 2^31; the others do not exist.
void test_huge() {
  constexpr std::int64_t rows = 280000;
  const std::int64_t cols = rk::cuda::row_chunk<__half>(Norm::kL2);
  LastRowOnly<__half> x(rows, cols), u(rows, cols), out(rows, cols);
  std::fill_n(x.last_row(), cols, from_double<__half>(0.5));
  std::fill_n(u.last_row(), cols, from_double<__half>(1.0));
  std::vector<float> per_row(rows), norms(rows, static_cast<float>(0.5 * std::sqrt(double(cols)))), grad(rows, 256.0f);
  RowNormCall<__half> c{};
  c.norm = Norm::kL2;
  c.rows = rows;
  c.cols = c.x_stride = c.u_stride = cols;
  c.chunks = 1;
  c.x = x.data();
  c.u = u.data();
  c.out = out.data();
  c.grad = grad.data();
  c.norms = norms.data();
  c.per_row = per_row.data();
  const FirstBlock first(rows - 1);
  expect_success(rk::cuda::launch_row_norm(Order::kValue, c, nullptr));
  expect_close(per_row[rows - 1], norms[0], 1e-3, "norm of the last row");
  expect_success(rk::cuda::launch_row_norm(Order::kBackward, c, nullptr));
  expect_close(to_double(out.last_row()[cols - 1]), 128.0 / norms[0], 1e-3, "grad_x of the last element");
  expect_success(rk::cuda::launch_row_norm(Order::kDoubleBackward, c, nullptr));
  expect_close(per_row[rows - 1], 0.5 * double(cols) / norms[0], 1e-2, "gg_grad of the last row");
  expect_close(to_double(out.last_row()[cols - 1]), 0.0, 1e-3, "second grad_x of the last element");
}

}  // namespace

int main(int argc, char** argv) {
  const Options options(argc, argv);
  Draw draw{std::mt19937(options.seed)};
  for (int round = 0; round < options.rounds; ++round) {
    test_shapes<float>(options, draw);
    test_shapes<__half>(options, draw);
    test_small_grid(draw);
  }
  const bool thorough = options.rounds > 3;  // ThreadSanitizer takes its time for every block
  for (const Norm norm : {Norm::kL1, Norm::kL2, Norm::kSquaredL2, Norm::kInf, Norm::kP}) {
    test_long_rows<float>(options, draw, norm);
    if (!thorough) continue;
    test_long_rows<__nv_bfloat16>(options, draw, norm);
    test_long_rows<double>(options, draw, norm);
    for (const std::int64_t cols : {96, 9600}) test_alignment<float>(draw, norm, cols);
    for (const std::int64_t cols : {96, 19200}) test_alignment<__nv_bfloat16>(draw, norm, cols);
  }
  if (options.huge) test_huge();
  return finish();
}
