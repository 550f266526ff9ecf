// What kind of tensor this is, and small conversions.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

#include "../arguments/dtype.h"

namespace rk::aten {

using at::Tensor;

// A fake or functional tensor: torch.compile or make_fx is tracing.
inline bool being_compiled(const Tensor& t) {
  return t.key_set().has(c10::DispatchKey::Python) || t.key_set().has(c10::DispatchKey::Functionalize);
}

// Stands for many tensors, one for each cotangent: a Function would attach its graph to what stands for them, where it is
// lost.  An operator called through the dispatcher is called for each of them.
inline bool is_batched(const Tensor& t) {
  return t.key_set().has(c10::DispatchKey::Batched) || t.key_set().has(c10::DispatchKey::FuncTorchBatched);
}

// A tensor with memory or a shape of its own.  Not a subclass that answers for itself (DTensor and whatever else has a
// __torch_dispatch__), nor nested, nor sparse: those know PyTorch's operators only.
bool is_known(const Tensor& t);

// Carries more than numbers: a tangent of forward mode, or a level of a torch.func transform that differentiates.  A kernel
// would lose it, so whatever is given such a cotangent is computed in differentiable operators.
bool is_differentiated(const Tensor& t);

// Whether anything else than a tangent of the level at hand hangs on `t`: a graph that is being recorded, here or at a level of
// torch.func below, or a tangent there.
bool is_differentiated_beside_tangent(const Tensor& t);

// The tangent of the level at hand, undefined if there is none; and an argument without it.
inline Tensor tangent_of(const Tensor& t) { return t.defined() ? t._fw_grad(0) : t; }
inline Tensor primal_of(const Tensor& t) { return tangent_of(t).defined() ? t._fw_primal(0) : t; }
inline std::optional<Tensor> primal_of(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(primal_of(*t)) : t;
}
template <class T>
const T& primal_of(const T& other) {
  return other;
}

// Whether fused kernels can read `t`: a strided tensor of one of their dtypes, that holds numbers.
inline bool is_plain(const Tensor& t) {
  return is_known(t) && !being_compiled(t) && is_floating_point(t.scalar_type());
}

// Whether a tensor is so small that PyTorch's own derivative is as fast: our graph costs a microsecond or two more, which
// our kernel does not win back.  Never for what is traced, since nobody knows how large that will be.
bool is_small(const Tensor& t, int64_t limit);

// Whether this holds of a tensor among an operator's arguments.
template <class Predicate, class... Args>
bool any_tensor(const Predicate& holds, const Args&... args) {
  const auto one = [&]<class T>(const T& arg) {
    if constexpr (std::is_same_v<T, Tensor>)
      return arg.defined() && holds(arg);
    else if constexpr (std::is_same_v<T, std::optional<Tensor>>)
      return arg && arg->defined() && holds(*arg);
    else
      return false;
  };
  return (one(args) || ...);
}

// Undefined if absent, and the other way round.
inline Tensor optional_value(const std::optional<Tensor>& t) { return t.value_or(Tensor()); }
inline std::optional<Tensor> if_defined(const Tensor& t) { return t.defined() ? std::make_optional(t) : std::nullopt; }

// f(t), absent if t is undefined.
template <class F>
std::optional<Tensor> if_defined(const Tensor& t, const F& f) {
  return t.defined() ? std::optional<Tensor>(f(t)) : std::nullopt;
}

inline std::optional<Tensor> in_accumulation_type(const Tensor& t, at::ScalarType data) {
  return if_defined(t, [&](const Tensor& defined) { return defined.to(accumulation_type(data)); });
}

// The dimensions of a tensor in the order of its memory, and the way back.
struct MemoryOrder {
  std::vector<int64_t> order, back;
  explicit MemoryOrder(const Tensor& t);
};

}  // namespace rk::aten
