#include "bindings/dispatcher.h"

#include <pybind11/gil_safe_call_once.h>

namespace py = pybind11;

namespace lamina {
namespace {

// What is asked of torch, looked up once and never released: it lives as long as the interpreter.
struct Torch {
  bool known = false;
  PyObject* tensor = nullptr;
  PyObject* parameter = nullptr;
  PyObject* size = nullptr;
  PyObject* dtype = nullptr;
  PyObject* is_neg = nullptr;  // the method of Tensor, unbound
  PyObject* is_cpu_name = nullptr;
  // Each gives 0, None or False when nobody watches.
  PyObject* watchers[5] = {};

  Torch() {
    try {
      const auto of = [](const char* module, const char* name) {
        return py::module_::import(module).attr(name).cast<py::object>().release().ptr();
      };
      tensor = of("torch", "Tensor");
      parameter = of("torch.nn", "Parameter");
      size = of("torch", "Size");
      dtype = of("torch", "dtype");
      is_neg = py::handle(tensor).attr("is_neg").cast<py::object>().release().ptr();
      is_cpu_name = py::str("is_cpu").release().ptr();
      watchers[0] = of("torch._C", "_len_torch_dispatch_stack");
      watchers[1] = of("torch._C", "_len_torch_function_stack");
      watchers[2] = of("torch._C._functorch", "peek_interpreter_stack");
      watchers[3] = of("torch._C", "_get_tracing_state");
      watchers[4] = of("torch._C._autograd", "_profiler_enabled");
      known = true;
    } catch (py::error_already_set&) {
      // A torch without one of these: every call goes through its dispatcher.
    }
  }
};

// Whether `result`, a new reference or null for an exception, is 0, None or False.
bool is_nothing(PyObject* result) {
  const auto object = py::reinterpret_steal<py::object>(result);
  if (!object) throw py::error_already_set();
  const int truth = PyObject_IsTrue(object.ptr());
  if (truth < 0) throw py::error_already_set();
  return truth == 0;
}

bool is_plain(PyObject* object, const Torch& torch) {
  const PyTypeObject* type = Py_TYPE(object);
  const PyObject* type_object = reinterpret_cast<const PyObject*>(type);
  if (type_object == torch.tensor || type_object == torch.parameter) {
    return !is_nothing(PyObject_GetAttr(object, torch.is_cpu_name)) &&
           is_nothing(PyObject_CallOneArg(torch.is_neg, object));
  }
  if (type == &PyTuple_Type || type == &PyList_Type) {
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(object); ++i) {
      if (!is_plain(PySequence_Fast_GET_ITEM(object, i), torch)) return false;
    }
    return true;
  }
  return object == Py_None || type == &PyBool_Type || type == &PyLong_Type || type == &PyFloat_Type ||
         type == &PyUnicode_Type || type_object == torch.size || type_object == torch.dtype;
}

}  // namespace

bool skips_dispatcher(const py::tuple& arguments) {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Torch> storage;
  const Torch& torch = storage.call_once_and_store_result([] { return Torch(); }).get_stored();
  if (!torch.known) return false;
  for (PyObject* watcher : torch.watchers) {
    if (!is_nothing(PyObject_CallNoArgs(watcher))) return false;
  }
  return is_plain(arguments.ptr(), torch);
}

}  // namespace lamina
