// The Python module robustkern._aten: registers the replacements once, and switches them on and off.
#include <memory>

#include "chains.h"
#include "cotangents.h"
#include "operators.h"
#include "python.h"
#include "recomputed.h"

namespace rk::aten {

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

PyObject* none() {
  Py_INCREF(Py_None);
  return Py_None;
}

// The arguments by PyArg_ParseTuple's format; throws where they are others, with Python's error set.
template <class... Out>
void parse(PyObject* arguments, const char* format, Out*... out) {
  TORCH_CHECK(PyArg_ParseTuple(arguments, format, out...), "wrong arguments");
}

bool flag(PyObject* arguments) {
  int value = 0;
  parse(arguments, "p", &value);
  return value != 0;
}

PyObject* install(PyObject*) {
  registrar();
  the_switch.installed = true;
  return none();
}

PyObject* uninstall(PyObject*) {
  the_switch.installed = false;
  return none();
}

PyObject* is_installed(PyObject*) { return PyBool_FromLong(the_switch.installed.load()); }

PyObject* enter(PyObject*) {
  registrar();
  ++the_switch.scopes;
  return none();
}

PyObject* leave(PyObject*) {
  --the_switch.scopes;
  return none();
}

PyObject* enter_gradient(PyObject*) {
  registrar();
  ++the_switch.gradients;
  return none();
}

PyObject* leave_gradient(PyObject*) {
  --the_switch.gradients;
  return none();
}

PyObject* set_save_memory(PyObject* arguments) {
  save_memory(flag(arguments));
  return none();
}

PyObject* enter_saving_memory(PyObject*) {
  enter_saving();
  return none();
}

PyObject* leave_saving_memory(PyObject*) {
  leave_saving();
  return none();
}

PyObject* is_enabled(PyObject*) { return PyBool_FromLong(enabled()); }

PyObject* materialize_zeros(PyObject* arguments) { return PyBool_FromLong(the_switch.zeros.exchange(flag(arguments))); }

PyObject* set_however_small(PyObject* arguments) {
  return PyBool_FromLong(the_switch.however_small.exchange(flag(arguments)));
}

PyObject* folds_to_one(PyObject* arguments) {
  PyObject *outputs = nullptr, *x = nullptr;
  long long cotangents = 0;
  parse(arguments, "OOL", &outputs, &x, &cotangents);
  return PyBool_FromLong(folds(python::unwrap(outputs), python::unwrap(x), cotangents));
}

int64_t integer(const python::Object& number) {
  const long long value = PyLong_AsLongLong(number.get());
  TORCH_CHECK(!PyErr_Occurred(), "expected an integer");
  return value;
}

template <class Read>
auto list(PyObject* sequence, const Read& read) {
  std::vector<decltype(read(std::declval<python::Object>()))> values;
  for (Py_ssize_t i = 0; i < PySequence_Size(sequence); ++i)
    values.push_back(read(python::Object(PySequence_GetItem(sequence, i))));
  return values;
}

Source source(const python::Object& pair) {
  const std::string from = pair.item(0).text();
  const int64_t index = integer(pair.item(1));
  if (from == "ARGUMENT") return {From::kArgument, index};
  if (from == "COTANGENT") return {From::kCotangent, index};
  if (from == "IS_NEEDED") return {From::kIsNeeded, index};
  TORCH_CHECK(from == "LAST_RESULT", "unknown source of an argument: ", from);
  return {From::kLastResult, index};
}

PyObject* differentiate_by(PyObject* arguments) {
  const char *op = nullptr, *next = nullptr;
  PyObject *sources = nullptr, *inputs = nullptr, *flags = nullptr, *only = nullptr;
  parse(arguments, "ssOOOO", &op, &next, &sources, &inputs, &flags, &only);
  std::optional<std::pair<int64_t, int64_t>> condition;
  if (only != Py_None) {
    const auto pair = list(only, integer);
    condition.emplace(pair.at(0), pair.at(1));
  }
  differentiate(op, next, list(sources, source), list(inputs, integer), list(flags, integer), condition);
  return none();
}

PyObject* refuse(PyObject* arguments) {
  const char *op = nullptr, *message = nullptr;
  parse(arguments, "ss", &op, &message);
  refuse_derivatives(op, message);
  return none();
}

PyObject* has_code_for(PyObject* arguments) {
  int device = 0;
  parse(arguments, "i", &device);
  return PyBool_FromLong(runs_on_cuda(static_cast<c10::DeviceIndex>(device)));
}

PyObject* operators(PyObject* arguments) {
  const auto names = registrar().names(flag(arguments));
  python::Object result(PyList_New(0));
  for (const std::string& name : names)
    TORCH_CHECK(PyList_Append(result.get(), python::Object(PyUnicode_FromString(name.c_str())).get()) == 0,
                "no memory");
  return result.release();
}

template <PyObject* (*body)(PyObject* arguments)>
constexpr PyMethodDef method(const char* name) {
  return {name, python::function<body>, METH_VARARGS, nullptr};
}

PyMethodDef methods[] = {
    method<install>("install"),
    method<uninstall>("uninstall"),
    method<is_installed>("is_installed"),
    method<enter>("enter"),
    method<leave>("leave"),
    method<enter_gradient>("enter_gradient"),
    method<leave_gradient>("leave_gradient"),
    method<set_save_memory>("save_memory"),
    method<enter_saving_memory>("enter_saving"),
    method<leave_saving_memory>("leave_saving"),
    method<is_enabled>("enabled"),
    method<materialize_zeros>("materialize_zeros"),
    method<set_however_small>("however_small"),
    method<folds_to_one>("folds"),
    method<differentiate_by>("differentiate"),
    method<refuse>("refuse_derivatives"),
    method<has_code_for>("runs_on_cuda"),
    method<operators>("operators"),
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module{PyModuleDef_HEAD_INIT,
                   "_aten",
                   "Fused second derivatives for PyTorch's own operators.",
                   -1,
                   methods,
                   nullptr,
                   nullptr,
                   nullptr,
                   nullptr};

}  // namespace
}  // namespace rk::aten

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__aten() {
  return PyModule_Create(&rk::aten::module);
}
