#include "attention_arguments.h"

#include <sstream>
#include <vector>

#include "../../arguments/check.h"

namespace rk::aten {
namespace {

constexpr const char* kOp = "attention_double_backward";

std::string describe(const Tensor& t) {
  return shape_text(t.sizes().vec()) + " " + name_of(t.scalar_type()) + " on " + t.device().str();
}

void check(const char* name, const Tensor& t, const std::vector<int64_t>& sizes, at::ScalarType dtype,
           const Tensor& q) {
  RK_CHECK(t.sizes().vec() == sizes && t.scalar_type() == dtype && t.device() == q.device(), kOp, ": ", name,
           " must be ", shape_text(sizes), " ", name_of(dtype), " on ", q.device().str(), ", got ", describe(t));
}

void check_like(const char* name, const Tensor& t, const std::vector<int64_t>& sizes, const Tensor& q) {
  check(name, t, sizes, q.scalar_type(), q);
}

void check_like(const char* name, const std::optional<Tensor>& t, const std::vector<int64_t>& sizes, const Tensor& q) {
  if (t) check_like(name, *t, sizes, q);
}

AttentionShape check_attention(const AttentionArguments& in) {
  const Tensor &q = in.q, &k = in.k, &v = in.v;
  RK_CHECK(is_floating_point(q.scalar_type()), kOp, ": q must be float32, float64, float16 or bfloat16, got ",
           describe(q));
  const std::pair<const char*, const Tensor&> four_dimensional[] = {{"q", q}, {"k", k}, {"v", v}};
  for (const auto& [name, t] : four_dimensional)
    RK_CHECK(t.dim() == 4, kOp, ": ", name, " must have 4 dimensions, got ", describe(t));
  const AttentionShape s{q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(3), v.size(3), q.scalar_type()};
  RK_CHECK(s.key_heads == 0 ? s.heads == 0 : s.heads % s.key_heads == 0, kOp, ": the ", s.key_heads,
           " heads of k must divide the ", s.heads, " heads of q");
  const std::vector<int64_t> like_q{s.batch, s.heads, s.queries, s.key_size},
      like_k{s.batch, s.key_heads, s.keys, s.key_size}, like_v{s.batch, s.key_heads, s.keys, s.value_size};
  check_like("k", k, like_k, q);
  check_like("v", v, like_v, q);
  const std::vector<int64_t> like_out{s.batch, s.heads, s.queries, s.value_size};
  check_like("grad", in.grad, like_out, q);
  check_like("a", in.a, like_q, q);
  check_like("b", in.b, like_k, q);
  check_like("c", in.c, like_v, q);
  RK_CHECK(in.out.has_value() == in.logsumexp.has_value(), kOp,
           ": out and logsumexp must be given both or neither, got ", in.out ? "out" : "logsumexp", " alone");
  check_like("out", in.out, like_out, q);
  if (in.logsumexp) check("logsumexp", *in.logsumexp, {s.batch, s.heads, s.queries}, accumulation_type(s.dtype), q);
  if (!in.mask) return s;
  const std::vector<int64_t> scores{s.batch, s.heads, s.queries, s.keys};
  const Tensor& m = *in.mask;
  bool fits = m.dim() <= 4 && is_floating_point(m.scalar_type()) && m.device() == q.device();
  for (int64_t d = 1; fits && d <= m.dim(); ++d) fits = m.size(-d) == 1 || m.size(-d) == scores[4 - d];
  RK_CHECK(fits, kOp, ": mask must be floating-point, broadcastable to ", shape_text(scores), " and on ",
           q.device().str(), ", got ", describe(m));
  return s;
}

AttentionPlan attention_plan(const AttentionArguments& x, bool grad, bool q, bool k, bool v) {
  AttentionPlan p{x.a.has_value(), x.b.has_value(), x.c.has_value(), false, false, false, false};
  const bool any = p.a || p.b || p.c;
  p.grad = grad && any;
  p.q = q && any;
  p.k = k && any;
  p.v = v && p.tangent();
  return p;
}

// Laid out like its tensor, with adjacent columns.
Tensor attention_result(const Tensor& like, bool asked, bool computed) {
  if (!asked) return at::empty({0}, like.options());
  Tensor result = at::empty_like(like);
  if (like.size(3) > 1 && result.stride(3) != 1) result = at::empty(like.sizes(), like.options());
  return computed ? result : result.zero_();
}

}  // namespace

AttentionCall attention_call(const AttentionArguments& in, bool causal, double scale, bool need_grad, bool need_q,
                             bool need_k, bool need_v) {
  const AttentionShape shape = check_attention(in);
  const AttentionPlan plan = shape.empty() ? AttentionPlan{} : attention_plan(in, need_grad, need_q, need_k, need_v);
  return {in,
          shape,
          plan,
          causal,
          scale,
          {attention_result(in.grad, need_grad, plan.grad), attention_result(in.q, need_q, plan.q),
           attention_result(in.k, need_k, plan.k), attention_result(in.v, need_v, plan.v)}};
}

Tensor additive_mask(const Tensor& mask, const AttentionShape& shape) {
  Tensor m = mask;
  for (int64_t d = 0; d < m.dim(); ++d)
    if (m.size(d) > 1 && m.stride(d) == 0) m = m.narrow(d, 0, 1);
  m = m.to(accumulation_type(shape.dtype));
  return m.expand({shape.batch, shape.heads, shape.queries, shape.keys});
}

}  // namespace rk::aten
