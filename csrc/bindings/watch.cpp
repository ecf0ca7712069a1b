#include "bindings/watch.h"

#include "bindings/tensor_view.h"

namespace py = pybind11;

namespace lamina {
namespace {

int64_t version_of(py::handle tensor, const py::object& name) {
  const auto version = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor.ptr(), name.ptr()));
  if (!version) throw py::error_already_set();
  return PyLong_AsLongLong(version.ptr());
}

}  // namespace

Watch::Watch(py::list dicts, py::list tensors)
    : dicts_(std::move(dicts)),
      tensors_(std::move(tensors)),
      dict_version_(py::module_::import("torch._C._dynamo.guards").attr("dict_version")),
      version_name_(py::str("_version")) {
  for (const py::handle dict : dicts_) dict_versions_.push_back(version_of_dict(dict));
  for (const py::handle tensor : tensors_) {
    places_.push_back(tensor_view_of(tensor).data);
    versions_.push_back(version_of(tensor, version_name_));
  }
}

uint64_t Watch::version_of_dict(py::handle dict) const {
#if PY_VERSION_HEX < 0x030C0000
  return reinterpret_cast<PyDictObject*>(dict.ptr())->ma_version_tag;
#else
  return dict_version_(dict).cast<uint64_t>();  // the field is on its way out; torch knows where it is
#endif
}

bool Watch::changed() const {
  size_t i = 0;
  for (const py::handle dict : dicts_) {
    if (version_of_dict(dict) != dict_versions_[i++]) return true;
  }
  i = 0;
  for (const py::handle tensor : tensors_) {
    if (tensor_view_of(tensor).data != places_[i] || version_of(tensor, version_name_) != versions_[i]) return true;
    ++i;
  }
  return false;
}

void define_watch(py::module_& m) {
  py::class_<Watch>(m, "Watch")
      .def(py::init<py::list, py::list>(), py::arg("dicts"), py::arg("tensors"))
      .def("changed", &Watch::changed);
}

}  // namespace lamina
