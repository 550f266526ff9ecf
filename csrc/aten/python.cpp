#include "python.h"

#include <c10/core/TensorImpl.h>
#include <torch/csrc/Export.h>

// Of torch/csrc/autograd/python_variable.h, which brings what no limited API has.
TORCH_PYTHON_API PyObject* THPVariable_Wrap(const at::TensorBase& var);

namespace rk::aten::python {

Object::Object(PyObject* owned) : owned_(owned) {
  if (owned) return;
  PyObject *type = nullptr, *value = nullptr, *traceback = nullptr;
  PyErr_Fetch(&type, &value, &traceback);
  PyObject* const said = value ? PyObject_Str(value) : nullptr;
  const std::string message = said ? Object(said).text() : "a call into Python failed";
  Py_XDECREF(type);
  Py_XDECREF(value);
  Py_XDECREF(traceback);
  PyErr_Clear();
  TORCH_CHECK(false, message);
}

std::string Object::text() const {
  Py_ssize_t size = 0;
  const char* const utf8 = PyUnicode_AsUTF8AndSize(owned_, &size);
  if (utf8) return {utf8, static_cast<size_t>(size)};
  PyErr_Clear();
  return "";
}

Object wrap(const at::Tensor& t) { return Object(THPVariable_Wrap(t)); }

at::Tensor unwrap(PyObject* object) {
  const Object address(PyObject_GetAttrString(object, "_cdata"));
  void* const tensor = PyLong_AsVoidPtr(address.get());
  TORCH_CHECK(tensor, "expected a tensor");
  return at::Tensor(
      c10::intrusive_ptr<c10::TensorImpl>::unsafe_reclaim_from_nonowning(static_cast<c10::TensorImpl*>(tensor)));
}

}  // namespace rk::aten::python
