// The kernels of attack_step against the definition in double: every ball, random sizes and alignments, tables of numbers
// for channels and columns, factors for rows, projection alone, invalid gradients, and the end of more than 2^31
// elements.
#include <algorithm>
#include <functional>

#include "attack_step.cuh"
#include "testing.h"

namespace {

using rk::Ball;
using rk::cuda::AttackStepCall;
using namespace testing;

template <class S>
struct Problem {
  using A = rk::cuda::accumulation_t<S>;
  Ball ball;
  std::int64_t rows, columns, channels, coordinates;
  bool ascends, scaled;
  Buffer<S> start, adversary, x, grad;
  Buffer<A> eps, step, scale;

  Problem(Draw& draw, Ball kind, std::int64_t r, std::int64_t inner)
      : ball(kind),
        rows(r),
        columns(3 * inner),
        channels(kind == Ball::kLinf ? draw.one_of({1, 3, 3 * static_cast<int>(inner)}) : 1),
        coordinates(draw(1, 5)),
        ascends(draw(0, 3) > 0),
        scaled(draw(0, 1)),
        start(rows * columns),
        adversary(rows * columns, draw(0, 8)),
        x(rows * columns, draw(0, 8)),
        grad(rows * columns, draw(0, 8)),
        eps(channels),
        step(1),
        scale(rows) {
    std::uniform_real_distribution<double> uniform(-0.2, 1.2);
    const auto pixel = [&] { return std::clamp(uniform(draw.random), 0.0, 1.0); };
    for (std::int64_t j = 0; j < rows * columns; ++j) {
      x[j] = from_double<S>(pixel());
      start[j] = from_double<S>(std::clamp(0.7 * to_double(x[j]) + 0.3 * pixel(), 0.0, 1.0));
    }
    grad.fill_normal(draw.random);
    const double size = std::sqrt(double(columns)) * draw.one_of({0.01, 0.1, 10.0});
    for (std::int64_t c = 0; c < channels; ++c)
      eps[c] = A(ball == Ball::kLinf ? 0.05 + 0.01 * double(c % 7) : ball == Ball::kL2 ? 0.2 * size : size);
    step[0] = A(draw.one_of({0.01, 0.5, 3.0}));
    for (std::int64_t i = 0; i < rows; ++i) scale[i] = A(0.25 * draw(0, 6));
  }

  AttackStepCall<S> call() {
    const auto count = static_cast<std::uint32_t>(channels);
    AttackStepCall<S> c{};
    c.rows = rows;
    c.columns = static_cast<std::uint32_t>(columns);
    c.adversary = adversary.data();
    c.x = x.data();
    c.grad = ascends ? grad.data() : nullptr;
    c.eps = {eps.data(), count, static_cast<std::uint32_t>(columns / channels)};
    c.step = {step.data(), 1, 1};
    c.scale = scaled ? scale.data() : nullptr;
    c.coordinates = coordinates;
    return c;
  }

  cudaError_t run() {
    std::copy_n(start.data(), start.size(), adversary.data());
    return rk::cuda::launch_attack_step(ball, call(), nullptr);
  }

  // The step of one row, before it is projected.
  std::vector<double> moved(std::int64_t row) const {
    std::vector<double> v(columns), size(columns);
    const double s = ascends ? double(step[0]) * (scaled ? double(scale[row]) : 1.0) : 0.0;
    double squares = 0.0;
    for (std::int64_t j = 0; j < columns; ++j) {
      const double a = to_double(start[row * columns + j]), g = to_double(grad[row * columns + j]);
      v[j] = a;
      squares += g * g;
      size[j] = (g > 0 ? a < 1.0 : a > 0.0) ? std::fabs(g) : 0.0;
    }
    std::vector<double> ordered = size;
    std::sort(ordered.begin(), ordered.end(), std::greater<double>());
    const double least = ordered[std::min(coordinates, columns) - 1];
    const auto chosen = std::count_if(size.begin(), size.end(), [&](double u) { return u >= least && u > 0.0; });
    for (std::int64_t j = 0; j < columns; ++j) {
      const double g = to_double(grad[row * columns + j]), sign = g > 0 ? 1.0 : g < 0 ? -1.0 : 0.0;
      if (ball == Ball::kLinf) v[j] += s * sign;
      if (ball == Ball::kL2 && squares > 0.0) v[j] += s * g / std::sqrt(squares);
      if (ball == Ball::kL1 && size[j] >= least && size[j] > 0.0) v[j] += s * sign / double(chosen);
    }
    return v;
  }

