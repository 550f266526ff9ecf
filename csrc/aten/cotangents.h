// Several cotangents at once: what torch.func.vmap over torch.autograd.grad gives a backward in the form of one batched
// tensor.  A Function that saves no more than x for all of them takes it apart and works on the K tensors together.
#pragma once

#include <ATen/FuncTorchTLS.h>
#include <ATen/functorch/BatchedTensorImpl.h>

#include <memory>
#include <typeindex>

#include "gradients.h"
#include "switch.h"

namespace rk::aten {

// While in scope, operators see tensors as they are, and a Function can be applied.
class OutsideTransforms {
 public:
  OutsideTransforms()
      : keys_(c10::DispatchKeySet(
            {c10::DispatchKey::FuncTorchDynamicLayerFrontMode, c10::DispatchKey::FuncTorchDynamicLayerBackMode})),
        transforms_(std::move(at::functorch::functorchTLSAccessor())) {}
  ~OutsideTransforms() { at::functorch::functorchTLSAccessor() = std::move(transforms_); }
  OutsideTransforms(const OutsideTransforms&) = delete;
  OutsideTransforms& operator=(const OutsideTransforms&) = delete;

 private:
  c10::impl::ExcludeDispatchKeyGuard keys_;
  std::unique_ptr<at::functorch::FuncTorchTLSBase> transforms_;
};

// f of the cotangents [K, ...] that g stands for, a tensor or several, wrapped as g was; nothing if g is an ordinary tensor,
// or one of several transforms.
template <class F>
auto for_several(const Tensor& g, const F& f) -> std::optional<decltype(f(g))> {
  const auto* const batched = at::functorch::maybeGetBatchedImpl(g);
  if (!batched || !enabled()) return std::nullopt;
  const Tensor values = batched->value();
  if (!is_plain(values) || values.key_set().has_any(c10::DispatchKeySet(
                               {c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper})))
    return std::nullopt;
  decltype(f(g)) result;
  {
    const OutsideTransforms guard;
    result = f(values.movedim(batched->bdim(), 0));
  }
  const auto wrap = [&](Tensor& t) { t = at::functorch::makeBatched(t, 0, batched->level()); };
  if constexpr (std::is_same_v<decltype(result), Tensor>)
    wrap(result);
  else
    for (Tensor& t : result) wrap(t);
  return result;
}

// Called by the forward of a Function that folds, below.
inline void note_hooks(AutogradContext* ctx) {
  if (saves_through_hooks()) ctx->saved_data["hooks"] = true;
}

// Whether somebody sees the gradients that this node is given or gives.
bool has_hooks(torch::autograd::Node& node);

// Says of a Function's backward that it works on several cotangents at least as fast as on one after the other, if what it
// saved went through no hooks; when_large: on the CPU not only while it is small.
struct Folding {
  bool (*folds)(torch::autograd::Node&);
  bool when_large;
};
void add_folding(std::type_index node, Folding folding);
template <class Function>
void add_folding(bool when_large = true) {
  using Node = torch::autograd::CppNode<Function>;
  const auto folds = [](torch::autograd::Node& node) {
    return static_cast<Node&>(node).ctx_.saved_data.count("hooks") == 0;
  };
  add_folding(typeid(Node), {folds, when_large});
}

// Whether everything between `outputs` and x does, so that one pass with all cotangents is worth it.  A node with a hook does
// not: the hook would see a batched tensor.
bool folds(const Tensor& outputs, const Tensor& x, int64_t cotangents);

// Whether g is [K, *x.shape].
inline bool are_several(const Tensor& g, const Tensor& x) { return g.dim() == x.dim() + 1; }

}  // namespace rk::aten
