// The kernels of softmax_double_backward against plain loops in double: both functions, random shapes and alignments,
// outputs that are not needed, small grids, and the end of a tensor of more than 2^31 elements.
#include "softmax.cuh"

#include <algorithm>

#include "testing.h"

namespace {

using rk::cuda::SoftmaxCall;
using namespace testing;

template <class S>
struct Problem {
  using A = rk::cuda::accumulation_t<S>;
  bool log;
  std::int64_t batch, classes, inner, n;
  Buffer<S> u, grad, output, gg_grad, grad_output;

  // Tensors begin up to `most_offset` elements behind a multiple of 16 bytes.
  Problem(Draw& draw, bool of_log, std::int64_t rows, std::int64_t class_count, std::int64_t columns, int most_offset)
      : log(of_log),
        batch(rows),
        classes(class_count),
        inner(columns),
        n(batch * classes * inner),
        u(n, draw(0, most_offset)),
        grad(n, draw(0, most_offset)),
        output(n, draw(0, most_offset)),
        gg_grad(n, draw(0, most_offset)),
        grad_output(n, draw(0, most_offset)) {
    u.fill_normal(draw.random);
    grad.fill_normal(draw.random);
    Buffer<double> logits(n);
    logits.fill_normal(draw.random, 2.0);
    for (std::int64_t row = 0; row < batch; ++row)
      for (std::int64_t s = 0; s < inner; ++s) {
        double sum = 0.0;
        for (std::int64_t c = 0; c < classes; ++c) sum += std::exp(logits[index(row, c, s)]);
        for (std::int64_t c = 0; c < classes; ++c) {
          const double log_p = logits[index(row, c, s)] - std::log(sum);
          output[index(row, c, s)] = from_double<S>(log ? log_p : std::exp(log_p));
        }
      }
  }

  std::int64_t index(std::int64_t row, std::int64_t c, std::int64_t s) const { return (row * classes + c) * inner + s; }
  double p(std::int64_t j) const { return log ? std::exp(to_double(output[j])) : to_double(output[j]); }

  SoftmaxCall<S> call(bool need_grad, bool need_output) {
    SoftmaxCall<S> c{};
    c.batch = batch;
    c.classes = classes;
    c.inner = inner;
    c.u = u.data();
    c.grad = grad.data();
    c.output = output.data();
    c.gg_grad = need_grad ? gg_grad.data() : nullptr;
    c.grad_output = need_output ? grad_output.data() : nullptr;
    return c;
  }

  std::string text(const char* what, std::int64_t j) const {
    return std::string(what) + " " + std::to_string(j) + " of " + (log ? "log_" : "") + "softmax, " +
           shape_of<S>({batch, classes, inner});
  }

