// The kernels of attention's second derivative against plain loops in double: head sizes, causal and additive masks,
// grouped queries, absent cotangents, results that are not needed, layouts, alignments, rows that attend to nothing, and
// a row's mean of T that is large.
#include "attention.cuh"

#include <algorithm>
#include <array>

#include "attention_testing.h"

namespace {

using rk::cuda::AttentionCall;
using rk::cuda::Heads;
using rk::cuda::Matrix;
using rk::cuda::RowMoments;
using namespace testing;

enum class Mask { kNone, kOfScores, kOfKeys, kOfRows };

// One tensor's entries in double, row after row.
struct Exact {
  int size;
  std::vector<double> value;

  Exact(const Shape& s, std::int64_t heads, std::int64_t rows, int columns)
      : size(columns), value(s.batch * heads * rows * columns) {}
};

template <class S>
struct Problem {
  using A = rk::cuda::accumulation_t<S>;
  Shape s;
  Mask masked;
  bool causal;
  double scale;
  bool has_a = true, has_b = true, has_c = true;
  Tensor<S> a, b, c, grad, q, k, v, out, gg_grad, grad_q, grad_k, grad_v;
  Buffer<A> mask, logsumexp;
  Buffer<RowMoments<S>> moments;

  Problem(Draw& draw, const Shape& shape, Mask mask_kind, bool is_causal, int most_offset)
      : s(shape),
        masked(mask_kind),
        causal(is_causal),
        scale(draw.one_of({0.1, 0.25, 0.5})),
        a(draw, s.batch, s.heads, s.queries, s.key_size, most_offset),
        b(draw, s.batch, s.key_heads, s.keys, s.key_size, most_offset),
        c(draw, s.batch, s.key_heads, s.keys, s.value_size, most_offset),
        grad(draw, s.batch, s.heads, s.queries, s.value_size, most_offset),
        q(draw, s.batch, s.heads, s.queries, s.key_size, most_offset),
        k(draw, s.batch, s.key_heads, s.keys, s.key_size, most_offset),
        v(draw, s.batch, s.key_heads, s.keys, s.value_size, most_offset),
        out(draw, s.batch, s.heads, s.queries, s.value_size, most_offset),
        gg_grad(draw, s.batch, s.heads, s.queries, s.value_size, most_offset),
        grad_q(draw, s.batch, s.heads, s.queries, s.key_size, most_offset),
        grad_k(draw, s.batch, s.key_heads, s.keys, s.key_size, most_offset),
        grad_v(draw, s.batch, s.key_heads, s.keys, s.value_size, most_offset),
        mask(s.batch * s.heads * s.queries * s.keys),
        logsumexp(s.batch * s.heads * s.queries),
        moments(s.batch * s.heads * s.queries) {
    for (auto* t : {&a, &b, &c, &grad, &q, &k, &v}) t->data.fill_normal(draw.random);
    mask.fill_normal(draw.random);
    if (masked == Mask::kOfRows)
      for (std::int64_t i = 0; i < s.queries; i += 3) mask[i] = -INFINITY;
    if (masked == Mask::kOfKeys)
      for (std::int64_t j = 1; j < s.keys; j += 2) mask[j] = -INFINITY;
  }

  // Strides of the mask: batch, head, query, key.
  std::array<std::int64_t, 4> mask_strides() const {
    switch (masked) {
      case Mask::kOfScores: return {std::int64_t{s.heads} * s.queries * s.keys, s.queries * s.keys, s.keys, 1};
      case Mask::kOfKeys: return {0, 0, 0, 1};
      default: return {0, 0, 1, 0};
    }
  }

  AttentionCall<S> call(const std::string& need) {
    AttentionCall<S> x{};
    x.batch = s.batch;
    x.heads = s.heads;
    x.key_heads = s.key_heads;
    x.queries = s.queries;
    x.keys = s.keys;
    if (has_a) x.a = a.template view<const S>();
    if (has_b) x.b = b.template view<const S>();
    if (has_c) x.c = c.template view<const S>();
    x.grad = grad.template view<const S>();
    x.q = q.template view<const S>();
    x.k = k.template view<const S>();
    x.v = v.template view<const S>();
    x.out = out.template view<const S>();
    const auto needed = [&](char letter) { return need.find(letter) != std::string::npos; };
    if (needed('g')) x.gg_grad = gg_grad.template view<S>();
    if (needed('q')) x.grad_q = grad_q.template view<S>();
    if (needed('k')) x.grad_k = grad_k.template view<S>();
    if (needed('v')) x.grad_v = grad_v.template view<S>();
    if (masked != Mask::kNone) {
      const auto [batch, head, row, column] = mask_strides();
      x.mask = {{mask.data(), static_cast<int>(row), s.queries, s.keys}, batch, head};
      x.mask_column = column;
    }
    x.logsumexp = logsumexp.data();
    x.moments = moments.data();
    x.causal = causal;
    x.aligned = true;
    for (const auto* t : {&a, &b, &c, &grad, &q, &k, &v, &out, &gg_grad, &grad_q, &grad_k, &grad_v})
      x.aligned = x.aligned && t->aligned();
    x.scale = static_cast<A>(scale);
    return x;
  }

