#include "recomputed.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/utils/pybind.h>

#include <atomic>
#include <memory>
#include <string>
#include <unordered_map>
#include <unordered_set>

#include "cotangents.h"
#include "kernels/matmul_cpu.h"
#include "replacement.h"

namespace py = pybind11;

namespace rk::aten {
namespace {

using torch::autograd::Node;
using NodePointer =
    std::decay_t<decltype(std::declval<Tensor>().grad_fn())>;  // whose type depends on the version of PyTorch

std::atomic<bool> installed{false};  // by install()
std::atomic<int> scopes{0};          // of fused_double_backward()
thread_local Keep keeping = Keep::kValues;
thread_local const c10::TensorImpl* argument =
    nullptr;  // of the call at hand, which only the gradient of its weight reads

std::unordered_map<std::type_index, Again>& known() {
  static std::unordered_map<std::type_index, Again> nodes;
  return nodes;
}

// ------------------------------------------------------------------ making a node's results again

// Views of all elements.
bool is_view(const Node& node) {
  static const std::unordered_set<std::string> names{
      "AliasBackward0",   "PermuteBackward0", "ReshapeAliasBackward0", "SqueezeBackward0",    "SqueezeBackward1",
      "SqueezeBackward2", "TBackward0",       "TransposeBackward0",    "UnsafeViewBackward0", "UnsqueezeBackward0",
      "ViewBackward0"};
  return node.num_outputs() == 1 && names.count(node.name()) > 0;
}
bool is_named(const Node& node, const char* name) { return node.name() == name; }
bool is_relu(const Node& node) { return is_named(node, "ReluBackward0"); }

// What PyTorch's own node keeps; None if it does not.
template <class T>
std::optional<T> kept_by(const NodePointer& node, const char* name) {
  const py::gil_scoped_acquire gil;
  const auto object = py::reinterpret_steal<py::object>(torch::autograd::functionToPyObject(node));
  const py::object value = py::getattr(object, name, py::none());
  return value.is_none() ? std::nullopt : std::optional<T>(value.cast<T>());
}

using Edge = torch::autograd::Edge;

// PyTorch's own nodes: what they are made of can be made again, or is kept.
bool can_be_made_again(const Edge& edge) {
  if (!edge.function) return false;
  Node& node = *edge.function;
  if (is_relu(node)) return !is_relu(*node.next_edge(0).function) && can_be_made_again(node.next_edge(0));
  if (is_named(node, "PermuteBackward0")) return can_be_made_again(node.next_edge(0));
  if (is_named(node, "StackBackward0"))
    return std::all_of(node.next_edges().begin(), node.next_edges().end(), can_be_made_again);
  if (is_named(node, "MulBackward0"))
    return kept_by<Tensor>(edge.function, "_saved_self") && kept_by<Tensor>(edge.function, "_saved_other");
  const auto found = known().find(typeid(node));
  return found != known().end() && edge.input_nr < found->second.results && found->second.can(node);
}

Tensor made_again(const Edge& edge) {
  Node& node = *edge.function;
  if (is_relu(node)) return made_again(node.next_edge(0)).relu_();
  if (is_named(node, "PermuteBackward0")) {
    const auto dims =
        kept_by<std::vector<uint64_t>>(edge.function, "_saved_dims").value();  // negative ones wrap around
    return made_again(node.next_edge(0)).permute(std::vector<int64_t>(dims.begin(), dims.end()));
  }
  if (is_named(node, "StackBackward0")) {
    std::unordered_map<const Node*, variable_list> results;  // of one node often all that is stacked
    variable_list parts;
    for (const auto& [function, number] : node.next_edges()) {
      const auto own = known().find(typeid(*function));
      if (own == known().end()) {
        parts.push_back(made_again({function, number}));
        continue;
      }
      auto& all = results[function.get()];
      if (all.empty()) all = own->second.run(*function);
      parts.push_back(all[number]);
    }
    return at::stack(parts, static_cast<int64_t>(kept_by<uint64_t>(edge.function, "_saved_dim").value()));
  }
  if (is_named(node, "MulBackward0"))
    return at::mul(kept_by<Tensor>(edge.function, "_saved_self").value(),
                   kept_by<Tensor>(edge.function, "_saved_other").value());
  return known().at(typeid(node)).run(node)[edge.input_nr];
}

// ------------------------------------------------------------------ what is kept in a tensor's place

class InPlace {
 public:
  virtual ~InPlace() = default;
  virtual Tensor tensor() const = 0;
};

// PyTorch's nodes unpack all that they keep, whatever is asked of them.  Whether the gradient of the weight is, which alone
// reads the values of the argument, in the pass at hand.
bool reads_argument() {
  static const std::unordered_map<std::string, size_t> weights{
      {"ConvolutionBackward0", 1}, {"AddmmBackward0", 2}, {"MmBackward0", 1}};
  const auto node = torch::autograd::get_current_node();
  if (!node) return true;
  const auto weight = weights.find(node->name());
  return weight == weights.end() || node->task_should_compute_output(weight->second);
}

// The tensor itself: hooks leave it to us to notice that it was overwritten.
class Whole final : public InPlace {
 public:
  explicit Whole(const Tensor& t) : tensor_(t.detach()), version_(t._version()) {}
  Tensor tensor() const override {
    TORCH_CHECK(tensor_._version() == version_,
                "one of the variables needed for gradient computation has been modified by an inplace operation: a ",
                tensor_.toString(), " of shape ", tensor_.sizes(), " is at version ", tensor_._version(),
                "; expected version ", version_, " instead.");
    return tensor_;
  }