  std::vector<double> truth(std::int64_t row) const {
    std::vector<double> v = moved(row);
    const auto clean = [&](std::int64_t j) { return to_double(x[row * columns + j]); };
    const double radius = double(eps[0]);
    const auto length = [&](std::int64_t j, double t) {
      const double d = v[j] - clean(j);
      return std::min(std::max(std::fabs(d) - t, 0.0), d > 0.0 ? 1.0 - clean(j) : clean(j));
    };
    double squares = 0.0, low = 0.0, high = 10.0;
    for (std::int64_t j = 0; j < columns; ++j) squares += (v[j] - clean(j)) * (v[j] - clean(j));
    const auto total = [&](double t) {
      double sum = 0.0;
      for (std::int64_t j = 0; j < columns; ++j) sum += length(j, t);
      return sum;
    };
    if (total(0.0) <= radius) high = 0.0;
    for (int k = 0; k < 60 && high > 0.0; ++k) (total((low + high) / 2) > radius ? low : high) = (low + high) / 2;
    for (std::int64_t j = 0; j < columns; ++j) {
      const double d = v[j] - clean(j);
      if (ball == Ball::kLinf) {
        const double e = double(eps[channels == 1 ? 0 : j / (columns / channels)]);
        v[j] = std::clamp(v[j], clean(j) - e, clean(j) + e);
      } else if (ball == Ball::kL2) {
        if (squares > radius * radius) v[j] = clean(j) + d * radius / std::sqrt(squares);
      } else {
        v[j] = clean(j) + (d > 0.0 ? 1.0 : -1.0) * length(j, high);
      }
      v[j] = std::clamp(v[j], 0.0, 1.0);
    }
    return v;
  }

  void check() const {
    const double tolerance = 1e-5 + epsilon<S>();
    for (std::int64_t row = 0; row < rows; ++row) {
      const std::vector<double> want = truth(row);
      for (std::int64_t j = 0; j < columns; ++j)
        expect_close(to_double(adversary[row * columns + j]), want[j], tolerance, text());
    }
  }

  std::string text() const {
    return "a pixel of ball " + std::to_string(static_cast<int>(ball)) + ", " + shape_of<S>({rows, columns});
  }
};

template <class S>
void test_ball(const Options& options, Draw& draw, Ball ball, int rows, int inner) {
  Problem<S> t(draw, ball, rows, inner);
  run_in_all_orders(options, t.text(), [&] { return t.run(); }, t.adversary);
  t.check();
}

// Nothing of an invalid gradient reaches other pixels, and no pixel leaves the box.
void test_invalid(Draw& draw) {
  for (const Ball ball : {Ball::kLinf, Ball::kL2, Ball::kL1}) {
    Problem<float> t(draw, ball, 3, 5);
    t.ascends = true;
    t.grad[2] = NAN;
    t.grad[15 + 4] = INFINITY;
    std::fill_n(t.grad.data() + 30, 15, 0.0f);
    expect_success(t.run());
    for (std::size_t j = 0; j < t.adversary.size(); ++j) {
      const double v = t.adversary[j];
      expect_close(v, std::clamp(v, 0.0, 1.0), 0.0, t.text() + " with invalid gradients");
    }
  }
}

// The last of so many elements that their index passes 2^31; the others do not exist.
void test_huge() {
  constexpr std::int64_t rows = 1500000, columns = 2048;  // of one block each
  LastRowOnly<__half> adversary(rows, columns), x(rows, columns), grad(rows, columns);
  std::fill_n(x.last_row(), columns, from_double<__half>(0.5));
  std::fill_n(adversary.last_row(), columns, from_double<__half>(0.5));
  std::fill_n(grad.last_row(), columns, from_double<__half>(1.0));
  Buffer<float> number(1);
  number[0] = 0.25f;
  AttackStepCall<__half> c{};
  c.rows = rows;
  c.columns = columns;
  c.adversary = adversary.data();
  c.x = x.data();
  c.grad = grad.data();
  c.eps = c.step = {number.data(), 1, 1};
  c.coordinates = columns;
  for (const Ball ball : {Ball::kLinf, Ball::kL2, Ball::kL1}) {
    std::fill_n(adversary.last_row(), columns, from_double<__half>(0.5));
    const FirstBlock first(rows - 1);
    expect_success(rk::cuda::launch_attack_step(ball, c, nullptr));
    const double moved = ball == Ball::kLinf ? 0.25
                         : ball == Ball::kL2 ? 0.25 / std::sqrt(double(columns))
                                             : 0.25 / columns;
    expect_close(to_double(adversary.last_row()[columns - 1]), 0.5 + moved, 1e-3, "the last pixel");
  }
}

}  // namespace

int main(int argc, char** argv) {
  const Options options(argc, argv);
  Draw draw{std::mt19937(options.seed)};
  for (int round = 0; round < options.rounds; ++round)
    for (const Ball ball : {Ball::kLinf, Ball::kL2, Ball::kL1}) {
      test_ball<float>(options, draw, ball, draw(1, 4), draw(1, 200));
      test_ball<double>(options, draw, ball, draw(1, 3), draw(1, 100));
      test_ball<__half>(options, draw, ball, draw(1, 3), draw(1, 100));
      test_ball<__nv_bfloat16>(options, draw, ball, draw(1, 3), draw(1, 300));
    }
  test_invalid(draw);
  if (options.huge) test_huge();
  return finish();
}
