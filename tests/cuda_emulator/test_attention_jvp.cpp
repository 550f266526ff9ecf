// The kernel of attention's forward mode against plain loops in double: head sizes, causal and additive masks and their
// tangents, grouped queries, absent tangents, layouts, alignments, rows that attend to nothing, scores that rise from key
// to key, and a mean of T that is large.
#include "attention_jvp.cuh"

#include <algorithm>
#include <array>

#include "attention_testing.h"

namespace {

using rk::cuda::AttentionJvpCall;
using rk::cuda::Heads;
using namespace testing;

// What is added to scores, or to their tangents: entries of all scores, one a key, or one a query.
enum class Kind { kNone, kOfScores, kOfKeys, kOfRows };

template <class A>
struct Mask {
  Kind kind;
  std::array<std::int64_t, 4> stride{};  // batch, head, query, key
  Buffer<A> data;

  Mask(Draw& draw, const Shape& s, Kind which) : kind(which), data(s.batch * s.heads * s.queries * s.keys) {
    const std::int64_t head = s.queries * s.keys;
    if (kind == Kind::kOfScores) stride = {s.heads * head, head, s.keys, 1};
    if (kind == Kind::kOfKeys) stride[3] = 1;
    if (kind == Kind::kOfRows) stride[2] = 1;
    data.fill_normal(draw.random);
  }
  double at(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) const {
    return kind == Kind::kNone ? 0.0 : to_double(data[b * stride[0] + h * stride[1] + i * stride[2] + j * stride[3]]);
  }
  Heads<const A> view() const {
    if (kind == Kind::kNone) return {};
    return {{data.data(), static_cast<int>(stride[2]), 0, 0}, stride[0], stride[1]};
  }
};

template <class S>
struct Problem {
  using A = rk::cuda::accumulation_t<S>;
  Shape s;
  bool causal, q_moves = true, k_moves = true, v_moves = true;
  double scale;
  Tensor<S> q, k, v, q_tangent, k_tangent, v_tangent, out, tangent;
  Mask<A> mask, mask_tangent;
  Buffer<A> logsumexp;

  Problem(Draw& draw, const Shape& shape, Kind mask_kind, Kind mask_tangent_kind, bool is_causal, int most_offset)
      : s(shape),
        causal(is_causal),
        scale(draw.one_of({0.1, 0.25, -0.3})),
        q(draw, s.batch, s.heads, s.queries, s.key_size, most_offset),
        k(draw, s.batch, s.key_heads, s.keys, s.key_size, most_offset),
        v(draw, s.batch, s.key_heads, s.keys, s.value_size, most_offset),
        q_tangent(draw, s.batch, s.heads, s.queries, s.key_size, most_offset),
        k_tangent(draw, s.batch, s.key_heads, s.keys, s.key_size, most_offset),
        v_tangent(draw, s.batch, s.key_heads, s.keys, s.value_size, most_offset),
        out(draw, s.batch, s.heads, s.queries, s.value_size, most_offset),
        tangent(draw, s.batch, s.heads, s.queries, s.value_size, most_offset),
        mask(draw, s, mask_kind),
        mask_tangent(draw, s, mask_tangent_kind),
        logsumexp(s.batch * s.heads * s.queries) {
    for (auto* t : {&q, &k, &v, &q_tangent, &k_tangent, &v_tangent}) t->data.fill_normal(draw.random);
    if (mask_kind == Kind::kOfRows)
      for (std::int64_t i = 0; i < s.queries; i += 3) mask.data[i] = -INFINITY;
    if (mask_kind == Kind::kOfKeys)
      for (std::int64_t j = 0; j < s.keys; j += 2) mask.data[j] = -INFINITY;
  }

