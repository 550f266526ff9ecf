// Replaces the autograd kernel of one of PyTorch's own operators.
//
// A replacement is registered at AutogradCPU and AutogradCUDA, beside PyTorch's kernel, which stands at the alias key
// Autograd and stays reachable through AutogradOther.  It does its own work only where a graph is being built that can
// be differentiated again; every other call goes to PyTorch's kernel at once:
//
//     Tensor gelu_backward(const Tensor& grad, const Tensor& x, c10::string_view approximate) { ... Function::apply }
//     void register_activations(Registrar& r) { r.replace<at::_ops::gelu_backward, gelu_backward>(); }
//
// What a replacement's Function does:
//   forward    runs the operator below autograd and saves its inputs; returns defined tensors only
//   backward   the fused operator, called below autograd; or, where its result is differentiated again (composes()), the
//              same formula in differentiable operators.
#pragma once

#include <ATen/ATen.h>
#include <ATen/FuncTorchTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/PythonDispatcherTLS.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <bit>
#include <functional>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

namespace rk::aten {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

bool enabled();               // robustkern.install() or a scope of fused_double_backward() is in force
bool however_small();         // fused derivatives also where PyTorch's are faster: for tests
bool materializes_zeros();    // derivatives that are identically zero come as zeros rather than as None
bool uses_stock_kernels();    // inside a UseStock
bool under_functorch_grad();  // a torch.func transform that differentiates is running: Function::apply would refuse
bool runs_on_cuda(c10::DeviceIndex device);  // robustkern._cuda holds code for this GPU; says once if not
bool being_compiled(const Tensor& t);        // a fake or functional tensor: torch.compile or make_fx is tracing
// A tensor with memory or a shape of its own.  Not a subclass that answers for itself (DTensor and whatever else has a
// __torch_dispatch__), nor nested, nor sparse: those know PyTorch's operators only.
bool is_known(const Tensor& t);
// A torch.utils.checkpoint is recording or repeating what it runs: both have to save the same tensors, whether or not
// second derivatives are replaced by then.
bool in_checkpoint();
// Carries more than numbers: a tangent of forward mode, or a level of a torch.func transform that differentiates.  A kernel
// would lose it, so whatever is given such a cotangent is computed in differentiable operators.
bool is_differentiated(const Tensor& t);

// PyTorch's own kernels for every operator called on this thread while in scope.
class UseStock {
 public:
  UseStock();
  ~UseStock();
  UseStock(const UseStock&) = delete;
  UseStock& operator=(const UseStock&) = delete;

 private:
  bool before_;
};

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

namespace detail {

inline bool wants_grad(const Tensor& t) { return t.defined() && t.requires_grad(); }
inline bool wants_grad(const std::optional<Tensor>& t) { return t && wants_grad(*t); }
template <class T>
bool wants_grad(const T&) {
  return false;
}

inline bool is_known(const Tensor& t) { return !t.defined() || rk::aten::is_known(t); }
inline bool is_known(const std::optional<Tensor>& t) { return !t || is_known(*t); }
template <class T>
bool is_known(const T&) {
  return true;
}

// PyTorch calls some backwards without a cotangent, and gets nothing back.
template <class First, class... Rest>
bool has_cotangent(const First& first, const Rest&...) {
  if constexpr (std::is_same_v<First, Tensor>)
    return first.defined();
  else
    return true;
}

inline bool has_tangent(const Tensor& t) { return t.defined() && t._fw_grad(0).defined(); }
inline bool has_tangent(const std::optional<Tensor>& t) { return t && has_tangent(*t); }
template <class T>
bool has_tangent(const T&) {
  return false;
}

}  // namespace detail

// Whether this call builds a graph that a fused second derivative can serve.
template <class... Args>
bool serves(const Args&... args) {
  return enabled() && at::GradMode::is_enabled() && (detail::wants_grad(args) || ...) && !uses_stock_kernels() &&
         !under_functorch_grad() && !(detail::has_tangent(args) || ...) && (detail::is_known(args) && ...) &&
         detail::has_cotangent(args...);
}

template <class Op, class Schema = typename Op::schema>
struct Replacement;

template <class Op, class R, class... Args>
struct Replacement<Op, R(Args...)> {
  // A forward saves what PyTorch's does, or leaves it to that: see saves_through_hooks().
  template <R (*ours)(Args...)>
  static R forward_kernel(c10::DispatchKeySet keys, Args... args) {
    if (serves(args...)) return ours(std::forward<Args>(args)...);
    return Op::redispatch(stock_keys<Op>(keys), std::forward<Args>(args)...);
  }
  template <R (*ours)(Args...)>
  static R kernel(c10::DispatchKeySet keys, Args... args) {
    if (serves(args...) && !in_checkpoint()) return ours(std::forward<Args>(args)...);
    return Op::redispatch(stock_keys<Op>(keys), std::forward<Args>(args)...);
  }

