// The Python module robustkern._cuda: importing it registers the CUDA kernels; `architectures` names the code it holds,
// such as "sm_90 compute_120".
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030A0000  // one binary for every Python
#endif
#include <Python.h>

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__cuda() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_cuda", "CUDA kernels of robustkern.", -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* const created = PyModule_Create(&module);
  if (created) PyModule_AddStringConstant(created, "architectures", RK_CUDA_ARCHITECTURES);
  return created;
}
