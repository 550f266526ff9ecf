// The Python module robustkern._aten: registers the replacements once, and switches them on and off.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>

#include "chains.h"
#include "cotangents.h"
#include "operators.h"

namespace rk::aten {

void bind_recomputed(pybind11::module_& m);  // recomputed.cpp

namespace {

// robustkern/_library.py reads it from the file: only the PyTorch of this version may load the module.
[[gnu::used]] constexpr char kBuiltWith[] = "robustkern._aten built with PyTorch " RK_TORCH_VERSION;

Registrar& registrar() {
  static Registrar* const registered = [] {
    auto r = std::make_unique<Registrar>();
    register_all(*r);
    return r.release();  // outlives PyTorch's own statics
  }();
  return *registered;
}

}  // namespace
}  // namespace rk::aten

PYBIND11_MODULE(_aten, m) {
  using namespace rk::aten;
  m.doc() = "Fused second derivatives for PyTorch's own operators.";
  m.def("install", [] {
    registrar();
    the_switch.installed = true;
  });
  m.def("uninstall", [] { the_switch.installed = false; });
  m.def("is_installed", [] { return the_switch.installed.load(); });
  m.def("enter", [] {
    registrar();
    ++the_switch.scopes;
  });
  m.def("leave", [] { --the_switch.scopes; });
  m.def("enabled", &enabled);
  m.def("materialize_zeros", [](bool value) { return the_switch.zeros.exchange(value); });
  m.def("however_small", [](bool value) { return the_switch.however_small.exchange(value); });
  m.def("folds", &folds);
  bind_recomputed(m);
  py::enum_<From>(m, "From")
      .value("ARGUMENT", From::kArgument)
      .value("COTANGENT", From::kCotangent)
      .value("IS_NEEDED", From::kIsNeeded)
      .value("LAST_RESULT", From::kLastResult);
  m.def("differentiate", &differentiate);
  m.def("refuse_derivatives", &refuse_derivatives);
  m.def("runs_on_cuda", [](int device) { return runs_on_cuda(static_cast<c10::DeviceIndex>(device)); });
  m.def("operators", [](bool cuda) { return registrar().names(cuda); });
}
