// What _C offers on CUDA devices: functions of csrc/ops/cuda, in builds that have them.
#pragma once

#include <pybind11/pybind11.h>

namespace lamina {

void define_cuda(pybind11::module_& m);

}  // namespace lamina
