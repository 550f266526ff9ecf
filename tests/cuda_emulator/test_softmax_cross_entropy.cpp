// The kernels of softmax_cross_entropy against plain loops in double: random shapes and alignments, the three kinds of
// target, smoothing, temperature, ignored and invalid rows, infinite logits, small grids, and the end of a matrix of more
// than 2^31 elements.
#include "softmax_cross_entropy.cuh"

#include <algorithm>

#include "testing.h"

namespace {

using rk::cuda::CrossEntropyCall;
using rk::cuda::Order;
using namespace testing;

enum class Target { indices, narrow, wide };
constexpr std::int64_t ignored = -100;

// What the kernels are given, and what they leave.
template <class S>
struct Problem {
  using A = rk::cuda::accumulation_t<S>;
  std::int64_t rows, classes, stride;
  Target target;
  double smoothing, temperature;
  Buffer<S> logits, u, out, narrow;
  Buffer<std::int64_t> indices;
  Buffer<A> wide, grad, per_row, statistics, statistics_in;

  // Tensors begin up to `most_offset` elements behind a multiple of 16 bytes, and rows are as many apart.
  Problem(Draw& draw, Target kind, std::int64_t row_count, std::int64_t class_count, int most_offset)
      : rows(row_count),
        classes(class_count),
        stride(classes + draw(0, 1) * draw(0, most_offset)),
        target(kind),
        smoothing(draw.one_of({0.0, 0.1})),
        temperature(draw.one_of({1.0, 0.5, 4.0})),
        logits(rows * stride, draw(0, most_offset)),
        u(rows * stride, draw(0, most_offset)),
        out(rows * classes, draw(0, most_offset)),
        narrow(rows * stride),
        indices(rows),
        wide(rows * stride),
        grad(rows),
        per_row(rows),
        statistics(2 * rows),
        statistics_in(2 * rows) {
    logits.fill_normal(draw.random, draw.one_of({1.0, 20.0}));
    u.fill_normal(draw.random);
    grad.fill_normal(draw.random);
    for (std::int64_t row = 0; row < rows; ++row) {
      const int kind_of_row = draw(0, 6);
      indices[row] = kind_of_row == 0 ? ignored : kind_of_row == 1 ? classes : draw(0, static_cast<int>(classes) - 1);
      for (std::int64_t j = 0; j < classes; ++j) {
        const double t = 0.125 * draw(0, 4);
        narrow[row * stride + j] = from_double<S>(t);
        wide[row * stride + j] = static_cast<A>(t);
      }
    }
  }

  bool is_ignored(std::int64_t row) const { return target == Target::indices && indices[row] == ignored; }
  bool is_invalid(std::int64_t row) const { return target == Target::indices && indices[row] == classes; }
  double z(std::int64_t row, std::int64_t j) const { return to_double(logits[row * stride + j]) / temperature; }
  double q(std::int64_t row, std::int64_t j) const {
    const double t = target == Target::indices ? indices[row] == j : to_double(wide[row * stride + j]);
    return (1.0 - smoothing) * t + smoothing / static_cast<double>(classes);
  }

  CrossEntropyCall<S> call(Order order) {
    CrossEntropyCall<S> c{};
    c.rows = rows;
    c.classes = classes;
    c.logits = logits.data();
    c.u = u.data();
    c.logits_stride = c.u_stride = c.target_stride = stride;
    if (target == Target::indices) c.indices = indices.data();
    if (target == Target::narrow) c.narrow_target = narrow.data();
    if (target == Target::wide) c.wide_target = wide.data();
    c.ignore_index = ignored;
    c.label_smoothing = static_cast<A>(smoothing);
    c.inverse_t = static_cast<A>(1.0 / temperature);
    c.grad = grad.data();
    c.statistics_in = statistics_in.data();
    if (order != Order::kBackward) c.per_row = per_row.data();
    if (order == Order::kValue) c.statistics = statistics.data();
    if (order != Order::kValue) c.out = out.data();
    return c;
  }
  std::string text(const char* what, std::int64_t row, std::int64_t j = -1) const {
    return std::string(what) + " " + std::to_string(row) + (j < 0 ? "" : "," + std::to_string(j)) + " of " +
           shape_of<S>({rows, classes});
  }
};

// One row in double.
struct Row {
  double loss = 0.0, max = 0.0, log_sum = 0.0, total_q = 0.0, mean_u = 0.0, dot_qu = 0.0;
  std::vector<double> p;

