// margin_loss on the CPU.  Formulas: math/margin_loss.h.  One pass over a row finds its leaders; the slopes are zero but
// at five classes.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "../arguments/margin_loss.h"
#include "dispatch.h"

namespace rk::cpu {
namespace {

template <class S>
void loss_rows(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& towards, Margin kind,
               const Tensor& loss, const Tensor& slopes, int64_t first, int64_t last) {
  using A = accumulation_t<S>;
  const int64_t classes = logits.size(1);
  const auto* const y = pointer<int64_t>(target);
  const auto* const o = pointer<int64_t>(towards);
  for (int64_t row = first; row < last; ++row) {
    const S* const z = pointer<S>(logits) + row * classes;
    S* const slope = pointer<S>(slopes) + row * classes;
    Leaders<A> best;
    A poison = A(0);
    for (int64_t c = 0; c < classes; ++c) {
      const A v = load(z[c]);
      if (v > best.value[3] || best.index[3] < 0) best.meet(v, c);
      poison = v == v ? poison : v;
    }
    const int64_t other = o ? o[row] : best.index[best.index[0] == y[row] ? 1 : 0];
    const MarginSlopes<A> s(kind, best, y[row], load(z[y[row]]), other, load(z[other]), o != nullptr);
    pointer<A>(loss)[row] = s.loss + poison;
    std::fill_n(slope, classes, store<S>(poison));
    for (const int64_t c : {s.other, s.own, s.top_index, s.third_index, s.fourth_index})
      if (c >= 0) slope[c] = store<S>(s.at(c) + poison);
  }
}

void check_classes(const char* name, const Tensor& classes, int64_t count) {
  const auto* const y = pointer<int64_t>(classes);
  for (int64_t row = 0; row < classes.size(0); ++row)
    RK_CHECK(y[row] >= 0 && y[row] < count, "margin_loss: ", name, " must be in [0, ", count, "), got ", y[row],
             " in row ", row);
}

std::tuple<Tensor, Tensor> margin_loss(Tensor logits, Tensor target, std::optional<Tensor> towards, int64_t kind) {
  const Margin margin = check_margin_loss("margin_loss", logits, target, towards, kind);
  const Tensor z = torch::stable::contiguous(logits);
  target = torch::stable::contiguous(target);
  if (towards) towards = torch::stable::contiguous(*towards);
  check_classes("target", target, z.size(1));
  if (towards) check_classes("towards", *towards, z.size(1));
  Tensor loss = torch::stable::new_empty(z, {z.size(0)}, accumulation_type(z.scalar_type()));
  Tensor slopes = torch::stable::new_empty(z, {z.size(0), z.size(1)});
  torch::stable::parallel_for(0, z.size(0), rows_per_thread(4 * z.size(1)), [&](int64_t first, int64_t last) {
    visit_storage(z.scalar_type(),
                  [&]<class S>(S) { loss_rows<S>(z, target, towards, margin, loss, slopes, first, last); });
  });
  return {loss, slopes};
}

template <class S>
void scale_rows(const Tensor& grad, const Tensor& slopes, const Tensor& result, int64_t first, int64_t last) {
  using A = accumulation_t<S>;
  const int64_t classes = slopes.size(1);
  const A* const g = pointer<A>(grad);
  const S* const slope = pointer<S>(slopes);
  S* const to = pointer<S>(result);
  for (int64_t row = first; row < last; ++row)
    for (int64_t j = row * classes; j < (row + 1) * classes; ++j) to[j] = store<S>(g[row] * load(slope[j]));
}

Tensor margin_loss_backward(Tensor grad, Tensor slopes) {
  check_margin_loss_backward("margin_loss_backward", grad, slopes);
  const Tensor g = torch::stable::contiguous(grad), s = torch::stable::contiguous(slopes);
  Tensor result = torch::stable::new_empty(s, {s.size(0), s.size(1)});
  torch::stable::parallel_for(0, s.size(0), rows_per_thread(s.size(1)), [&](int64_t first, int64_t last) {
    visit_storage(s.scalar_type(), [&]<class S>(S) { scale_rows<S>(g, s, result, first, last); });
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(robustkern, CPU, m) {
  m.impl("margin_loss", TORCH_BOX(&margin_loss));
  m.impl("margin_loss_backward", TORCH_BOX(&margin_loss_backward));
}

}  // namespace rk::cpu
