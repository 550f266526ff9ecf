// What this module asks Python, through the limited API alone: one binary serves every version of it.
#pragma once

#include <ATen/core/Tensor.h>

#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030A0000
#endif
#include <Python.h>

#include <exception>
#include <string>
#include <utility>

namespace rk::aten::python {

class WithGil {
 public:
  WithGil() : state_(PyGILState_Ensure()) {}
  ~WithGil() { PyGILState_Release(state_); }
  WithGil(const WithGil&) = delete;
  WithGil& operator=(const WithGil&) = delete;

 private:
  PyGILState_STATE state_;
};

// Without the lock, whether or not this thread holds it.
class WithoutGil {
 public:
  WithoutGil() : saved_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(saved_); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  WithGil held_;  // only a thread that holds it can give it away
  PyThreadState* saved_;
};

// A reference of one's own; made and ended while the lock is held.
class Object {
 public:
  // Takes over what a function of Python's returned; throws its error where it returned none.
  explicit Object(PyObject* owned);
  Object(Object&& other) noexcept : owned_(std::exchange(other.owned_, nullptr)) {}
  Object& operator=(Object&&) = delete;
  ~Object() { Py_XDECREF(owned_); }

  PyObject* get() const { return owned_; }
  Object attribute(const char* name) const { return Object(PyObject_GetAttrString(owned_, name)); }
  Object item(Py_ssize_t i) const { return Object(PySequence_GetItem(owned_, i)); }
  template <class... Arguments>
  Object operator()(Arguments... arguments) const {  // each a PyObject*
    return Object(PyObject_CallFunctionObjArgs(owned_, arguments..., nullptr));
  }
  PyObject* release() { return std::exchange(owned_, nullptr); }
  bool has(const char* name) const { return PyObject_HasAttrString(owned_, name) == 1; }
  bool is_none() const { return owned_ == Py_None; }
  bool is_true() const { return PyObject_IsTrue(owned_) == 1; }
  std::string text() const;

 private:
  PyObject* owned_;
};

// A C function for Python: what `body` makes of its argument or arguments, or its exception as Python's.
template <PyObject* (*body)(PyObject* given)>
PyObject* function(PyObject*, PyObject* given) {
  try {
    return body(given);
  } catch (const std::exception& error) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

inline Object import(const char* module) { return Object(PyImport_ImportModule(module)); }

Object wrap(const at::Tensor& t);     // the Python object of a tensor
at::Tensor unwrap(PyObject* object);  // and back; throws where it is none

}  // namespace rk::aten::python
