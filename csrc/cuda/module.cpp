// The Python module robustkern._cuda: importing it registers the CUDA kernels.  It has no functions of its own.
#include <Python.h>

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__cuda() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_cuda", "CUDA kernels of robustkern.", -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