 private:
  Tensor tensor_;
  int64_t version_;
};

// Ones where it is positive or no number, and zeros.
class Signs final : public InPlace {
 public:
  explicit Signs(const Tensor& t) : positive_(t.le(0).logical_not_()), dtype_(t.scalar_type()) {}
  Tensor tensor() const override { return positive_.to(dtype_); }

 private:
  Tensor positive_;
  at::ScalarType dtype_;
};

// The tensor is a view of what is made again, or of a contiguous copy of that.
class Made final : public InPlace {
 public:
  Made(Edge edge, bool copied, const Tensor& t)
      : edge_(std::move(edge)),
        copied_(copied),
        is_argument_(t.unsafeGetTensorImpl() == argument),
        options_(t.options()),
        sizes_(t.sizes().vec()),
        strides_(t.strides().vec()),
        offset_(t.storage_offset()) {}
  Tensor tensor() const override {
    const at::AutoDispatchBelowADInplaceOrView below;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    if (is_argument_ && !reads_argument()) return at::empty_strided(sizes_, strides_, options_);
    const Tensor base = made_again(edge_);
    return (copied_ ? base.contiguous() : base).as_strided(sizes_, strides_, offset_);
  }

 private:
  Edge edge_;
  bool copied_, is_argument_;
  at::TensorOptions options_;
  std::vector<int64_t> sizes_, strides_;
  int64_t offset_;
};

using Pointer = std::shared_ptr<InPlace>;

// What was given out last: if it is kept again, as a first backward keeps what the forward kept, then as before.
struct GivenOut {
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  std::weak_ptr<InPlace> in_place;  // no part of a graph lives on here
};
thread_local std::vector<GivenOut> given_out;
constexpr size_t kRemembered = 4;

void remember(const Tensor& t, const Pointer& in_place) {
  if (given_out.size() == kRemembered) given_out.erase(given_out.begin());
  given_out.push_back({c10::weak_intrusive_ptr<c10::StorageImpl>(t.storage().getWeakStorageImpl()), in_place});
}

Pointer in_place_of(const Tensor& t) {
  if (!is_plain(t) || is_batched(t) || t.layout() != at::kStrided || !t.storage()) return std::make_shared<Whole>(t);
  const auto* const storage = t.storage().unsafeGetStorageImpl();
  for (const auto& other : given_out)
    if (const auto alive = other.storage.lock(); alive && alive.get() == storage)
      if (auto in_place = other.in_place.lock()) return in_place;
  if (keeping == Keep::kSigns) return std::make_shared<Signs>(t);
  if (t.storage().nbytes() != static_cast<size_t>(t.numel()) * t.itemsize()) return std::make_shared<Whole>(t);
  Edge edge(t.grad_fn(), static_cast<uint32_t>(t.output_nr()));
  bool reshaped = false, copied = false;
  while (edge.function && is_view(*edge.function)) {
    reshaped = is_named(*edge.function, "UnsafeViewBackward0");
    edge = Edge(edge.function->next_edge(0));
  }
  if (reshaped && edge.function && is_named(*edge.function, "CloneBackward0")) {  // of reshape(), hence contiguous
    copied = true;
    edge = Edge(edge.function->next_edge(0));
  }
  // Overwritten, but for a ReLU in place, it is not what the node made.
  const bool untouched = edge.function && t._version() <= (is_relu(*edge.function) ? 1 : 0);
  if (untouched && can_be_made_again(edge)) return std::make_shared<Made>(std::move(edge), copied, t);
  return std::make_shared<Whole>(t);
}

Tensor tensor_of(const Pointer& in_place) {
  const at::NoGradGuard no_grad;
  const OutsideTransforms guard;
  Tensor t = in_place->tensor();
  if (!dynamic_cast<Whole*>(in_place.get())) remember(t, in_place);
  return t;
}

// ------------------------------------------------------------------ the hooks

struct Hooks {
  py::object push, pop, pack, unpack;
};

const Hooks& hooks() {  // with the GIL
  static const Hooks* const made = [] {
    const auto autograd = py::module_::import("torch._C._autograd");
    return new Hooks{
        autograd.attr("_push_saved_tensors_default_hooks"), autograd.attr("_pop_saved_tensors_default_hooks"),
        py::cpp_function([](const Tensor& t) { return in_place_of(t); }), py::cpp_function([](const Pointer& in_place) {
          const py::gil_scoped_release release;
          return tensor_of(in_place);
        })};
  }();
  return *made;
}

bool hooks_are_free() {
  return at::SavedTensorDefaultHooks::is_enabled() && !at::SavedTensorDefaultHooks::get_hooks(true) &&
         !at::SavedTensorDefaultHooks::get_tls_state().is_tracing;
}

}  // namespace

bool saves_memory() { return installed.load(std::memory_order_relaxed) || scopes.load(std::memory_order_relaxed) > 0; }

KeepLess::KeepLess(const Tensor& kept, Keep what)
    : active_(saves_memory() && at::GradMode::is_enabled() && is_plain(kept) && !is_batched(kept) && hooks_are_free()),
      before_(keeping),
      argument_before_(argument) {
  if (!active_) return;
  keeping = what;
  argument = what == Keep::kArgument ? kept.unsafeGetTensorImpl() : nullptr;
  const py::gil_scoped_acquire gil;
  hooks().push(hooks().pack, hooks().unpack);
}

KeepLess::~KeepLess() {
  if (!active_) return;
  keeping = before_;
  argument = argument_before_;
  const py::gil_scoped_acquire gil;
  hooks().pop();
}

void add_again(std::type_index node, Again again) { known()[node] = again; }

namespace {

std::optional<Tensor> convolution(const Tensor& x, const Tensor& w, const std::optional<Tensor>& b,
                                  c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                                  bool transposed, c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  const KeepLess less(x, x.is_same(w) ? Keep::kValues : Keep::kArgument);
  const UseStock stock;
  return at::convolution_symint(x, w, b, stride, padding, dilation, transposed, output_padding, groups);
}

std::optional<Tensor> addmm(const Tensor& c, const Tensor& a, const Tensor& b, const at::Scalar& beta,
                            const at::Scalar& alpha) {
  const KeepLess less(a, a.is_same(b) ? Keep::kValues : Keep::kArgument);
  const UseStock stock;
  return at::addmm(c, a, b, beta, alpha);
}

std::optional<Tensor> mm(const Tensor& a, const Tensor& b) {
  const KeepLess less(a, a.is_same(b) ? Keep::kValues : Keep::kArgument);
  const UseStock stock;
  return at::mm(a, b);
}

std::optional<Tensor> relu(const Tensor& x) {
  const KeepLess less(x, Keep::kSigns);
  const UseStock stock;
  return at::relu(x);
}

Tensor* relu_(Tensor& x) {
  const KeepLess less(x, Keep::kSigns);
  const UseStock stock;
  at::relu_(x);
  return &x;
}

// Registered when memory is saved for the first time: until then these calls stay PyTorch's, without a detour.
struct Registered {
  Registered() {
    for (torch::Library* const library : {&cpu, &cuda}) {
      add<at::_ops::convolution, convolution>(*library, "aten::convolution");
      add<at::_ops::addmm, addmm>(*library, "aten::addmm");
      add<at::_ops::relu, relu>(*library, "aten::relu");
      add<at::_ops::relu_, relu_>(*library, "aten::relu_");
      // On the CPU matmul.cpp may have it.
      if (library == &cuda || !has_faster_matmul()) add<at::_ops::mm, mm>(*library, "aten::mm");
    }
  }
  template <class Op, typename Replacement<Op>::Function ours>
  static void add(torch::Library& library, const char* name) {
    library.impl(name, TORCH_FN((Replacement<Op>::template kernel<Kind::kForward, ours>)));
  }
  torch::Library cpu{torch::Library::IMPL, "aten", c10::DispatchKey::AutogradCPU, __FILE__, __LINE__};
  torch::Library cuda{torch::Library::IMPL, "aten", c10::DispatchKey::AutogradCUDA, __FILE__, __LINE__};
};

void register_once() {
  static const auto* const registered = new Registered;  // outlives PyTorch's own statics
  (void)registered;
}

}  // namespace

void bind_recomputed(py::module_& m) {
  py::class_<InPlace, std::shared_ptr<InPlace>>(m, "InPlace");
  m.def("save_memory", [](bool value) {
    if (value) register_once();
    installed = value;
  });
  m.def("enter_saving", [] {
    register_once();
    ++scopes;
  });
  m.def("leave_saving", [] { --scopes; });
}

}  // namespace rk::aten
