// _C.Plan, its operands and its arena pool, and the recorder that plans are made with.
#pragma once

#include <pybind11/pybind11.h>

namespace lamina {

void define_plan(pybind11::module_& m);

}  // namespace lamina