  // For an operator without a derivative in PyTorch (silu_backward).  At AutogradOther stands its decomposition, which
  // can be differentiated, and which is needed only for that.
  template <R (*ours)(Args...)>
  static R decomposed_kernel(c10::DispatchKeySet keys, Args... args) {
    if (serves(args...) && !in_checkpoint()) return ours(std::forward<Args>(args)...);
    const bool differentiable = (at::GradMode::is_enabled() && (detail::wants_grad(args) || ...)) ||
                                (detail::has_tangent(args) || ...) || under_functorch_grad();
    return Op::redispatch(differentiable ? stock_keys<Op>(keys) : keys & c10::after_autograd_keyset,
                          std::forward<Args>(args)...);
  }
};

namespace detail {

inline bool lacks_image(const Tensor& t) { return t.defined() && t.is_cuda() && !runs_on_cuda(t.get_device()); }
inline bool lacks_image(const std::optional<Tensor>& t) { return t && lacks_image(*t); }
template <class T>
bool lacks_image(const T&) {
  return false;
}

}  // namespace detail

// A replacement that calls our kernels, for CUDA: PyTorch's own on a GPU that they were not compiled for.
template <auto replacement, class Signature = decltype(replacement)>
struct WhereCompiled;

template <auto replacement, class R, class... Args>
struct WhereCompiled<replacement, R (*)(c10::DispatchKeySet, Args...)> {
  static R kernel(c10::DispatchKeySet keys, Args... args) {
    if (!(detail::lacks_image(args) || ...)) return replacement(keys, std::forward<Args>(args)...);
    const UseStock stock;
    return replacement(keys, std::forward<Args>(args)...);
  }
};

// For a replacement that CUDA has no use for: no operator has this name.
constexpr char kOnCpuOnly[] = "robustkern::none";

// Registers replacements; they live until the process ends and are idle while !enabled().
class Registrar {
 public:
  // On CUDA only if `kernel`, the operator of robustkern that the replacement calls, has a kernel there: where the CUDA
  // extension is not built, PyTorch's own derivative stays.  None: written in PyTorch's operators.
  template <class Op, auto ours>
  void replace(const char* kernel = nullptr) {
    add<Op, Replacement<Op>::template kernel<ours>>(kernel);
  }
  template <class Op, auto ours>
  void replace_forward(const char* kernel = nullptr) {
    add<Op, Replacement<Op>::template forward_kernel<ours>>(kernel);
  }
  template <class Op, auto ours>
  void replace_decomposed(const char* kernel = nullptr) {
    add<Op, Replacement<Op>::template decomposed_kernel<ours>>(kernel);
  }
  // A kernel that decides by itself which calls it serves.
  template <class Op, auto replacement>
  void add(const char* kernel = nullptr) {
    on_cpu_.emplace_back(Op::name);
    cpu_.impl(full_name<Op>().c_str(), TORCH_FN(replacement));
    if (kernel && !has_cuda_kernel(kernel)) return;
    on_cuda_.emplace_back(Op::name);
    if (kernel) {
      cuda_.impl(full_name<Op>().c_str(), TORCH_FN(WhereCompiled<replacement>::kernel));
    } else {
      cuda_.impl(full_name<Op>().c_str(), TORCH_FN(replacement));
    }
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

// Whether a second backward with these cotangents is differentiated itself, backwards, for a third order, or forwards; or
// is for operators that the cotangents know.
inline bool composes(const variable_list& cotangents) {
  return at::GradMode::is_enabled() || std::any_of(cotangents.begin(), cotangents.end(), [](const Tensor& t) {
           return t.defined() && (is_differentiated(t) || !is_known(t));
         });
}

// Whether a backward is run not by its node but by what compiled autograd has made of one: that adds up the results
// without asking whether they are defined, so that zeros must be tensors there.
inline bool in_compiled_autograd() { return !torch::autograd::get_current_node(); }

// What a Function keeps besides tensors, written and read in the same order.  All in one entry: many of them take longer
// than the kernels of a small layer.
class Kept {
 public:
  Kept() = default;
  explicit Kept(AutogradContext* ctx) : values_(ctx->saved_data["kept"].toSymIntVector()) {}
  void save(AutogradContext* ctx) const { ctx->saved_data["kept"] = c10::IValue(SymIntArrayRef(values_)); }

  Kept& put(const SymInt& value) {
    values_.push_back(value);
    return *this;
  }
  Kept& put_number(double value) {
    const auto bits = std::bit_cast<uint64_t>(value);  // in halves, which every SymInt holds
    return put(static_cast<int64_t>(bits >> 32)).put(static_cast<int64_t>(bits & 0xffffffff));
  }
  Kept& put_list(SymIntArrayRef list) {
    put(static_cast<int64_t>(list.size()));
    values_.insert(values_.end(), list.begin(), list.end());
    return *this;
  }

  SymInt symbol() { return values_[next_++]; }
  int64_t integer() { return symbol().expect_int(); }
  bool flag() { return integer() != 0; }
  double number() {
    const auto high = static_cast<uint64_t>(integer());
    return std::bit_cast<double>(high << 32 | static_cast<uint64_t>(integer()));
  }
  std::vector<SymInt> list() {
    const auto begin = values_.begin() + static_cast<int64_t>(next_ + 1), end = begin + integer();
    next_ = static_cast<size_t>(end - values_.begin());
    return {begin, end};
  }

 private:
  std::vector<SymInt> values_;
  size_t next_ = 0;
};

// Which of its tensor inputs a Function was given, for a graph that does not keep them all.
inline int64_t given_bits(std::initializer_list<bool> given) {
  int64_t bits = 0, bit = 1;
  for (const bool one : given) {
    if (one) bits |= bit;
    bit <<= 1;
  }
  return bits;
}

// In the Function's backward: whether the gradient of each of them is asked for.
template <size_t N>
std::array<bool, N> asked(AutogradContext* ctx, int64_t given) {
  std::array<bool, N> result{};
  for (size_t i = 0, edge = 0; i < N; ++i)  // as Function::apply counts, which skips what is absent
    if (given & int64_t{1} << i) result[i] = ctx->needs_input_grad(edge++);
  return result;
}

// Zeros, like `like`, for the gradients that are asked for and that a backward left undefined, where that is no way to say
// zero.
template <size_t N>
void fill_for_compiled_autograd(const std::array<bool, N>& asked, variable_list& grads, const variable_list& like) {
  if (!in_compiled_autograd()) return;
  for (size_t i = 0; i < N; ++i)
    if (asked[i] && !grads[i].defined()) grads[i] = at::zeros_like(like[i]);
}

// Without autograd's keys where nothing is to be differentiated: PyTorch's own kernels at once.
class BelowAutogradIf {
 public:
  explicit BelowAutogradIf(bool condition) {
    if (condition) guard_.emplace();
  }

 private:
  std::optional<at::AutoDispatchBelowADInplaceOrView> guard_;
};
inline bool is_final(const Tensor& g) {
  return !at::GradMode::is_enabled() && !is_differentiated(g) && !g.key_set().has(c10::DispatchKey::FuncTorchBatched);
}

// Undefined if absent.
inline Tensor optional_value(const std::optional<Tensor>& t) { return t.value_or(Tensor()); }

// Whether fused kernels can read `t`: a strided tensor of one of their dtypes, that holds numbers.
inline bool is_plain(const Tensor& t) {
  const auto dtype = t.scalar_type();
  return is_known(t) && !being_compiled(t) &&
         (dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16);
}

// Stands for many tensors, one for each cotangent: a Function would attach its graph to what stands for them, where it is
// lost.  An operator called through the dispatcher is called for each of them.
inline bool is_batched(const Tensor& t) {
  return t.key_set().has(c10::DispatchKey::Batched) || t.key_set().has(c10::DispatchKey::FuncTorchBatched);
}

// Whether PyTorch's own derivative of a tensor of so few elements is as fast: what a graph of ours costs more than PyTorch's,
// a microsecond or two, is then all that is left of the difference.  Not for what is traced, of which nobody knows how large it
// will be.
inline bool is_small(const Tensor& t, int64_t limit) {
  return t.is_cpu() && !being_compiled(t) && !c10::impl::dispatch_mode_enabled() && t.numel() < limit &&
         !however_small();
}

// float32 for 16- and 32-bit data, float64 for float64.
inline at::ScalarType accumulation_type(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}
inline std::optional<Tensor> in_accumulation_type(const Tensor& t, at::ScalarType data) {
  return t.defined() ? std::make_optional(t.to(accumulation_type(data))) : std::nullopt;
}

}  // namespace rk::aten
