// attack_start on the CPU.  Formulas: math/attack_start.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <optional>

#include "../arguments/attack.h"
#include "../math/attack_start.h"
#include "attack_rows.h"

namespace rk::cpu {
namespace {

// Uniform numbers in [-1, 1], normal ones, or ones with the density of Laplace, as the ball needs them.
template <Ball kBall, class A>
RK_MULTIVERSION void draw(PhiloxKey key, uint32_t first, int64_t sample, uint32_t stream, A* u, int64_t blocks) {
  const auto number = [](uint32_t word)
                          RK_INLINE_LAMBDA { return kBall == Ball::kLinf ? symmetric<A>(word) : laplace<A>(word); };
  for (int64_t b = 0; b < blocks; ++b) {
    const RandomWords w = start_words(key, first + uint32_t(b), sample, stream);
    if constexpr (kBall == Ball::kL2) {
      const NormalPair<A> p = box_muller<A>(w.w0, w.w1), q = box_muller<A>(w.w2, w.w3);
      u[4 * b] = p.first, u[4 * b + 1] = p.second, u[4 * b + 2] = q.first, u[4 * b + 3] = q.second;
    } else {
      u[4 * b] = number(w.w0), u[4 * b + 1] = number(w.w1), u[4 * b + 2] = number(w.w2), u[4 * b + 3] = number(w.w3);
    }
  }
}

template <class A>
RK_MULTIVERSION double squares(const A* u, int64_t n) {
  return sum_over<double>(n, [=](int64_t j) RK_INLINE_LAMBDA { return double(u[j]) * double(u[j]); });
}

template <class A>
RK_MULTIVERSION double sizes(const A* u, int64_t n) {
  return sum_over<double>(n, [=](int64_t j) RK_INLINE_LAMBDA { return double(absolute(u[j])); });
}

template <class A>
RK_MULTIVERSION void offset_uniform(const A* x, const A* u, const A* eps, A* out, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    const Interval<A> to = linf_interval(x[j], eps[j]);
    out[j] = clamp(fused(eps[j], u[j], x[j]), to.low, to.high);
  }
}

template <class A>
RK_MULTIVERSION void offset(const A* x, const A* u, A scale, A* out, int64_t n) {
  for (int64_t j = 0; j < n; ++j) out[j] = clamp(x[j] + scale * u[j], A(0), A(1));
}

struct Start {
  Ball ball;
  PhiloxKey key;
  const int64_t* samples;  // [B] or none: 0, 1, ...
  uint32_t stream;
  int64_t columns;
};

template <class A>
void run_row(const Start& c, int64_t row, const Input& x, const AttackOutput<A>& out, const Columns<A>& eps,
             AttackBuffers<A>& b, std::vector<A>& drawn) {
  const int64_t sample = c.samples ? c.samples[row] : row;
  const int64_t blocks = (c.columns + 3) / 4;
  A scale = A(0);
  if (c.ball != Ball::kLinf) {
    drawn.resize(4 * blocks);
    c.ball == Ball::kL2 ? draw<Ball::kL2>(c.key, 0, sample, c.stream, drawn.data(), blocks)
                        : draw<Ball::kL1>(c.key, 0, sample, c.stream, drawn.data(), blocks);
    const double length =
        c.ball == Ball::kL2 ? std::sqrt(squares(drawn.data(), c.columns)) : sizes(drawn.data(), c.columns);
    scale = start_scale(start_words(c.key, 0, sample, c.stream + 1).w0, *eps.at(0), length, c.columns);
  }
  for_pieces(c.columns, [&](int64_t begin, int64_t n) {
    const int64_t at = row * c.columns + begin;
    const A* const clean = x.read(at, n, b.x);
    A* const to = out.open(at, b);
    if (c.ball == Ball::kLinf) {
      A* const u = b.adversary.element;
      draw<Ball::kLinf>(c.key, static_cast<uint32_t>(begin / 4), sample, c.stream, u, (n + 3) / 4);
      offset_uniform(clean, u, eps.at(begin), to, n);
      if (out.narrow()) linf_intervals(clean, eps.at(begin), b.low.element, b.high.element, n);
    } else {
      offset(clean, drawn.data() + begin, scale, to, n);
      if (out.narrow()) intervals(to, clean, b.low.element, b.high.element, n);
    }
    out.close(at, n, b);
  });
}

template <class A>
void run(const Start& c, const Tensor& adversary, const Tensor& x, const Tensor& eps_table, int64_t inner) {
  const Input clean(x);
  const AttackOutput<A> out(adversary);
  const Columns<A> eps(eps_table, inner, c.columns);
  torch::stable::parallel_for(0, adversary.size(0), rows_per_thread(4 * c.columns), [&](int64_t first, int64_t last) {
    AttackBuffers<A> buffers;
    std::vector<A> drawn;
    for (int64_t row = first; row < last; ++row) run_row(c, row, clean, out, eps, buffers, drawn);
  });
}

void attack_start(Tensor adversary, Tensor x, Tensor eps, Tensor seed, std::optional<Tensor> samples, int64_t inner,
                  int64_t norm, int64_t restart) {
  const Ball ball = check_attack_start("attack_start", adversary, x, eps, seed, samples, inner, norm, restart);
  if (adversary.numel() == 0) return;
  const Tensor clean = torch::stable::contiguous(x);
  if (samples) samples = torch::stable::contiguous(*samples);
  const Start call{ball, PhiloxKey(static_cast<uint64_t>(*pointer<int64_t>(seed))), pointer<int64_t>(samples),
                   static_cast<uint32_t>(2 * restart), adversary.size(1)};
  visit_accumulation(adversary.scalar_type(), [&]<class A>(A) { run<A>(call, adversary, clean, eps, inner); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, CPU, m) { m.impl("attack_start", TORCH_BOX(&attack_start)); }

}  // namespace rk::cpu