  AttentionJvpCall<S> call() {
    AttentionJvpCall<S> x{};
    x.batch = s.batch;
    x.heads = s.heads;
    x.key_heads = s.key_heads;
    x.queries = s.queries;
    x.keys = s.keys;
    x.q = q.template view<const S>();
    x.k = k.template view<const S>();
    x.v = v.template view<const S>();
    if (q_moves) x.q_tangent = q_tangent.template view<const S>();
    if (k_moves) x.k_tangent = k_tangent.template view<const S>();
    if (v_moves) x.v_tangent = v_tangent.template view<const S>();
    x.mask = mask.view();
    x.mask_column = mask.stride[3];
    x.mask_tangent = mask_tangent.view();
    x.mask_tangent_column = mask_tangent.stride[3];
    x.out = out.template view<S>();
    x.tangent = tangent.template view<S>();
    x.logsumexp = logsumexp.data();
    x.causal = causal;
    x.aligned = true;
    for (const auto* t : {&q, &k, &v, &q_tangent, &k_tangent, &v_tangent, &out, &tangent})
      x.aligned = x.aligned && t->aligned();
    x.scale = static_cast<A>(scale);
    return x;
  }

  std::string text() const {
    return shape_of<S>({s.batch, s.heads, s.key_heads, s.queries, s.keys, s.key_size, s.value_size}) +
           (causal ? ", causal" : "") + ", masks " + std::to_string(static_cast<int>(mask.kind)) +
           std::to_string(static_cast<int>(mask_tangent.kind));
  }

  void check() const {
    std::vector<double> p(s.keys), t(s.keys), value(s.value_size), moved(s.value_size);
    const auto dot = [](const Tensor<S>& one, const Tensor<S>& two, std::int64_t b, std::int64_t h, std::int64_t i,
                        std::int64_t g, std::int64_t j) {
      double sum = 0.0;
      for (int d = 0; d < one.size; ++d) sum += one.at(b, h, i, d) * two.at(b, g, j, d);
      return sum;
    };
    for (std::int64_t b = 0; b < s.batch; ++b)
      for (std::int64_t h = 0; h < s.heads; ++h)
        for (std::int64_t i = 0; i < s.queries; ++i) {
          const std::int64_t g = h / (s.heads / s.key_heads);
          double most = -INFINITY, total = 0.0, mean = 0.0;
          for (std::int64_t j = 0; j < s.keys; ++j) {
            p[j] = scale * dot(q, k, b, h, i, g, j) + mask.at(b, h, i, j);
            if (causal && j > i) p[j] = -INFINITY;
            t[j] = scale * ((q_moves ? dot(q_tangent, k, b, h, i, g, j) : 0.0) +
                            (k_moves ? dot(q, k_tangent, b, h, i, g, j) : 0.0)) +
                   mask_tangent.at(b, h, i, j);
            most = std::max(most, p[j]);
          }
          for (double& e : p) total += e = most == -INFINITY ? 0.0 : std::exp(e - most);
          for (std::int64_t j = 0; j < s.keys; ++j) mean += (p[j] /= total == 0.0 ? 1.0 : total) * t[j];
          std::fill(value.begin(), value.end(), 0.0);
          std::fill(moved.begin(), moved.end(), 0.0);
          double size = 1e-3, moved_size = 1e-3;  // of the terms
          for (std::int64_t j = 0; j < s.keys; ++j)
            for (int d = 0; d < s.value_size; ++d) {
              const double v_j = v.at(b, g, j, d), along = v_moves ? v_tangent.at(b, g, j, d) : 0.0;
              value[d] += p[j] * v_j;
              moved[d] += p[j] * ((t[j] - mean) * v_j + along);
              size = std::max(size, std::fabs(v_j));
              moved_size = std::max(moved_size, std::fabs((t[j] - mean) * v_j) + std::fabs(along));
            }
          const std::string row =
              " of row " + std::to_string(b) + "," + std::to_string(h) + "," + std::to_string(i) + " of " + text();
          const double want = most + std::log(total), last = (sizeof(S) == 2 ? 2 : 20) * epsilon<S>();
          expect_close(logsumexp[(b * s.heads + h) * s.queries + i], want, 50 * epsilon<A>() * (1 + std::fabs(want)),
                       "logsumexp" + row);
          for (int d = 0; d < s.value_size; ++d) {
            expect_close(out.at(b, h, i, d), value[d], last * size, "value" + row);
            expect_close(tangent.at(b, h, i, d), moved[d], last * moved_size, "tangent" + row);
          }
        }
  }