  // The forward, unless `given`, and the second derivative.
  cudaError_t run(const std::string& need) {
    const auto x = call(need);
    const cudaError_t status = rk::cuda::launch_attention_forward(x, logsumexp.data(), out.template view<S>(), nullptr);
    return status == cudaSuccess ? rk::cuda::launch_attention_double_backward(x, nullptr) : status;
  }

  std::string text() const {
    return shape_of<S>({s.batch, s.heads, s.key_heads, s.queries, s.keys, s.key_size, s.value_size}) +
           (causal ? ", causal" : "") + ", mask " + std::to_string(static_cast<int>(masked));
  }

  void check(const std::string& need) const {
    Exact want_g(s, s.heads, s.queries, s.value_size), want_q(s, s.heads, s.queries, s.key_size),
        want_k(s, s.key_heads, s.keys, s.key_size), want_v(s, s.key_heads, s.keys, s.value_size);
    const int group = static_cast<int>(s.heads / s.key_heads);
    std::vector<double> p(s.keys), t(s.keys), dp(s.keys), x(s.keys);
    const auto dot = [](const Tensor<S>& one, const Tensor<S>& two, std::int64_t b_, std::int64_t h, std::int64_t i,
                        std::int64_t g, std::int64_t j) {
      double sum = 0.0;
      for (int d = 0; d < one.size; ++d) sum += one.at(b_, h, i, d) * two.at(b_, g, j, d);
      return sum;
    };
    for (std::int64_t n = 0; n < s.batch; ++n)
      for (std::int64_t h = 0; h < s.heads; ++h)
        for (std::int64_t i = 0; i < s.queries; ++i) {
          const std::int64_t g = h / group;
          double most = -INFINITY, total = 0.0;
          for (std::int64_t j = 0; j < s.keys; ++j) {
            p[j] = scale * dot(q, k, n, h, i, g, j);
            if (masked != Mask::kNone) {
              const auto at = mask_strides();
              p[j] += to_double(mask[n * at[0] + h * at[1] + i * at[2] + j * at[3]]);
            }
            if (causal && j > i) p[j] = -INFINITY;
            most = std::max(most, p[j]);
          }
          for (double& e : p) total += e = most == -INFINITY ? 0.0 : std::exp(e - most);
          double t_mean = 0.0, d_mean = 0.0, g_mean = 0.0;
          for (std::int64_t j = 0; j < s.keys; ++j) {
            p[j] /= total == 0.0 ? 1.0 : total;
            t[j] = scale * ((has_a ? dot(a, k, n, h, i, g, j) : 0.0) + (has_b ? dot(q, b, n, h, i, g, j) : 0.0));
            dp[j] = dot(grad, v, n, h, i, g, j);
            x[j] = has_c ? dot(grad, c, n, h, i, g, j) : 0.0;
            t_mean += p[j] * t[j];
            d_mean += p[j] * dp[j];
          }
          for (std::int64_t j = 0; j < s.keys; ++j) {
            t[j] -= t_mean;
            dp[j] -= d_mean;
            x[j] += dp[j] * t[j];
            g_mean += p[j] * x[j];
          }
          const std::int64_t row = (n * s.heads + h) * s.queries + i;
          for (std::int64_t j = 0; j < s.keys; ++j) {
            const std::int64_t column = (n * s.key_heads + g) * s.keys + j;
            const double w = p[j] * (x[j] - g_mean), ds = p[j] * dp[j], pd = p[j] * t[j];
            for (int d = 0; d < s.value_size; ++d) {
              want_g.value[row * s.value_size + d] += pd * v.at(n, g, j, d) + (has_c ? p[j] * c.at(n, g, j, d) : 0.0);
              want_v.value[column * s.value_size + d] += pd * grad.at(n, h, i, d);
            }
            for (int d = 0; d < s.key_size; ++d) {
              want_q.value[row * s.key_size + d] +=
                  scale * (w * k.at(n, g, j, d) + (has_b ? ds * b.at(n, g, j, d) : 0.0));
              want_k.value[column * s.key_size + d] +=
                  scale * (w * q.at(n, h, i, d) + (has_a ? ds * a.at(n, h, i, d) : 0.0));
            }
          }
        }
    for (const char letter : need) {
      const auto& [got, want] = letter == 'g'   ? std::tie(gg_grad, want_g)
                                : letter == 'q' ? std::tie(grad_q, want_q)
                                : letter == 'k' ? std::tie(grad_k, want_k)
                                                : std::tie(grad_v, want_v);
      compare(got, want, letter);
    }
  }

