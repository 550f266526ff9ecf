// The kernels of margin_loss against sorted logits in double: every kind, random sizes and alignments, ties, classes that
// do not exist, and NaN.
#include "margin_loss.cuh"

#include <algorithm>
#include <numeric>

#include "testing.h"

namespace {

using rk::Margin;
using rk::cuda::MarginCall;
using namespace testing;

template <class S>
struct Problem {
  using A = rk::cuda::accumulation_t<S>;
  Margin kind;
  bool given;
  std::int64_t rows, classes;
  Buffer<S> logits, slopes, grad_logits;
  Buffer<std::int64_t> target, towards;
  Buffer<A> loss, grad;

  Problem(Draw& draw, std::int64_t r, std::int64_t c)
      : kind(draw(0, 1) ? Margin::kDlr : Margin::kCw),
        given(draw(0, 1)),
        rows(r),
        classes(c),
        logits(rows * classes, draw(0, 8)),
        slopes(rows * classes, draw(0, 8)),
        grad_logits(rows * classes, draw(0, 8)),
        target(rows),
        towards(rows),
        loss(rows),
        grad(rows) {
    logits.fill_normal(draw.random, 3.0);
    grad.fill_normal(draw.random);
    const int last = static_cast<int>(classes) - 1;
    for (std::int64_t i = 0; i < rows; ++i) {
      target[i] = draw(0, last);
      towards[i] = (target[i] + draw(1, last)) % classes;
      if (draw(0, 2) == 0) logits[i * classes + draw(0, last)] = logits[i * classes + draw(0, last)];  // a tie
    }
  }

  cudaError_t run() {
    MarginCall<S> c{};
    c.rows = rows;
    c.classes = static_cast<int>(classes);
    c.kind = kind;
    c.logits = logits.data();
    c.target = target.data();
    c.towards = given ? towards.data() : nullptr;
    c.loss = loss.data();
    c.slopes = slopes.data();
    const cudaError_t status = rk::cuda::launch_margin_loss(c, nullptr);
    if (status != cudaSuccess) return status;
    rk::cuda::MarginBackwardCall<S> b{rows * classes, classes, grad.data(), slopes.data(), grad_logits.data()};
    return rk::cuda::launch_margin_loss_backward(b, nullptr);
  }

  std::string text(const char* what) const {
    return std::string(what) + " of kind " + std::to_string(static_cast<int>(kind)) + (given ? " towards" : "") + ", " +
           shape_of<S>({rows, classes});
  }

  void check() const {
    const double loose = 40 * epsilon<A>(), stored = 2 * epsilon<S>();
    for (std::int64_t i = 0; i < rows; ++i) {
      const auto z = [&](std::int64_t c) { return to_double(logits[i * classes + c]); };
      std::vector<std::int64_t> order(classes);
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return z(a) > z(b); });
      const std::int64_t y = target[i], o = given ? towards[i] : order[0] == y ? order[1] : order[0];
      std::vector<double> slope(classes, 0.0);
      double s = 1.0, value = z(o) - z(y);
      slope[o] += 1.0;
      slope[y] -= 1.0;
      if (kind == Margin::kDlr) {
        s = z(order[0]) - (given ? 0.5 * (z(order[2]) + z(order[3])) : z(order[2]));
        value = s == 0.0 ? 0.0 : value / s;
        slope[order[0]] -= value;
        slope[order[2]] += given ? 0.5 * value : value;
        if (given) slope[order[3]] += 0.5 * value;
      }
      const double factor = s == 0.0 ? 0.0 : 1.0 / s, size = 1.0 + std::fabs(value) + 3.0 * std::fabs(factor);
      expect_close(to_double(loss[i]), value, loose * size, text("loss"));
      for (std::int64_t c = 0; c < classes; ++c) {
        const double want = slope[c] * factor, scale = loose * size * size * (1.0 + std::fabs(factor));
        expect_close(to_double(slopes[i * classes + c]), want, scale + stored * std::fabs(want), text("a slope"));
        const double g = double(grad[i]);
        expect_close(to_double(grad_logits[i * classes + c]), g * want,
                     std::fabs(g) * scale + 2 * stored * std::fabs(g * want) + 1e-7, text("a gradient"));
      }
    }
  }
};

template <class S>
void test_kind(const Options& options, Draw& draw, int rows, int classes) {
  Problem<S> t(draw, rows, classes);
  run_in_all_orders(options, t.text("a result"), [&] { return t.run(); }, t.loss, t.slopes, t.grad_logits);
  t.check();
}

void test_invalid(Draw& draw) {
  Problem<float> t(draw, 4, 10);
  t.target[1] = 10;
  t.target[2] = -1;
  t.logits[35] = draw(0, 1) ? NAN : -NAN;
  expect_success(t.run());
  for (const int row : {1, 2, 3}) {
    expect_nan(t.loss[row], t.text("an invalid loss"));
    for (int c = 0; c < 10; ++c) expect_nan(t.slopes[row * 10 + c], t.text("an invalid slope"));
  }
  expect_close(t.loss[0] - t.loss[0], 0.0, 0.0, t.text("the other loss"));
}

}  // namespace

int main(int argc, char** argv) {
  const Options options(argc, argv);
  Draw draw{std::mt19937(options.seed)};
  for (int round = 0; round < options.rounds; ++round) {
    test_kind<float>(options, draw, draw(1, 12), draw(4, 100));
    test_kind<double>(options, draw, draw(1, 9), draw(4, 40));
    test_kind<__half>(options, draw, draw(1, 5), draw(4, 40));
    test_kind<__nv_bfloat16>(options, draw, draw(1, 5), draw(4, 40));
  }
  test_kind<float>(options, draw, 2, draw(1025, 1100));  // several rounds
  if (options.huge) {
    test_kind<__half>(options, draw, 1, 65536);  // the most whose ranks are short
    test_kind<__nv_bfloat16>(options, draw, 1, 65537 + draw(0, 9));
  }
  test_invalid(draw);
  return finish();
}
