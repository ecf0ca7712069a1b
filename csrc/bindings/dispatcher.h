// When a call may go straight to an op's CPU implementation. PyTorch's dispatcher takes 3 to 4 us to find and call an
// implementation written in Python, as much as a small layer; in an ordinary eager call it does nothing else.
#pragma once

#include <pybind11/pybind11.h>

namespace lamina {

// Whether the dispatcher would do nothing for an op with these arguments but call its CPU implementation: every tensor
// is a plain one on the CPU (no subclass, no lazy negation), every other argument a plain value, and no mode, function
// transform, tracer or profiler of this thread wants to see the call. False also where this torch cannot tell.
bool skips_dispatcher(const pybind11::tuple& arguments);

}  // namespace lamina
