// The Python module robustkern._aten: registers the replacements once, and switches them on and off.
#include <ATen/SavedTensorHooks.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/functorch/BatchedTensorImpl.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <atomic>
#include <limits>
#include <memory>
#include <mutex>

#include "cotangents.h"
#include "operators.h"
#include "replacement.h"

namespace py = pybind11;

namespace rk::aten {
namespace {

// robustkern/_library.py reads it from the file: only the PyTorch of this version may load the module.
[[gnu::used]] constexpr char kBuiltWith[] = "robustkern._aten built with PyTorch " RK_TORCH_VERSION;

// Kernels stay registered once they are: taking one out of PyTorch's tables while another thread looks it up would be
// a race, a flag is not.  A call that finds the flag down costs one more jump.
std::atomic<int> scopes{0};
std::atomic<bool> installed{false};
std::atomic<bool> zeros{false};
std::atomic<bool> small{false};
thread_local bool stock = false;

Registrar& registrar() {
  static Registrar* const registered = [] {
    auto r = std::make_unique<Registrar>();
    register_all(*r);
    return r.release();  // outlives PyTorch's own statics
  }();
  return *registered;
}

}  // namespace

bool enabled() { return installed.load(std::memory_order_relaxed) || scopes.load(std::memory_order_relaxed) > 0; }
bool materializes_zeros() { return zeros.load(std::memory_order_relaxed); }
bool however_small() { return small.load(std::memory_order_relaxed); }
bool uses_stock_kernels() { return stock; }

UseStock::UseStock() : before_(stock) { stock = true; }
UseStock::~UseStock() { stock = before_; }

bool runs_on_cuda(c10::DeviceIndex device) {
  enum : signed char { kUnknown, kRuns, kDoesNot };
  static std::array<std::atomic<signed char>, std::numeric_limits<c10::DeviceIndex>::max() + 1> known{};
  auto& answer = known.at(device);
  if (answer == kUnknown) {
    const pybind11::gil_scoped_acquire gil;
    const auto library = pybind11::module_::import("robustkern._library");
    answer = library.attr("runs_on_cuda")(static_cast<int>(device)).cast<bool>() ? kRuns : kDoesNot;
  }
  return answer == kRuns;
}

bool under_functorch_grad() {
  const auto& transforms = at::functorch::functorchTLSAccessor();
  if (!transforms) return false;
  try {
    transforms->checkSupportsCppAutogradFunction();
  } catch (const c10::Error&) {
    return true;
  }
  return false;
}

bool being_compiled(const Tensor& t) {
  return t.key_set().has(c10::DispatchKey::Python) || t.key_set().has(c10::DispatchKey::Functionalize);
}

bool is_known(const Tensor& t) {
  using c10::DispatchKey;
  const auto keys = t.key_set();
  if (t.layout() != at::kStrided || t.is_nested()) return false;
  if (!keys.has(DispatchKey::Python)) return true;
  const py::gil_scoped_acquire gil;
  const std::string type = Py_TYPE(py::cast(t).ptr())->tp_name;
  return type == "FakeTensor" || type == "FunctionalTensor";
}

bool in_checkpoint() {
  if (!at::SavedTensorDefaultHooks::get_hooks()) return false;
  const py::gil_scoped_acquire gil;
  const auto hooks = py::module_::import("torch._C._autograd").attr("_top_saved_tensors_default_hooks")(false);
  if (hooks.is_none()) return false;
  const py::object pack = hooks.cast<py::tuple>()[0];
  return py::getattr(pack, "__module__", py::str()).equal(py::str("torch.utils.checkpoint"));
}

bool is_differentiated(const Tensor& t) {
  if (!t.defined()) return false;
  if (t.key_set().has(c10::DispatchKey::FuncTorchGradWrapper)) return true;
  if (const auto* const batched = at::functorch::maybeGetBatchedImpl(t)) return is_differentiated(batched->value());
  return t._fw_grad(0).defined();
}

}  // namespace rk::aten

PYBIND11_MODULE(_aten, m) {
  using namespace rk::aten;
  m.doc() = "Fused second derivatives for PyTorch's own operators.";
  m.def("install", [] {
    registrar();
    installed.store(true);
  });
  m.def("uninstall", [] { installed.store(false); });
  m.def("is_installed", [] { return installed.load(); });
  m.def("enter", [] {
    registrar();
    ++scopes;
  });
  m.def("leave", [] { --scopes; });
  m.def("enabled", &enabled);
  m.def("materialize_zeros", [](bool value) { return zeros.exchange(value); });
  m.def("however_small", [](bool value) { return small.exchange(value); });
  m.def("folds", &folds);
  m.def("runs_on_cuda", [](int device) { return runs_on_cuda(static_cast<c10::DeviceIndex>(device)); });
  m.def("operators", [](bool cuda) { return registrar().names(cuda); });
}
