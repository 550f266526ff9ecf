#include <limits>

#include "attention.h"

namespace rk::aten::attention {
namespace {

SymInt heads_of(const Tensor& t) { return t.sym_size(1); }

Tensor per_head(const Tensor& t, const Tensor& q) {
  return heads_of(t) == heads_of(q) ? t : t.repeat_interleave_symint(heads_of(q) / heads_of(t), 1);
}

Tensor per_key_head(const Tensor& grad, const Tensor& k) {
  if (heads_of(grad) == heads_of(k)) return grad;
  auto shape = grad.sym_sizes().vec();
  shape[1] = heads_of(grad) / heads_of(k);
  shape.insert(shape.begin() + 1, heads_of(k));
  return grad.reshape_symint(shape).sum(2);
}

Tensor total(const Tensor& t) { return t.sum(-1, /*keepdim=*/true); }
Tensor centred(const Tensor& p, const Tensor& t) { return t - total(p * t); }

// What every derivative begins with; k and v are given to every head of q.
struct Composed {
  Tensor q, k, v, scores, p;

  Composed(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& bias, const Settings& s) {
    q = wide(q_);
    k = wide(per_head(k_, q_));
    v = wide(per_head(v_, q_));
    scores = at::matmul(q, k.mT()) * s.scale;
    if (bias.defined()) scores = scores + wide(bias);
    if (s.causal) {
      const auto ones = at::ones_symint({q.sym_size(2), k.sym_size(2)}, q.options().dtype(at::kBool));
      scores = scores.masked_fill(ones.triu(1), -std::numeric_limits<double>::infinity());
    }
    p = at::_safe_softmax(scores, -1);
  }
  explicit Composed(const variable_list& in, const Settings& s) : Composed(in[1], in[2], in[3], in[4], s) {}

  Tensor wide(const Tensor& t) const {
    return t.to(accumulation_type(q.defined() ? q.scalar_type() : t.scalar_type()));
  }
  // Zeros where nothing moves.
  Tensor moved(const Tensor& t, const Tensor& like) const {
    return t.defined() ? wide(per_head(t, q)) : at::zeros_like(like);
  }
  // How the scores move along with q, k and the bias.
  Tensor scores_moved(const Tensor& a, const Tensor& b, const Tensor& bias, const Settings& s) const {
    const Tensor t = (at::matmul(a, k.mT()) + at::matmul(q, b.mT())) * s.scale;
    return bias.defined() ? t + wide(bias) : t;
  }
};

variable_list narrowed(const variable_list& grads, const variable_list& in) {
  variable_list result;
  for (size_t i = 0; i < grads.size(); ++i) {
    Tensor grad = grads[i];
    if (i == 2 || i == 3) grad = per_key_head(grad, in[i]);
    if (i == 4) grad = at::sum_to(grad, in[i].sym_sizes());
    result.push_back(grad.to(in[i].scalar_type()));
  }
  return result;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> forward_mode(const Inputs& in, const Inputs& tangents, const Settings& s) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const Composed m(in.q, in.k, in.v, in.bias, s);
  const auto dtype = in.q.scalar_type();
  const Tensor t = m.scores_moved(m.moved(tangents.q, m.q), m.moved(tangents.k, m.k), tangents.bias, s);
  const Tensor tangent = at::matmul(m.p * centred(m.p, t), m.v) + at::matmul(m.p, m.moved(tangents.v, m.v));
  return {at::matmul(m.p, m.v).to(dtype), tangent.to(dtype), m.scores.detach().logsumexp(-1)};
}

variable_list first_backward(const variable_list& in, const Settings& s) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const Composed m(in, s);
  const Tensor g = m.wide(in[0]), ds = m.p * centred(m.p, at::matmul(g, m.v.mT()));
  variable_list grads{g, at::matmul(ds, m.k) * s.scale, at::matmul(ds.mT(), m.q) * s.scale, at::matmul(m.p.mT(), g)};
  if (in[4].defined()) grads.push_back(ds);
  grads = narrowed(grads, in);
  grads.erase(grads.begin());
  return grads;
}

variable_list second_backward(const Tensor* gg, const variable_list& in, const Settings& s) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const Composed m(in, s);
  const Tensor g = m.wide(in[0]), a = m.moved(gg[0], m.q), b = m.moved(gg[1], m.k), c = m.moved(gg[2], m.v);
  const Tensor t = centred(m.p, m.scores_moved(a, b, gg[3], s)), pd = m.p * t;
  const Tensor slope = centred(m.p, at::matmul(g, m.v.mT())), ds = m.p * slope;
  const Tensor w = m.p * centred(m.p, slope * t + at::matmul(g, c.mT()));
  variable_list grads{at::matmul(pd, m.v) + at::matmul(m.p, c), (at::matmul(w, m.k) + at::matmul(ds, b)) * s.scale,
                      (at::matmul(w.mT(), m.q) + at::matmul(ds.mT(), a)) * s.scale, at::matmul(pd.mT(), g)};
  if (in[4].defined()) grads.push_back(w);
  return narrowed(grads, in);
}

}  // namespace rk::aten::attention