  cudaError_t run() { return rk::cuda::launch_attention_jvp(call(), nullptr); }
};

template <class S>
void test_shape(const Options& options, Draw& draw, const Shape& shape, int most_offset = 8) {
  const auto kind = [&] {
    return draw.one_of({Kind::kNone, Kind::kNone, Kind::kOfScores, Kind::kOfKeys, Kind::kOfRows});
  };
  const Kind mask = kind(), mask_tangent = kind();
  Problem<S> t(draw, shape, mask, mask_tangent, draw(0, 1), most_offset);
  if (draw(0, 2) == 0) {
    t.q_moves = draw(0, 1);
    t.k_moves = draw(0, 1);
    t.v_moves = draw(0, 1);
  }
  run_in_all_orders(options, t.text(), [&] { return t.run(); }, t.out.data, t.tangent.data, t.logsumexp);
  t.check();
}

// No bit depends on where the tensors lie.
template <class S>
void test_alignment(Draw& draw, const Shape& shape) {
  Problem<S> t(draw, shape, Kind::kNone, Kind::kNone, true, 0);
  expect_success(t.run());
  const auto first = std::make_tuple(t.out.data.bytes(), t.tangent.data.bytes(), t.logsumexp.bytes());
  auto x = t.call();
  expect_close(x.aligned, 1, 0, t.text() + ", aligned");
  x.aligned = false;
  for (auto* m : {&t.out, &t.tangent}) m->data.fill_with_nan();
  expect_success(rk::cuda::launch_attention_jvp(x, nullptr));
  const auto second = std::make_tuple(t.out.data.bytes(), t.tangent.data.bytes(), t.logsumexp.bytes());
  expect_close(first == second, 1, 0, t.text() + ", elsewhere");
}

// What all keys have in common moves T of a row by as much, and changes nothing.  Each key's scores are larger than those
// of the keys before, so that all sums shrink again and again.  The first ones may be hidden.
template <class S>
void test_common_part(Draw& draw, const Shape& shape, int hidden) {
  Problem<S> t(draw, shape, Kind::kOfKeys, Kind::kOfKeys, false, 0);
  for (std::int64_t j = 0; j < shape.keys; ++j) {
    t.mask.data[j] = j < hidden ? -INFINITY : static_cast<float>(j);
    t.mask_tangent.data[j] += 50;
  }
  expect_success(t.run());
  t.check();
}

// A key that is NaN is seen by the queries that attend to it, and by none before them.
template <class S>
void test_nan(Draw& draw, const Shape& shape) {
  Problem<S> t(draw, shape, Kind::kNone, Kind::kNone, true, 0);
  const std::int64_t last = shape.keys - 1;
  t.k.data[t.k.index(0, 0, last)] = from_double<S>(NAN);
  expect_success(t.run());
  for (std::int64_t i = 0; i < shape.queries; ++i)
    for (int d = 0; d < shape.value_size; ++d) {
      ++checks;
      if (std::isnan(t.out.at(0, 0, i, d)) != (i >= last) || std::isnan(t.tangent.at(0, 0, i, d)) != (i >= last))
        report("NaN in row " + std::to_string(i), t.out.at(0, 0, i, d), t.tangent.at(0, 0, i, d));
    }
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
    for (const int hidden : {0, 20}) {
      test_common_part<__nv_bfloat16>(draw, {1, 1, 1, 70, 70, 32, 32}, hidden);
      test_common_part<float>(draw, {1, 1, 1, 70, 70, 32, 32}, hidden);
    }
    test_nan<__half>(draw, {1, 1, 1, 70, 40, 32, 32});
    test_nan<float>(draw, {1, 1, 1, 70, 40, 32, 32});
  }
  return finish();
}
