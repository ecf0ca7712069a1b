// Ops as Python functions whose calls can be recorded.
//
// define_op(m, name, function) offers a function of csrc/ops in Python and as a step of plans. While a Recorder of the
// calling thread is open, each call also leaves its name and arguments there, tensors as the Python objects they came
// as: run a model once and the list of its calls is what a plan is made of.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "plan/step.h"

namespace lamina {

class Recorder {
 public:
  struct Call {
    std::string op;
    std::vector<RecordedArgument> arguments;
    std::vector<pybind11::object> tensors;  // those of the arguments, in order
  };

  // The one open in this thread, or null.
  static Recorder* current();
  // Opens it, in place of one that was open before; close() puts that back.
  void open();
  void close();

  // A tensor on its way into a function. Needs the GIL.
  void arrived(pybind11::handle tensor) { arrived_.push_back(pybind11::reinterpret_borrow<pybind11::object>(tensor)); }
  // A function was called with the tensors that arrived last. Takes the GIL.
  void called(const char* op, std::vector<RecordedArgument> arguments);

  // (op, arguments) of the calls since the last time, with Python's own tensors, and lists of them, among the
  // arguments.
  pybind11::list drain();

 private:
  std::vector<Call> calls_;
  std::vector<pybind11::object> arrived_;
  Recorder* outer_ = nullptr;
};

template <class... Ps>
void define_op(pybind11::module_& m, const char* name, void (*function)(Ps...)) {
  register_step(name, function);
  m.def(
      name,
      [name, function](Ps... parameters) {
        function(parameters...);
        if (Recorder* recorder = Recorder::current()) recorder->called(name, {step::recorded(parameters)...});
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace lamina
