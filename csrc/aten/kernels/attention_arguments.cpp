#include "attention_arguments.h"

#include <limits>
#include <sstream>
#include <vector>

#include "../../arguments/check.h"

namespace rk::aten {
namespace {

std::string describe(const Tensor& t) {
  return shape_text(t.sizes().vec()) + " " + name_of(t.scalar_type()) + " on " + t.device().str();
}

// The checks of one operator, which messages name.
struct Checks {
  const char* op;
  const Tensor& q;

  void tensor(const char* name, const Tensor& t, const std::vector<int64_t>& sizes, at::ScalarType dtype) const {
    RK_CHECK(t.sizes().vec() == sizes && t.scalar_type() == dtype && t.device() == q.device(), op, ": ", name,
             " must be ", shape_text(sizes), " ", name_of(dtype), " on ", q.device().str(), ", got ", describe(t));
  }
  void like(const char* name, const Tensor& t, const std::vector<int64_t>& sizes) const {
    tensor(name, t, sizes, q.scalar_type());
  }
  void like(const char* name, const std::optional<Tensor>& t, const std::vector<int64_t>& sizes) const {
    if (t) like(name, *t, sizes);
  }

  AttentionShape shape(const Tensor& k, const Tensor& v) const {
    RK_CHECK(is_floating_point(q.scalar_type()), op, ": q must be float32, float64, float16 or bfloat16, got ",
             describe(q));
    const std::pair<const char*, const Tensor&> four_dimensional[] = {{"q", q}, {"k", k}, {"v", v}};
    for (const auto& [name, t] : four_dimensional)
      RK_CHECK(t.dim() == 4, op, ": ", name, " must have 4 dimensions, got ", describe(t));
    const AttentionShape s{q.size(0), q.size(1), k.size(1), q.size(2),
                           k.size(2), q.size(3), v.size(3), q.scalar_type()};
    RK_CHECK(s.key_heads == 0 ? s.heads == 0 : s.heads % s.key_heads == 0, op, ": the ", s.key_heads,
             " heads of k must divide the ", s.heads, " heads of q");
    like("k", k, s.like_k());
    like("v", v, s.like_v());
    return s;
  }

  void mask(const char* name, const Tensor& m, const AttentionShape& s) const {
    const std::vector<int64_t> scores{s.batch, s.heads, s.queries, s.keys};
    bool fits = m.dim() <= 4 && is_floating_point(m.scalar_type()) && m.device() == q.device();
    for (int64_t d = 1; fits && d <= m.dim(); ++d) fits = m.size(-d) == 1 || m.size(-d) == scores[4 - d];
    RK_CHECK(fits, op, ": ", name, " must be floating-point, broadcastable to ", shape_text(scores), " and on ",
             q.device().str(), ", got ", describe(m));
  }
};

AttentionShape check_attention(const AttentionArguments& in) {
  const Checks check{"attention_double_backward", in.q};
  const AttentionShape s = check.shape(in.k, in.v);
  check.like("grad", in.grad, s.like_out());
  check.like("a", in.a, s.like_q());
  check.like("b", in.b, s.like_k());
  check.like("c", in.c, s.like_v());
  RK_CHECK(in.out.has_value() == in.logsumexp.has_value(), check.op,
           ": out and logsumexp must be given both or neither, got ", in.out ? "out" : "logsumexp", " alone");
  check.like("out", in.out, s.like_out());
  if (in.logsumexp) check.tensor("logsumexp", *in.logsumexp, {s.batch, s.heads, s.queries}, accumulation_type(s.dtype));
  if (in.mask) check.mask("mask", *in.mask, s);
  return s;
}

AttentionShape check_attention(const AttentionJvpArguments& in) {
  const Checks check{"attention_jvp", in.q};
  const AttentionShape s = check.shape(in.k, in.v);
  check.like("q_tangent", in.q_tangent, s.like_q());
  check.like("k_tangent", in.k_tangent, s.like_k());
  check.like("v_tangent", in.v_tangent, s.like_v());
  if (in.mask) check.mask("mask", *in.mask, s);
  if (!in.mask_tangent) return s;
  const Tensor& moved = *in.mask_tangent;
  RK_CHECK(in.mask && moved.sizes() == in.mask->sizes() && is_floating_point(moved.scalar_type()) &&
               moved.device() == in.q.device(),
           check.op, ": mask_tangent must be floating-point, shaped like mask and on ", in.q.device().str(), ", got ",
           describe(moved));
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

AttentionJvpCall attention_jvp_call(const AttentionJvpArguments& in, bool causal, double scale) {
  const AttentionShape s = check_attention(in);
  const auto result = [&] {  // with the heads inside, as PyTorch's own kernels leave it
    return at::empty({s.batch, s.queries, s.heads, s.value_size}, in.q.options()).transpose(1, 2);
  };
  const auto accumulation = in.q.options().dtype(accumulation_type(s.dtype));
  return {in, s, causal, scale, {result(), result(), at::empty({s.batch, s.heads, s.queries}, accumulation)}};
}

void attends_to_nothing(const AttentionJvpResults& results) {
  std::get<0>(results).zero_();
  std::get<1>(results).zero_();
  std::get<2>(results).fill_(-std::numeric_limits<double>::infinity());
}

Tensor additive_mask(const Tensor& mask, const AttentionShape& shape) {
  Tensor m = mask;
  for (int64_t d = 0; d < m.dim(); ++d)
    if (m.size(d) > 1 && m.stride(d) == 0) m = m.narrow(d, 0, 1);
  m = m.to(accumulation_type(shape.dtype));
  return m.expand({shape.batch, shape.heads, shape.queries, shape.keys});
}

}  // namespace rk::aten