  void compare(const Tensor<S>& got, const Exact& want, char letter) const {
    double size = 0.0;
    for (const double e : want.value) size = std::max(size, std::fabs(e));
    const double tolerance = (sizeof(S) == 2 ? 8 : 100) * epsilon<S>() * (size + 1e-3);
    for (std::int64_t n = 0, at = 0; n < s.batch; ++n)
      for (std::int64_t h = 0; h < got.heads; ++h)
        for (std::int64_t i = 0; i < got.rows; ++i)
          for (int d = 0; d < got.size; ++d, ++at)
            expect_close(got.at(n, h, i, d), want.value[at], tolerance,
                         std::string(1, letter) + "'s gradient " + std::to_string(at) + " of " + text());
  }
};

template <class S>
void test_shape(const Options& options, Draw& draw, const Shape& shape, int most_offset = 8) {
  const Mask mask = draw.one_of({Mask::kNone, Mask::kNone, Mask::kOfScores, Mask::kOfKeys, Mask::kOfRows});
  Problem<S> t(draw, shape, mask, draw(0, 1), most_offset);
  const std::string need = draw.one_of({"gqkv", "gqkv", "gqkv", "g", "q", "k", "v", "qk"});
  if (draw(0, 2) == 0) {
    t.has_a = draw(0, 1);
    t.has_b = draw(0, 1);
    t.has_c = need == "v" ? draw(0, 1) : true;
  }
  if (need == "v" && !t.has_a && !t.has_b) t.has_a = true;
  run_in_all_orders(
      options, t.text(), [&] { return t.run(need); }, t.gg_grad.data, t.grad_q.data, t.grad_k.data, t.grad_v.data);
  t.check(need);
}

// No bit depends on where the tensors lie.
template <class S>
void test_alignment(Draw& draw, const Shape& shape) {
  Problem<S> t(draw, shape, Mask::kNone, true, 0);
  expect_success(t.run("gqkv"));
  const auto first =
      std::make_tuple(t.gg_grad.data.bytes(), t.grad_q.data.bytes(), t.grad_k.data.bytes(), t.grad_v.data.bytes());
  auto x = t.call("gqkv");
  expect_close(x.aligned, true, 0, "aligned");
  x.aligned = false;
  for (auto* m : {&t.gg_grad, &t.grad_q, &t.grad_k, &t.grad_v}) m->data.fill_with_nan();
  expect_success(rk::cuda::launch_attention_double_backward(x, nullptr));
  const auto second =
      std::make_tuple(t.gg_grad.data.bytes(), t.grad_q.data.bytes(), t.grad_k.data.bytes(), t.grad_v.data.bytes());
  expect_close(first == second, 1, 0, t.text() + ", elsewhere");
}

// What all keys have in common moves T and dP of a row by as much, and changes nothing.
template <class S>
void test_common_part(Draw& draw, const Shape& shape) {
  Problem<S> t(draw, shape, Mask::kNone, false, 0);
  for (auto* m : {&t.b, &t.v})
    for (std::size_t i = 0; i < m->data.size(); ++i) m->data[i] = from_double<S>(to_double(m->data[i]) + 8.0);
  expect_success(t.run("gqkv"));
  t.check("gqkv");
}

}  // namespace

int main(int argc, char** argv) {
  const Options options(argc, argv);
  Draw draw{std::mt19937(options.seed)};
  for_shapes(options, draw,
             [&](auto number, const Shape& shape) { test_shape<decltype(number)>(options, draw, shape); });
  if (options.rounds > 3) {
    test_alignment<__half>(draw, {1, 2, 1, 40, 50, 64, 32});
    test_alignment<float>(draw, {1, 1, 1, 40, 50, 64, 32});
    test_common_part<__nv_bfloat16>(draw, {1, 1, 1, 70, 70, 32, 32});
    test_common_part<float>(draw, {1, 1, 1, 70, 70, 32, 32});
  }
  return finish();
}