  template <class S>
  Row(const Problem<S>& t, std::int64_t row) {
    max = t.z(row, 0);
    for (std::int64_t j = 0; j < t.classes; ++j) max = std::max(max, t.z(row, j));
    double sum = 0.0;
    for (std::int64_t j = 0; j < t.classes; ++j) sum += std::exp(t.z(row, j) - max);
    log_sum = std::log(sum);
    for (std::int64_t j = 0; j < t.classes; ++j) {
      const double q = t.q(row, j), u = to_double(t.u[row * t.stride + j]);
      p.push_back(std::exp(t.z(row, j) - max - log_sum));
      loss += q * (max + log_sum - t.z(row, j));
      total_q += q;
      mean_u += p[j] * u;
      dot_qu += q * u;
    }
  }
};

template <class S>
void test_problem(const Options& options, Problem<S>& t) {
  using A = rk::cuda::accumulation_t<S>;
  const double loose = 400 * epsilon<A>(), store = epsilon<S>();
  const auto run = [&](Order order, auto&... outputs) {
    const auto call = [&] { return rk::cuda::launch_softmax_cross_entropy(order, t.call(order), nullptr); };
    run_in_all_orders(options, t.text("output", 0), call, outputs...);
  };
  // Ignored rows give zeros, invalid ones NaN; true if this was one of them.
  const auto is_settled = [&](std::int64_t row, double got, const std::string& what) {
    if (t.is_ignored(row)) expect_close(got, 0.0, 0.0, what);
    if (t.is_invalid(row)) expect_nan(got, what);
    return t.is_ignored(row) || t.is_invalid(row);
  };
  std::vector<Row> want;
  for (std::int64_t row = 0; row < t.rows; ++row) want.emplace_back(t, row);

  run(Order::kValue, t.per_row, t.statistics);
  for (std::int64_t row = 0; row < t.rows; ++row) {
    const Row& w = want[row];
    t.statistics_in[2 * row] = t.statistics[2 * row];
    t.statistics_in[2 * row + 1] = t.statistics[2 * row + 1];
    if (is_settled(row, t.per_row[row], t.text("loss", row))) continue;
    const double scale = 1.0 + std::fabs(w.max) + std::fabs(w.loss) * t.classes;
    expect_close(t.per_row[row], w.loss, loose * scale, t.text("loss", row));
    expect_close(t.statistics[2 * row], w.max, loose * std::fabs(w.max), t.text("maximum", row));
    expect_close(t.statistics[2 * row + 1], w.log_sum, loose * scale, t.text("log of the sum", row));
  }

  run(Order::kBackward, t.out);
  for (std::int64_t row = 0; row < t.rows; ++row) {
    const double factor = t.grad[row] / t.temperature;
    for (std::int64_t j = 0; j < t.classes; ++j) {
      const double got = to_double(t.out[row * t.classes + j]),
                   slope = factor * (want[row].total_q * want[row].p[j] - t.q(row, j));
      if (is_settled(row, got, t.text("grad_logits", row, j))) continue;
      expect_close(got, slope, store * std::fabs(slope) + loose * std::fabs(factor) * want[row].total_q + 1e-7,
                   t.text("grad_logits", row, j));
    }
  }

  t.out.fill_with_nan();
  run(Order::kDoubleBackward, t.per_row, t.out);
  for (std::int64_t row = 0; row < t.rows; ++row) {
    const Row& w = want[row];
    const double scale = (1.0 + w.total_q) / t.temperature;
    if (!is_settled(row, t.per_row[row], t.text("gg_grad", row))) {
      expect_close(t.per_row[row], (w.total_q * w.mean_u - w.dot_qu) / t.temperature, 10 * loose * scale,
                   t.text("gg_grad", row));
    }
    for (std::int64_t j = 0; j < t.classes; ++j) {
      const double got = to_double(t.out[row * t.classes + j]), u = to_double(t.u[row * t.stride + j]);
      if (is_settled(row, got, t.text("second grad_logits", row, j))) continue;
      const double bend = t.grad[row] * w.total_q * w.p[j] * (u - w.mean_u) / (t.temperature * t.temperature);
      const double size = std::fabs(t.grad[row]) * w.total_q / (t.temperature * t.temperature);
      expect_close(got, bend, store * std::fabs(bend) + 10 * loose * size + 1e-7, t.text("second grad_logits", row, j));
    }
  }
}

template <class S>
void test_shapes(const Options& options, Draw& draw, int rows, int classes) {
  const Target kind = draw.one_of({Target::indices, Target::indices, Target::narrow, Target::wide});
  if (draw(0, 1)) classes = (classes + 7) / 8 * 8;  // whole vectors
  Problem<S> problem(draw, kind, rows, classes, draw.one_of({0, 9}));
  test_problem(options, problem);
}

// No bit depends on where the tensors lie.
template <class S>
void test_alignment(Draw& draw, Target kind, std::int64_t classes) {
  Problem<S> t(draw, kind, 3, classes, 0);
  if (t.stride != classes) fail_usage("rows are not adjacent");
  Buffer<S> logits(3 * classes, 1), out(3 * classes, 3);
  std::copy_n(t.logits.data(), 3 * classes, logits.data());
  const auto bits = [&](Order order, bool elsewhere) {
    auto c = t.call(order);
    if (elsewhere) c.logits = logits.data();
    if (elsewhere && c.out) c.out = out.data();
    expect_success(rk::cuda::launch_softmax_cross_entropy(order, c, nullptr));
    std::string text = t.per_row.bytes() + t.statistics.bytes();
    if (c.out) text.append(reinterpret_cast<const char*>(c.out), 3 * classes * sizeof(S));
    if (order == Order::kValue) std::copy_n(t.statistics.data(), 6, t.statistics_in.data());
    return text;
  };
  for (const Order order : {Order::kValue, Order::kBackward, Order::kDoubleBackward})
    expect_close(bits(order, false) == bits(order, true), 1, 0, t.text("bits elsewhere", static_cast<int>(order)));
}

// Fewer blocks than rows: each block does several, one after another, with the same shared memory.
void test_small_grid(Draw& draw) {
  Problem<float> t(draw, Target::indices, 7, 300, 0);
  const auto call = t.call(Order::kValue);
  const auto check = [&] {
    for (std::int64_t row = 0; row < t.rows; ++row) {
      if (t.is_ignored(row) || t.is_invalid(row)) continue;
      const Row want(t, row);
      expect_close(t.per_row[row], want.loss, 1e-4 * (1.0 + std::fabs(want.max) + want.loss), "loss in a small grid");
    }
    t.per_row.fill_with_nan();
  };
  constexpr auto target = rk::cuda::Target::kSmoothedIndex;
  constexpr auto layout = rk::cuda::Layout::kVectors;
  const auto kernel = rk::cuda::softmax_cross_entropy_kernel<target, layout, float>;
  for (const dim3 block : {dim3(96), dim3(32, 3)}) {
    const int vectors = rk::cuda::cross_entropy_vectors<target, layout, float>(Order::kValue);
    const rk::cuda::RowRounds rounds(300, block.x * 4 * vectors);
    expect_success(rk::cuda::launch(kernel, dim3(2), block, 0, nullptr, call, rounds));
    check();
  }
}

// Rows that are not finite, and their neighbours: masked classes, and what makes a row NaN.
void test_infinite(Draw& draw, int classes) {
  constexpr float inf = INFINITY;
  Problem<float> t(draw, Target::indices, 6, classes, 0);
  t.smoothing = 0.0;
  t.temperature = 1.0;
  for (int row = 0; row < 6; ++row) t.indices[row] = 0;
  for (int j = 1; j < classes; ++j) t.logits[j] = -inf;             // one class is left: certain
  for (int j = 0; j < classes; ++j) t.logits[t.stride + j] = -inf;  // none
  t.logits[2 * t.stride + classes - 1] = inf;
  t.logits[3 * t.stride + classes / 2] = NAN;
  for (int j = 0; j < classes; ++j) t.logits[4 * t.stride + j] = j ? 1e38f : 2e38f;  // far apart, and large
  expect_success(rk::cuda::launch_softmax_cross_entropy(Order::kValue, t.call(Order::kValue), nullptr));
  std::copy_n(t.statistics.data(), 12, t.statistics_in.data());
  expect_close(t.per_row[0], 0.0, 0.0, "loss where one class is left");
  for (const int row : {1, 2, 3}) expect_nan(t.per_row[row], t.text("loss of no distribution", row));
  expect_close(t.per_row[4], 0.0, 0.0, "loss of large logits");
  expect_close(t.per_row[5], Row(t, 5).loss, 1e-4 * (1.0 + Row(t, 5).loss), "loss beside rows of NaN");
  expect_success(rk::cuda::launch_softmax_cross_entropy(Order::kBackward, t.call(Order::kBackward), nullptr));
  for (int j = 0; j < classes; ++j) {
    for (const int row : {0, 4}) expect_close(t.out[row * classes + j], 0.0, 0.0, t.text("grad_logits", row, j));
    for (const int row : {1, 2, 3}) expect_nan(t.out[row * classes + j], t.text("grad_logits", row, j));
    expect_close(std::isfinite(t.out[5 * classes + j]), 1, 0, t.text("finite grad_logits", 5, j));
  }
  t.smoothing = 0.1;
  expect_success(rk::cuda::launch_softmax_cross_entropy(Order::kValue, t.call(Order::kValue), nullptr));
  expect_close(t.per_row[0], inf, 0.0, "loss of a masked class that smoothing weighs");
}

// The last of so many rows that its elements' flat index passes 2^31; the others do not exist.
void test_huge() {
  constexpr std::int64_t rows = 70000, classes = 40000;
  LastRowOnly<__half> logits(rows, classes), u(rows, classes), out(rows, classes);
  std::fill_n(logits.last_row(), classes, from_double<__half>(3.0));
  std::fill_n(u.last_row(), classes, from_double<__half>(1.0));
  std::vector<float> per_row(rows), statistics(2 * rows), grad(rows, -1000.0f);
  const std::vector<std::int64_t> indices(rows, classes - 1);
  CrossEntropyCall<__half> c{};
  c.rows = rows;
  c.classes = c.logits_stride = c.u_stride = classes;
  c.logits = logits.data();
  c.u = u.data();
  c.indices = indices.data();
  c.ignore_index = ignored;
  c.inverse_t = 1.0f;
  c.grad = grad.data();
  c.per_row = per_row.data();
  c.statistics = statistics.data();
  const FirstBlock first(rows - 1);
  expect_success(rk::cuda::launch_softmax_cross_entropy(Order::kValue, c, nullptr));
  expect_close(per_row[rows - 1], std::log(double{classes}), 1e-3, "loss of the last row");
  c.statistics_in = statistics.data();
  c.statistics = nullptr;
  c.per_row = nullptr;
  c.out = out.data();
  expect_success(rk::cuda::launch_softmax_cross_entropy(Order::kBackward, c, nullptr));
  expect_close(to_double(out.last_row()[classes - 1]), 1000.0 * (1.0 - 1.0 / classes), 1.0,
               "grad_logits of the last element");
  c.per_row = per_row.data();
  expect_success(rk::cuda::launch_softmax_cross_entropy(Order::kDoubleBackward, c, nullptr));
  expect_close(to_double(out.last_row()[classes - 1]), 0.0, 1e-3, "second grad_logits of the last element");
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
    test_alignment<float>(draw, draw.one_of({Target::indices, Target::narrow}), 4 * draw(1, 200));
    test_alignment<__nv_bfloat16>(draw, draw.one_of({Target::indices, Target::wide}), 8 * draw(1, 200));
    test_infinite(draw, draw(2, 700));
  }
  test_shapes<float>(options, draw, 3, 5000);
  for (const std::size_t kilobytes : {227, 70, 1}) {  // several rounds, of which shared memory keeps all, some, none
    cuda_emulator::configuration().dynamic_shared_limit = kilobytes << 10;
    test_shapes<float>(options, draw, 2, 20001);
    test_shapes<__nv_bfloat16>(options, draw, 2, 40000);
  }
  if (options.huge) test_huge();
  return finish();
}
