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
  rk::cuda::AttackWorkspace<S> space;
  Buffer<S> start, adversary, x, grad;
  Buffer<A> eps, step, scale, partial, steps;
  Buffer<std::uint64_t> queue;

  Problem(Draw& draw, Ball kind, std::int64_t r, std::int64_t inner, int most_offset = 8)
      : ball(kind),
        rows(r),
        columns(3 * inner),
        channels(kind == Ball::kLinf ? draw.one_of({1, 3, 3 * static_cast<int>(inner)}) : 1),
        coordinates(draw(1, 5)),
        ascends(draw(0, 3) > 0),
        scaled(draw(0, 1)),
        space(kind, rows, columns),
        start(rows * columns),
        adversary(rows * columns, draw(0, most_offset)),
        x(rows * columns, draw(0, most_offset)),
        grad(rows * columns, draw(0, most_offset)),
        eps(channels),
        step(1),
        scale(rows),
        partial(space.partial),
        steps(space.steps),
        queue((space.queue + 1) / 2) {
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
    AttackStepCall<S> c{};
    c.rows = rows;
    c.columns = static_cast<std::uint32_t>(columns);
    c.adversary = adversary.data();
    c.x = x.data();
    c.grad = ascends ? grad.data() : nullptr;
    c.eps = {eps.data(), channels, columns / channels, columns};
    c.step = {step.data(), 1, 1, columns};
    c.scale = scaled ? scale.data() : nullptr;
    c.coordinates = coordinates;
    c.queue = reinterpret_cast<std::uint32_t*>(queue.data());
    c.partial = partial.data();
    c.steps = reinterpret_cast<rk::L2Step<A>*>(steps.data());
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

// Rows that no block holds, of whole vectors or not, aligned or not.
template <class S>
void test_long_rows(const Options& options, Draw& draw) {
  for (const Ball ball : {Ball::kL2, Ball::kL1}) {
    const int held = static_cast<int>(rk::cuda::AttackTile<S>::kVectors * 512 * rk::cuda::Words<S>::kSize);
    Problem<S> aligned(draw, ball, 3, (held + 512) / 3 / 16 * 16, 0);
    run_in_all_orders(options, aligned.text(), [&] { return aligned.run(); }, aligned.adversary);
    aligned.check();
    Problem<S> any(draw, ball, 2, held / 3 + draw(1, 400));
    any.coordinates = draw.one_of({1, 40, 2000, 100000});
    run_in_all_orders(options, any.text(), [&] { return any.run(); }, any.adversary);
    any.check();
  }
}

// Bits do not depend on where tensors lie.
template <class S>
void test_alignment(Draw& draw) {
  for (const int inner : {64, 2048 / static_cast<int>(sizeof(S)) * 3})
    for (const Ball ball : {Ball::kLinf, Ball::kL2, Ball::kL1}) {
      Problem<S> t(draw, ball, 2, ball == Ball::kLinf ? 64 : inner, 0);
      expect_success(t.run());
      Buffer<S> adversary(t.start.size(), 1), x(t.start.size(), 1);
      std::copy_n(t.start.data(), t.start.size(), adversary.data());
      std::copy_n(t.x.data(), t.x.size(), x.data());
      auto c = t.call();
      c.adversary = adversary.data();
      c.x = x.data();
      expect_success(rk::cuda::launch_attack_step(ball, c, nullptr));
      for (std::size_t j = 0; j < t.start.size(); ++j)
        expect_close(to_double(adversary[j]), to_double(t.adversary[j]), 0.0, t.text() + " one element further");
    }
}

// Gradients whose squares leave the range of their type.
template <class S>
void test_sizes_of_gradients(Draw& draw) {
  for (const int inner : {100, 1400})
    for (const double size : {1e-36, 1e-25, 1e25, 1e37}) {
      Problem<S> t(draw, Ball::kL2, 2, inner);
      t.ascends = true;
      for (std::size_t j = 0; j < t.grad.size(); ++j) t.grad[j] = S(double(t.grad[j]) * size);
      expect_success(t.run());
      t.check();
    }
}

// Ties, zeros, walls: whatever the choice of coordinates in l1 meets.
void test_choices(Draw& draw) {
  for (int kind = 0; kind < 5; ++kind)
    for (const int inner : {7, 2000}) {
      Problem<float> t(draw, Ball::kL1, 2, inner);
      t.ascends = true;
      t.coordinates = draw.one_of({1, 5, 50, 100000});
      for (std::size_t j = 0; j < t.grad.size(); ++j) {
        if (kind == 0) t.grad[j] = j % 3 ? 1.0f : -1.0f;                    // all alike
        if (kind == 1) t.grad[j] = 0.0f;                                    // nowhere to go
        if (kind == 2) t.grad[j] = std::ldexp(t.grad[j], draw(-120, 100));  // of all magnitudes
        if (kind == 3) t.grad[j] = j % 5 ? 0.0f : t.grad[j];                // few
        if (kind == 4) t.start[j] = t.grad[j] > 0.0f ? 1.0f : 0.0f;         // all at their walls
      }
      expect_success(t.run());
      t.check();
    }
}

// The order of the queue: every chunk twice, a row's sums before its total, that before its second pass.
void test_queue(Draw& draw) {
  using namespace rk::cuda;
  for (const std::int64_t rows : {1, 5, 7})
    for (const std::int64_t group : {1, 3, 7}) {
      const RowQueue q(rows, 4, group, nullptr);
      std::vector<int> sums(rows, 0), totals(rows, 0), writes(rows, 0);
      for (std::uint32_t ticket = 0; ticket < q.items(); ++ticket) {
        const QueueItem item(q, ticket);
        ++(item.work == QueueWork::kSums ? sums : item.work == QueueWork::kTotal ? totals : writes)[item.row];
        if (item.work != QueueWork::kSums) expect_close(sums[item.row], 4, 0.0, "sums that a total finds");
        if (item.work == QueueWork::kSecondPass)
          expect_close(totals[item.row], 1, 0.0, "a second pass finds its total");
      }
      for (std::int64_t row = 0; row < rows; ++row) expect_close(sums[row] + writes[row], 8, 0.0, "chunks of a row");
    }
  Problem<float> t(draw, Ball::kL2, 5, 3000);
  t.ascends = true;
  std::copy_n(t.start.data(), t.start.size(), t.adversary.data());
  auto c = t.call();
  c.aligned = false;
  const RowQueue narrow(t.rows, 3, 2, c.queue);
  expect_success(clear_queue(c.queue, t.rows, nullptr));
  expect_success(
      launch(attack_step_l2_queue_kernel<float>, dim3(3), dim3(kQueuedThreads<float>), 0, nullptr, c, narrow));
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
  c.eps = c.step = {number.data(), 1, 1, columns};
  c.coordinates = columns;
  for (const Ball ball : {Ball::kLinf, Ball::kL2, Ball::kL1}) {
    std::fill_n(adversary.last_row(), columns, from_double<__half>(0.5));
    const rk::cuda::Slabs slabs(rows, columns);
    const std::int64_t blocks = slabs.most_elements() / columns;  // of a slab: one a row
    const FirstBlock first(ball == Ball::kLinf ? (slabs.count() - 1) * blocks + (rows - 1) % blocks : rows - 1);
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
  test_long_rows<float>(options, draw);
  if (options.rounds > 3) {  // ThreadSanitizer takes its time for every block
    test_long_rows<__nv_bfloat16>(options, draw);
    test_long_rows<double>(options, draw);
    test_alignment<float>(draw);
    test_alignment<__half>(draw);
    test_sizes_of_gradients<float>(draw);
    test_sizes_of_gradients<double>(draw);
  }
  test_choices(draw);
  test_queue(draw);
  if (options.huge) test_huge();
  return finish();
}
