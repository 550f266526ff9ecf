// Replaces the autograd kernel of one of PyTorch's own operators.
//
// A replacement is registered at AutogradCPU and AutogradCUDA, beside PyTorch's kernel, which stands at the alias key
// Autograd and stays reachable through AutogradOther.  It does its own work only where a graph is being built that can
// be differentiated again; every other call goes to PyTorch's kernel at once:
//
//     std::optional<Tensor> gelu_backward(const Tensor& grad, const Tensor& x, c10::string_view approximate) { ... }
//     void register_activation(Registrar& r) { r.replace<at::_ops::gelu_backward, gelu_backward>(kKernel); }
//
// A replacement that returns nothing leaves the call, and whatever PyTorch's kernel calls in turn, to PyTorch.
//
// What a replacement's Function does:
//   forward    runs the operator below autograd and saves its inputs; returns defined tensors only
//   backward   the fused operator, called below autograd; or, where its result is differentiated again (composes()), the
//              same formula in differentiable operators.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/PythonDispatcherTLS.h>
#include <torch/library.h>

#include <string>
#include <type_traits>
#include <vector>

#include "gradients.h"
#include "switch.h"
#include "tensors.h"

namespace rk::aten {

// torch.compile has a decomposition of this operator, which it takes for ambiguous at AutogradOther only.
template <class Op>
constexpr bool kIsAmbiguous = std::is_same_v<Op, at::_ops::native_batch_norm>;

// The keys that lead to PyTorch's own autograd kernel: it is registered at the alias Autograd, hence at AutogradOther.
// Keys above autograd have had their turn.
template <class Op>
c10::DispatchKeySet stock_keys(c10::DispatchKeySet keys) {
  const bool traced = kIsAmbiguous<Op> && c10::impl::PythonDispatcherTLS::get_state();
  return (keys & c10::after_autograd_keyset)
      .add(traced ? c10::DispatchKey::AutogradMeta : c10::DispatchKey::AutogradOther);
}

// PyTorch calls some backwards without a cotangent, and gets nothing back.
template <class First, class... Rest>
bool has_cotangent(const First& first, const Rest&...) {
  if constexpr (std::is_same_v<First, Tensor>)
    return first.defined();
  else
    return true;
}

template <class... Args>
bool wants_grad(const Args&... args) {
  return any_tensor([](const Tensor& t) { return t.requires_grad(); }, args...);
}
template <class... Args>
bool has_tangent(const Args&... args) {
  return any_tensor([](const Tensor& t) { return t._fw_grad(0).defined(); }, args...);
}
// Whether autograd, in any of its forms, is to differentiate this call.
template <class... Args>
bool to_be_differentiated(const Args&... args) {
  return (at::GradMode::is_enabled() && wants_grad(args...)) || has_tangent(args...) || under_functorch_grad();
}
template <class... Args>
bool all_known(const Args&... args) {
  return !any_tensor([](const Tensor& t) { return !is_known(t); }, args...);
}

// Whether this call builds a graph that a fused second derivative can serve.
template <class... Args>
bool serves(const Args&... args) {
  return enabled() && at::GradMode::is_enabled() && wants_grad(args...) && !uses_stock_kernels() &&
         !under_functorch_grad() && !has_tangent(args...) && all_known(args...) && has_cotangent(args...);
}

// A decomposed operator has no derivative in PyTorch (silu_backward).  At AutogradOther stands its decomposition, which
// can be differentiated, and which is needed only for that.
enum class Kind { kBackward, kForward, kDecomposed };

template <class Op, class Schema = typename Op::schema>
struct Replacement;

template <class Op, class R, class... Args>
struct Replacement<Op, R(Args...)> {
  // What a replacement gives, or nothing; of an operator in place the address of what it was given.
  using Ours = std::conditional_t<std::is_reference_v<R>, std::remove_reference_t<R>*, std::optional<R>>;
  using Function = Ours (*)(Args...);

