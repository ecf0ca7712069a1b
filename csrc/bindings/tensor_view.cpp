#include "bindings/tensor_view.h"

#include <string>
#include <unordered_map>
#include <vector>

#include "bindings/dlpack.h"
#include "bindings/recorder.h"

namespace py = pybind11;

namespace lamina {
namespace {

// The exchange table of a tensor type, or null. Types are remembered, and kept alive, since the lookup is by name.
const dlpack::ExchangeApi* exchange_api_of(PyTypeObject* type) {
  static auto& known = *new std::unordered_map<PyTypeObject*, const dlpack::ExchangeApi*>();
  const auto found = known.find(type);
  if (found != known.end()) return found->second;

  const dlpack::ExchangeApi* api = nullptr;
  const auto capsule = py::reinterpret_steal<py::object>(
      PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__"));
  if (capsule) {
    api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!api) throw py::error_already_set();
    while (api && api->version.major > 1) api = api->previous;
    if (api && (api->version.major != 1 || !api->tensor_from_object)) api = nullptr;
  } else {
    PyErr_Clear();
  }
  Py_INCREF(type);
  known.emplace(type, api);
  return api;
}

DType dtype_of(dlpack::DataType type) {
  if (type.lanes != 1) return DType::other;
  switch (type.code) {
    case dlpack::kFloat:
      if (type.bits == 16) return DType::float16;
      if (type.bits == 32) return DType::float32;
      if (type.bits == 64) return DType::float64;
      break;
    case dlpack::kBfloat:
      if (type.bits == 16) return DType::bfloat16;
      break;
    case dlpack::kInt:
      if (type.bits == 8) return DType::int8;
      if (type.bits == 16) return DType::int16;
      if (type.bits == 32) return DType::int32;
      if (type.bits == 64) return DType::int64;
      break;
    case dlpack::kUInt:
      if (type.bits == 8) return DType::uint8;
      break;
    case dlpack::kBool:
      if (type.bits == 8) return DType::boolean;
      break;
  }
  return DType::other;
}

// Keeps `object` alive until the bound function has returned.
void keep_for_call(const py::object& object) { py::detail::loader_life_support::add_patient(object); }

// Wherever its data is.
TensorView layout_of(const dlpack::Tensor& t) {
  TensorView view;
  view.ndim = t.ndim;
  view.shape = t.shape;
  view.strides = t.strides;
  view.dtype = dtype_of(t.dtype);
  if (!t.strides && t.ndim > 0) {
    std::vector<int64_t> strides(t.ndim, 1);
    for (int i = t.ndim - 2; i >= 0; --i) strides[i] = strides[i + 1] * t.shape[i + 1];
    const py::bytes storage(reinterpret_cast<const char*>(strides.data()), strides.size() * sizeof(int64_t));
    keep_for_call(storage);
    view.strides = reinterpret_cast<const int64_t*>(PyBytes_AS_STRING(storage.ptr()));
  }
  if (t.data) {
    view.data = static_cast<char*>(t.data) + t.byte_offset;
  } else if (view.numel() != 0) {
    // A FakeTensor looks like this; a kernel would follow the null pointer.
    throw py::type_error("lamina: a tensor has a shape but no data (a fake or meta tensor); use real tensors");
  }
  return view;
}

TensorView view_of(const dlpack::Tensor& t) {
  if (t.device.type != dlpack::kCPU && t.device.type != dlpack::kCUDAHost) {
    throw py::type_error(
        "lamina: this function runs on the CPU, but a tensor is on another device; move it with .cpu()");
  }
  return layout_of(t);
}

// A new thread starts with OpenMP's default number of threads; torch gives it its own setting (torch.set_num_threads)
// at its first parallel work there. The kernels use the same pool, so the first tensor of a thread makes torch do so.
void adopt_torch_threads() {
  thread_local bool adopted = false;
  if (adopted) return;
  adopted = true;
  py::module_::import("torch").attr("get_num_threads")();
}

}  // namespace

TensorView tensor_view_of(py::handle object) {
  adopt_torch_threads();
  if (Recorder* recorder = Recorder::current()) recorder->arrived(object);
  if (const dlpack::ExchangeApi* api = exchange_api_of(Py_TYPE(object.ptr()))) {
    dlpack::Tensor tensor;
    if (api->tensor_from_object(object.ptr(), &tensor) != 0) throw py::error_already_set();
    return view_of(tensor);
  }
  if (!py::hasattr(object, "__dlpack__")) {
    throw py::type_error("lamina: expected a torch.Tensor, got " + std::string(Py_TYPE(object.ptr())->tp_name));
  }
  const py::object capsule = object.attr("__dlpack__")();
  keep_for_call(capsule);  // its destructor releases the tensor, since nobody consumes it
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
    return view_of(
        static_cast<dlpack::ManagedTensorVersioned*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"))
            ->tensor);
  }
  auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
  if (!managed) throw py::error_already_set();
  return view_of(managed->tensor);
}

CudaTensorView cuda_tensor_view_of(py::handle object) {
  const dlpack::ExchangeApi* api = exchange_api_of(Py_TYPE(object.ptr()));
  if (!api) {
    throw py::type_error("lamina: expected a torch.Tensor, got " + std::string(Py_TYPE(object.ptr())->tp_name));
  }
  dlpack::Tensor tensor;
  if (api->tensor_from_object(object.ptr(), &tensor) != 0) throw py::error_already_set();
  if (tensor.device.type != dlpack::kCUDA) {
    throw py::type_error(
        "lamina: this function runs on CUDA devices, but a tensor is on another device; move it with .cuda()");
  }
  CudaTensorView view;
  static_cast<TensorView&>(view) = layout_of(tensor);
  view.device = tensor.device.id;
  if (api->current_work_stream(dlpack::kCUDA, view.device, &view.stream) != 0) throw py::error_already_set();
  return view;
}

}  // namespace lamina
