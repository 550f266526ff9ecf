// The kernels of random_cotangents: Philox against its known answers, the laws bit by bit against the CPU's loops, frames
// that are orthonormal, the gradient against differences, random shapes, small grids, and rows beyond 2^31 elements.
#include "random_cotangents.cuh"

#include <algorithm>

#include "../cpu/random_cotangents_loops.h"
#include "random_frames.cuh"
#include "testing.h"

namespace {

using rk::Kind;
using rk::Law;
using rk::cuda::CotangentSums;
using rk::cuda::FrameCall;
using namespace testing;

constexpr std::int64_t kSeed = 0x0123456789abcdef;

void expect_word(std::uint32_t got, std::uint32_t want) { expect_close(got, want, 0, "word of Philox"); }

// From the authors' Random123: zeros, ones, and digits of pi.
void test_known_answers() {
  struct Answer {
    rk::RandomWords counter;
    std::uint64_t seed;
    rk::RandomWords words;
  };
  const Answer answers[] = {{{0, 0, 0, 0}, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
                            {{~0u, ~0u, ~0u, ~0u}, ~0ull, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
                            {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
                             0x299f31d0a4093822,
                             {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}};
  for (const Answer& a : answers) {
    const rk::RandomWords w = rk::philox(a.counter, rk::PhiloxKey(a.seed));
    expect_word(w.w0, a.words.w0);
    expect_word(w.w1, a.words.w1);
    expect_word(w.w2, a.words.w2);
    expect_word(w.w3, a.words.w3);
  }
}

// One call with all its workspaces.
template <class S>
struct Problem {
  using A = rk::cuda::accumulation_t<S>;
  Law law;
  Kind kind;
  std::int64_t K, B, C, P, D, seed = kSeed;
  Buffer<S> outputs, grad, w, grad_outputs;
  Buffer<A> frames, scale, mean, workspace;
  Buffer<double> root, d, m, b;

  Problem(Draw& draw, Law of, Kind what, std::int64_t k, std::int64_t batch, std::int64_t classes,
          std::int64_t positions)
      : law(of),
        kind(what),
        K(k),
        B(batch),
        C(classes),
        P(positions),
        D(C * P),
        outputs(B * D, draw(0, 8)),
        grad(K * B * D, draw(0, 8)),
        w(K * B * D, draw(0, 8)),
        grad_outputs(B * D, draw(0, 8)),
        frames(K * B * D),
        scale(K * B),
        mean(K * B * P),
        workspace(draw(0, 1) ? B * rk::cuda::FrameLayout(K, D).size : 0),
        root(B * D),
        d(K * B * P),
        m(K * B * P),
        b(K * B * P) {
    outputs.fill_normal(draw.random, 2.0);
    grad.fill_normal(draw.random);
  }

  std::string text(const char* what) const {
    return std::string(what) + " of law " + std::to_string(static_cast<int>(law)) + ", kind " +
           std::to_string(static_cast<int>(kind)) + ", " + shape_of<S>({K, B, C, P});
  }

  cudaError_t run(bool backward) {
    CotangentSums<S> c{};
    c.draws = {law, K, B, C, P, D, &seed, nullptr, nullptr};
    c.kind = kind;
    if (backward) c.grad = grad.data();
    if (law == Law::kSphere) {
      expect_success(rk::cuda::launch_sphere_scale(c.draws, scale.data(), nullptr));
      c.draws.scale = scale.data();
    }
    if (law == Law::kOrthonormal) {
      A* const memory = workspace.size() ? workspace.data() : nullptr;
      expect_success(
          rk::cuda::launch_random_frames(FrameCall<A>{K, B, D, &seed, memory, frames.data(), scale.data()}, nullptr));
      c.draws.frames = frames.data();
      c.draws.scale = scale.data();
    }
    if (kind == Kind::kFisher) {
      expect_success(rk::cuda::launch_roots(B, C, P, outputs.data(), root.data(), nullptr));
      c.root = root.data();
    }
    c.mean = mean.data();
    c.d = d.data();
    c.m = m.data();
    c.b = b.data();
    if (kind != Kind::kPlain) expect_success(rk::cuda::launch_cotangent_sums(c, nullptr));
    return backward ? rk::cuda::launch_cotangent_gradient(c, grad_outputs.data(), nullptr)
                    : rk::cuda::launch_cotangent_value(c, w.data(), nullptr);
  }

  // Plain v of a row, as the CPU draws it; not of the orthonormal law.
  std::vector<A> expected(std::int64_t k, std::int64_t sample) const {
    std::vector<A> v((D + 31) / 32 * 32);
    const rk::PhiloxKey key(static_cast<std::uint64_t>(seed));
    const auto number = static_cast<std::uint32_t>(sample);
    if (law == Law::kRademacher) {
      rk::cpu::draw_signs(key, number, k * ((D + 31) / 32), (D + 31) / 32, v.data());
      return v;
    }
    rk::cpu::draw_normals(key, number, k * ((D + 3) / 4), (D + 3) / 4, v.data());
    const A squares = rk::cpu::ordered_sum<A>(D, [&](std::int64_t e, A s) { return rk::fused(v[e], v[e], s); });
    const A by = law == Law::kSphere ? std::sqrt(A(D)) / std::sqrt(squares) : A(1);
    for (A& x : v) x *= by;
    return v;
  }

  void check_plain() const {
    for (std::int64_t row = 0; row < K * B; ++row) {
      if (law == Law::kOrthonormal) break;
      const std::vector<A> v = expected(row / B, row % B);
      for (std::int64_t e = 0; e < D; ++e)
        expect_close(to_double(w[row * D + e]), to_double(from_double<S>(to_double(v[e]))), 0, text("w"));
    }
    if (law != Law::kOrthonormal) return;
    for (std::int64_t sample = 0; sample < B; ++sample)
      for (std::int64_t k = 0; k < K; ++k)
        for (std::int64_t l = 0; l <= k; ++l) {
          double product = 0;
          for (std::int64_t e = 0; e < D; ++e)
            product += to_double(w[(k * B + sample) * D + e]) * to_double(w[(l * B + sample) * D + e]) / double(D);
          expect_close(product, k == l, 50 * epsilon<S>(), text("product of two frames' rows"));
        }
  }

  // The sum over classes is zero, whatever was drawn: of centred w, and of fisher w, since a constant in the outputs
  // changes no probability.
  void check_sums() const {
    for (std::int64_t row = 0; row < K * B; ++row)
      for (std::int64_t s = 0; s < P; ++s) {
        double sum = 0, size = 0;
        for (std::int64_t e = s; e < D; e += P) {
          sum += to_double(w[row * D + e]);
          size += std::fabs(to_double(w[row * D + e])) + 1;
        }
        expect_close(sum, 0, 30 * epsilon<S>() * size, text("sum over classes"));
      }
  }

  // The gradient's sum over classes is zero too, since a constant in the outputs changes nothing.
  void check_gradient() const {
    for (std::int64_t sample = 0; sample < B; ++sample)
      for (std::int64_t s = 0; s < P; ++s) {
        double sum = 0, size = 0;
        for (std::int64_t e = s; e < D; e += P) {
          sum += to_double(grad_outputs[sample * D + e]);
          size += std::fabs(to_double(grad_outputs[sample * D + e])) + K;
        }
        expect_close(sum, 0, 100 * epsilon<S>() * size, text("sum of the gradient over classes"));
      }
  }
};

template <class S>
void test_shape(const Options& options, Draw& draw, Law law, std::int64_t k, std::int64_t batch, std::int64_t classes,
                std::int64_t positions) {
  for (const Kind kind : {Kind::kPlain, Kind::kCentred, Kind::kFisher}) {
    Problem<S> t(draw, law, kind, std::min(k, law == Law::kOrthonormal ? classes * positions : k), batch, classes,
                 positions);
    run_in_all_orders(options, t.text("w"), [&] { return t.run(false); }, t.w);
    kind == Kind::kPlain ? t.check_plain() : t.check_sums();
    if (kind != Kind::kFisher) continue;
    run_in_all_orders(options, t.text("grad_outputs"), [&] { return t.run(true); }, t.grad_outputs);
    t.check_gradient();
  }
}

// Fewer blocks than samples: each makes several frames, one after another in the same memory.
void test_small_grid(Draw& draw) {
  Problem<float> t(draw, Law::kOrthonormal, Kind::kPlain, 5, 7, 9, 1), few(draw, t.law, t.kind, t.K, t.B, t.C, t.P);
  expect_success(t.run(false));
  const FrameCall<float> call{t.K, t.B, t.D, &few.seed, nullptr, few.frames.data(), few.scale.data()};
  expect_success(rk::cuda::launch(rk::cuda::random_frames_kernel<float>, dim3(2), dim3(64),
                                  rk::cuda::frame_shared<float>(t.K, t.D), nullptr, call));
  expect_close(few.frames.bytes() == t.frames.bytes(), true, 0, "frames by two blocks");
}

// The last row of so many that its index passes 2^31; the others do not exist.
void test_huge() {
  constexpr std::int64_t rows = 70000, classes = 40000;
  LastRowOnly<__half> w(rows, classes);
  std::int64_t seed = kSeed;
  CotangentSums<__half> c{};
  c.draws = {Law::kGaussian, 1, rows, classes, 1, classes, &seed, nullptr, nullptr};
  c.kind = Kind::kPlain;
  const std::int64_t blocks = rows * (classes / 4) / rk::cuda::kCotangentThreads;
  const FirstBlock first(blocks - 1);
  expect_success(rk::cuda::launch_cotangent_value(c, w.data(), nullptr));
  std::vector<float> v(classes);
  rk::cpu::draw_normals(rk::PhiloxKey(kSeed), rows - 1, 0, classes / 4, v.data());
  expect_close(to_double(w.last_row()[classes - 1]), to_double(from_double<__half>(v[classes - 1])), 0,
               "the last number");
}

}  // namespace

int main(int argc, char** argv) {
  const Options options(argc, argv);
  Draw draw{std::mt19937(options.seed)};
  test_known_answers();
  test_small_grid(draw);
  for (int round = 0; round < options.rounds; ++round) {
    const Law law = draw.one_of({Law::kSphere, Law::kGaussian, Law::kRademacher, Law::kOrthonormal});
    test_shape<float>(options, draw, law, draw(1, 7), draw(1, 4), draw(1, 150), 1);
    test_shape<float>(options, draw, law, draw(1, 5), draw(1, 3), draw(1, 9), draw(2, 20));
    test_shape<__half>(options, draw, law, draw(1, 4), draw(1, 3), draw(1, 60), draw(1, 2));
    test_shape<__nv_bfloat16>(options, draw, law, draw(1, 4), draw(1, 3), draw(1, 60), draw(1, 2));
    test_shape<double>(options, draw, Law::kOrthonormal, draw(1, 20), draw(1, 3), draw(1, 20), 1);
  }
  if (options.huge) test_huge();
  return finish();
}
