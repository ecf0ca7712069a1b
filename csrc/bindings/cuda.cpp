#include "bindings/cuda.h"

#ifdef LAMINA_WITH_CUDA
#include <pybind11/stl.h>

#include "bindings/tensor_view.h"
#include "cuda/device.h"
#include "ops/cuda/attention_decode.h"
#include "ops/cuda/int8_linear.h"
#endif

namespace py = pybind11;

namespace lamina {

// A name ends in _cuda where the CPU has a function of that name as well.
void define_cuda(py::module_& m) {
#ifdef LAMINA_WITH_CUDA
  [[maybe_unused]] const auto no_gil = py::call_guard<py::gil_scoped_release>();
  m.attr("with_cuda") = true;
  m.def("cuda_devices", &cuda_devices, no_gil);
  m.def("has_code_cuda", &has_code_cuda, no_gil);
  m.def("attention_decode_append_cuda", &attention_decode_append_cuda, no_gil);
  m.def("attention_decode_cuda", &attention_decode_cuda, no_gil);
  m.def("attention_decode_workspace_cuda", &attention_decode_workspace_cuda, no_gil);
  m.def("int8_linear_cuda", &int8_linear_cuda, no_gil);
  m.def("int8_linear_fits_cuda", &int8_linear_fits_cuda, no_gil);
#else
  m.attr("with_cuda") = false;
#endif
#ifdef LAMINA_WITH_CUTLASS
  m.attr("with_cutlass") = true;
#else
  m.attr("with_cutlass") = false;
#endif
}

}  // namespace lamina
