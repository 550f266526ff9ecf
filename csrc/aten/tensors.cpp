#include "tensors.h"

#include <ATen/functorch/BatchedTensorImpl.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <algorithm>
#include <numeric>
#include <string>

#include "python.h"
#include "switch.h"

namespace rk::aten {

bool is_known(const Tensor& t) {
  if (t.layout() != at::kStrided || t.is_nested()) return false;
  if (!t.key_set().has(c10::DispatchKey::Python)) return true;
  const python::WithGil gil;
  const std::string type = python::wrap(t).attribute("__class__").attribute("__name__").text();
  return type == "FakeTensor" || type == "FunctionalTensor";
}

bool is_differentiated(const Tensor& t) {
  if (!t.defined()) return false;
  if (t.key_set().has(c10::DispatchKey::FuncTorchGradWrapper)) return true;
  if (const auto* const batched = at::functorch::maybeGetBatchedImpl(t)) return is_differentiated(batched->value());
  return t._fw_grad(0).defined();
}

bool is_differentiated_beside_tangent(const Tensor& t) {
  if (at::GradMode::is_enabled() && t.requires_grad()) return true;
  const auto below = [](const Tensor& value) {
    return value._fw_grad(0).defined() || is_differentiated_beside_tangent(value);
  };
  if (const auto* const batched = at::functorch::maybeGetBatchedImpl(t)) return below(batched->value());
  if (!t.key_set().has(c10::DispatchKey::FuncTorchGradWrapper)) return false;
  const python::WithGil gil;  // the class of what wraps it has no header that can be included
  const auto unwrapped = python::import("torch._C._functorch").attribute("get_unwrapped");
  return below(python::unwrap(unwrapped(python::wrap(t).get()).get()));
}

bool is_small(const Tensor& t, int64_t limit) {
  return t.is_cpu() && !being_compiled(t) && !c10::impl::dispatch_mode_enabled() && t.numel() < limit &&
         !however_small();
}

MemoryOrder::MemoryOrder(const Tensor& t) : order(t.dim()), back(t.dim()) {
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return t.stride(a) > t.stride(b); });
  for (int64_t d = 0; d < t.dim(); ++d) back[order[d]] = d;
}

}  // namespace rk::aten