  template <Kind kind, Function ours>
  static R kernel(c10::DispatchKeySet keys, Args... args) {
    // A forward saves the same tensors as PyTorch's, or leaves the call to it: see saves_through_hooks().
    const bool serve = serves(args...) && (kind == Kind::kForward || !in_checkpoint());
    const bool below = kind == Kind::kDecomposed && !to_be_differentiated(args...);
    const auto stock = below ? keys & c10::after_autograd_keyset : stock_keys<Op>(keys);
    if (!serve) return Op::redispatch(stock, std::forward<Args>(args)...);
    if (auto result = ours(args...)) return *std::move(result);
    const UseStock guard;
    return Op::redispatch(stock, std::forward<Args>(args)...);
  }
};

// A replacement that calls our kernels, for CUDA: PyTorch's own on a GPU that they were not compiled for.
template <auto replacement, class Signature = decltype(replacement)>
struct WhereCompiled;

template <auto replacement, class R, class... Args>
struct WhereCompiled<replacement, R (*)(c10::DispatchKeySet, Args...)> {
  static R kernel(c10::DispatchKeySet keys, Args... args) {
    const auto lacks_image = [](const Tensor& t) { return t.is_cuda() && !runs_on_cuda(t.get_device()); };
    if (!any_tensor(lacks_image, args...)) return replacement(keys, std::forward<Args>(args)...);
    const UseStock stock;
    return replacement(keys, std::forward<Args>(args)...);
  }
};

enum class Devices { kAll, kCpu };

// Registers replacements; they live until the process ends and are idle while !enabled().
class Registrar {
 public:
  // On CUDA only if `kernel`, the operator of robustkern that the replacement calls, has a kernel there: where the CUDA
  // extension is not built, PyTorch's own derivative stays.  None: written in PyTorch's operators.
  template <class Op, typename Replacement<Op>::Function ours, Kind kind = Kind::kBackward>
  void replace(const char* kernel = nullptr, Devices devices = Devices::kAll) {
    add<Op, Replacement<Op>::template kernel<kind, ours>>(kernel, devices);
  }
  // A kernel that decides by itself which calls it serves.
  template <class Op, auto replacement>
  void add(const char* kernel, Devices devices = Devices::kAll) {
    on_cpu_.emplace_back(Op::name);
    cpu_.impl(full_name<Op>().c_str(), TORCH_FN(replacement));
    if (devices == Devices::kCpu || (kernel && !has_cuda_kernel(kernel))) return;
    on_cuda_.emplace_back(Op::name);
    if (kernel)
      cuda_.impl(full_name<Op>().c_str(), TORCH_FN(WhereCompiled<replacement>::kernel));
    else
      cuda_.impl(full_name<Op>().c_str(), TORCH_FN(replacement));
  }
  const std::vector<std::string>& names(bool cuda) const { return cuda ? on_cuda_ : on_cpu_; }

 private:
  static bool has_cuda_kernel(const char* name) {
    const auto op = c10::Dispatcher::singleton().findSchema({name, ""});
    return op && op->hasKernelForDispatchKey(c10::DispatchKey::CUDA);
  }
  template <class Op>
  static std::string full_name() {
    const std::string overload = Op::overload_name;
    return overload.empty() ? std::string(Op::name) : std::string(Op::name) + "." + overload;
  }

  torch::Library cpu_{torch::Library::IMPL, "aten", c10::DispatchKey::AutogradCPU, __FILE__, __LINE__};
  torch::Library cuda_{torch::Library::IMPL, "aten", c10::DispatchKey::AutogradCUDA, __FILE__, __LINE__};
  std::vector<std::string> on_cpu_, on_cuda_;
};

// Calls an operator of robustkern.  The types of the arguments are those of its schema.
template <const char* name, class Result, class... Args>
Result call_operator(const Args&... args) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow(name, "")
          .template typed<Result(std::conditional_t<std::is_trivially_copyable_v<Args>, Args, const Args&>...)>();
  return op.call(args...);
}

}  // namespace rk::aten