  void check(bool need_grad, bool need_output) const {
    const double loose = 100 * epsilon<A>(), store = epsilon<S>();
    for (std::int64_t row = 0; row < batch; ++row)
      for (std::int64_t s = 0; s < inner; ++s) {
        double mean_u = 0.0, mean_g = 0.0, sum_g = 0.0, size = 0.0;
        for (std::int64_t c = 0; c < classes; ++c) {
          const std::int64_t j = index(row, c, s);
          mean_u += p(j) * to_double(u[j]);
          mean_g += p(j) * to_double(grad[j]);
          sum_g += to_double(grad[j]);
          size += std::fabs(to_double(grad[j]));
        }
        for (std::int64_t c = 0; c < classes; ++c) {
          const std::int64_t j = index(row, c, s);
          const double u_j = to_double(u[j]), g = to_double(grad[j]);
          const double want_g = log ? u_j - mean_u : p(j) * (u_j - mean_u);
          const double want_o = log ? -p(j) * u_j * sum_g : u_j * (g - mean_g) - g * mean_u;
          if (need_grad)
            expect_close(to_double(gg_grad[j]), want_g, store * std::fabs(want_g) + 4 * loose + 1e-7,
                         text("gg_grad", j));
          if (need_output)
            expect_close(to_double(grad_output[j]), want_o,
                         store * std::fabs(want_o) + loose * (8 + std::fabs(u_j) * size) + 1e-7,
                         text("grad_output", j));
        }
      }
  }
};

template <class S>
void test_shape(const Options& options, Draw& draw, int batch, int classes, int inner) {
  if (draw(0, 1)) (inner == 1 ? classes : inner) = ((inner == 1 ? classes : inner) + 7) / 8 * 8;  // whole vectors
  Problem<S> t(draw, draw(0, 1), batch, classes, inner, draw.one_of({0, 8}));
  const int needed = draw(0, 4);
  const bool need_grad = needed != 0, need_output = needed != 1;
  const auto call = [&] {
    return rk::cuda::launch_softmax_double_backward(t.log, t.call(need_grad, need_output), nullptr);
  };
  run_in_all_orders(options, t.text("output", 0), call, t.gg_grad, t.grad_output);
  t.check(need_grad, need_output);
}

// No bit depends on where the tensors lie.
template <class S>
void test_alignment(Draw& draw, std::int64_t classes, std::int64_t inner) {
  Problem<S> t(draw, draw(0, 1), 3, classes, inner, 0);
  Buffer<S> u(t.n, 1), gg_grad(t.n, 3), grad_output(t.n, 0);
  std::copy_n(t.u.data(), t.n, u.data());
  auto c = t.call(true, true);
  expect_success(rk::cuda::launch_softmax_double_backward(t.log, c, nullptr));
  c.u = u.data();
  c.gg_grad = gg_grad.data();
  c.grad_output = grad_output.data();
  expect_success(rk::cuda::launch_softmax_double_backward(t.log, c, nullptr));
  const std::size_t bytes = t.n * sizeof(S);
  expect_close(std::memcmp(t.gg_grad.data(), gg_grad.data(), bytes), 0, 0, t.text("gg_grad elsewhere", 0));
  expect_close(std::memcmp(t.grad_output.data(), grad_output.data(), bytes), 0, 0, t.text("grad_output elsewhere", 0));
}

// Fewer blocks than units of work: each does several, one after another.
void test_small_grid(Draw& draw) {
  Problem<float> rows(draw, false, 7, 300, 1, 0), columns(draw, false, 3, 5, 100, 0);
  for (const dim3 block : {dim3(96), dim3(32, 3)}) {
    const rk::cuda::RowRounds rounds(300, block.x * 4 * rk::cuda::kSoftmaxVectors);
    const auto kernel = rk::cuda::softmax_double_backward_rows_kernel<false, rk::cuda::Layout::kVectors, float>;
    expect_success(rk::cuda::launch(kernel, dim3(2), block, 0, nullptr, rows.call(true, true), rounds));
    rows.check(true, true);
    rows.gg_grad.fill_with_nan();
  }
  expect_success(rk::cuda::launch(rk::cuda::softmax_double_backward_columns_kernel<false, 1, float>, dim3(2), dim3(32),
                                  0, nullptr, columns.call(true, true)));
  columns.check(true, true);
}

// The last of so many rows that its elements' index passes 2^31; the others do not exist.
void test_huge() {
  constexpr std::int64_t rows = 70000, classes = 40000;
  LastRowOnly<__half> u(rows, classes), g(rows, classes), o(rows, classes), gg_grad(rows, classes),
      grad_output(rows, classes);
  std::fill_n(u.last_row(), classes, from_double<__half>(1.0));
  std::fill_n(g.last_row(), classes, from_double<__half>(0.5));
  std::fill_n(o.last_row(), classes, from_double<__half>(-std::log(double{classes})));
  SoftmaxCall<__half> c{};
  c.batch = rows;
  c.classes = classes;
  c.inner = 1;
  c.u = u.data();
  c.grad = g.data();
  c.output = o.data();
  c.gg_grad = gg_grad.data();
  c.grad_output = grad_output.data();
  const FirstBlock first(rows - 1);
  expect_success(rk::cuda::launch_softmax_double_backward(true, c, nullptr));
  expect_close(to_double(gg_grad.last_row()[classes - 1]), 0.0, 1e-2, "gg_grad of the last element");
  expect_close(to_double(grad_output.last_row()[classes - 1]), -0.5, 1e-2, "grad_output of the last element");
}

}  // namespace

int main(int argc, char** argv) {
  const Options options(argc, argv);
  Draw draw{std::mt19937(options.seed)};
  for (int round = 0; round < options.rounds; ++round) {
    test_shape<float>(options, draw, draw(1, 5), draw(1, 700), 1);
    test_shape<float>(options, draw, draw(1, 3), draw(1, 70), draw(2, 80));
    test_shape<__half>(options, draw, draw(1, 5), draw(1, 700), 1);
    test_shape<__nv_bfloat16>(options, draw, draw(1, 3), draw(1, 30), draw(2, 300));
    test_shape<double>(options, draw, draw(1, 3), draw(1, 70), draw(1, 3));
    test_alignment<float>(draw, draw(1, 500), 1);
    test_alignment<__half>(draw, 8 * draw(1, 60), 1);
    test_alignment<__nv_bfloat16>(draw, draw(1, 30), draw(2, 60));
  }
  for (const std::size_t kilobytes : {227, 48, 1}) {  // several rounds, of which shared memory keeps all, some, none
    cuda_emulator::configuration().dynamic_shared_limit = kilobytes << 10;
    test_shape<float>(options, draw, 2, 9000, 1);
    test_shape<__nv_bfloat16>(options, draw, 2, 20001, 1);
  }
  test_small_grid(draw);
  if (options.huge) test_huge();
  return finish();
}
