// The kernels of attack_start: inside the ball and the box, as random as they should be, and the same for a sample
// wherever it lies in a batch.
#include <algorithm>

#include "attack_start.cuh"
#include "testing.h"

namespace {

using rk::Ball;
using rk::cuda::AttackStartCall;
using namespace testing;

template <class S>
struct Problem {
  using A = rk::cuda::accumulation_t<S>;
  Ball ball;
  std::int64_t rows, columns;
  double radius;
  Buffer<S> adversary, x;
  Buffer<A> eps;
  Buffer<std::int64_t> seed, samples;

  Problem(Draw& draw, Ball kind, std::int64_t r, std::int64_t n, double size)
      : ball(kind),
        rows(r),
        columns(n),
        radius(size),
        adversary(rows * columns, draw(0, 8)),
        x(rows * columns, draw(0, 8)),
        eps(1),
        seed(1),
        samples(rows) {
    std::fill_n(x.data(), rows * columns, from_double<S>(0.5));
    eps[0] = A(radius);
    seed[0] = draw(0, 1 << 30);
    for (std::int64_t i = 0; i < rows; ++i) samples[i] = 3 * i;
  }

  cudaError_t run() {
    AttackStartCall<S> c{};
    c.rows = rows;
    c.columns = static_cast<std::uint32_t>(columns);
    c.adversary = adversary.data();
    c.x = x.data();
    c.eps = {eps.data(), 1, 1, columns};
    c.seed = seed.data();
    c.samples = samples.data();
    c.stream = 4;
    return rk::cuda::launch_attack_start(ball, c, nullptr);
  }

  double distance(std::int64_t row) const {
    double total = 0.0;
    for (std::int64_t j = row * columns; j < (row + 1) * columns; ++j) {
      const double d = std::fabs(to_double(adversary[j]) - to_double(x[j]));
      total = ball == Ball::kLinf ? std::max(total, d) : total + (ball == Ball::kL2 ? d * d : d);
    }
    return ball == Ball::kL2 ? std::sqrt(total) : total;
  }

  std::string text() const {
    return "a start of ball " + std::to_string(static_cast<int>(ball)) + ", " + shape_of<S>({rows, columns});
  }
};

template <class S>
void test_ball(const Options& options, Draw& draw, Ball ball, int rows, int columns) {
  Problem<S> t(draw, ball, rows, columns, 0.25);
  run_in_all_orders(options, t.text(), [&] { return t.run(); }, t.adversary);
  for (std::int64_t row = 0; row < rows; ++row) {
    const double d = t.distance(row);
    expect_close(d, std::clamp(d, 0.0, 0.25 + 1e-6), 0.0, t.text());
  }
  const Buffer<S>& whole = t.adversary;
  Problem<S> last(draw, ball, 1, columns, 0.25);
  last.seed[0] = t.seed[0];
  last.samples[0] = 3 * (rows - 1);
  expect_success(last.run());
  for (std::int64_t j = 0; j < columns; ++j)
    expect_close(to_double(last.adversary[j]), to_double(whole[(rows - 1) * columns + j]), 0.0, t.text() + " alone");
}

// (||u|| / eps)^N is uniform in (0, 1), and the sum of u's signs is not far from zero.
void test_law(Draw& draw, Ball ball) {
  constexpr int rows = 2000, columns = 5;
  Problem<double> t(draw, ball, rows, columns, 0.25);
  expect_success(t.run());
  double mean = 0.0, signs = 0.0;
  for (int row = 0; row < rows; ++row) mean += std::pow(t.distance(row) / 0.25, columns) / rows;
  for (int j = 0; j < rows * columns; ++j) signs += (t.adversary[j] > 0.5 ? 1.0 : -1.0) / (rows * columns);
  expect_close(mean, 0.5, 4 * std::sqrt(1.0 / 12 / rows), t.text() + ": mean radius");
  expect_close(signs, 0.0, 4 / std::sqrt(double(rows * columns)), t.text() + ": signs");
}

}  // namespace

int main(int argc, char** argv) {
  const Options options(argc, argv);
  Draw draw{std::mt19937(options.seed)};
  for (int round = 0; round < options.rounds; ++round)
    for (const Ball ball : {Ball::kLinf, Ball::kL2, Ball::kL1}) {
      test_ball<float>(options, draw, ball, draw(1, 4), draw(1, 700));
      test_ball<double>(options, draw, ball, draw(1, 3), draw(1, 300));
      test_ball<__half>(options, draw, ball, draw(1, 3), draw(1, 300));
      test_ball<__nv_bfloat16>(options, draw, ball, draw(1, 3), draw(1, 900));
    }
  if (options.rounds >= 10)
    for (const Ball ball : {Ball::kLinf, Ball::kL2, Ball::kL1}) test_law(draw, ball);
  return finish();
}
