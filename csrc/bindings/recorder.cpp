#include "bindings/recorder.h"

#include <pybind11/stl.h>

namespace py = pybind11;

namespace lamina {
namespace {

thread_local Recorder* open_recorder = nullptr;

size_t tensors_of(const RecordedArgument& argument) {
  if (std::holds_alternative<TensorView>(argument)) return 1;
  const auto* several = std::get_if<std::vector<TensorView>>(&argument);
  return several ? several->size() : 0;
}

}  // namespace

Recorder* Recorder::current() { return open_recorder; }

void Recorder::open() {
  outer_ = open_recorder;
  open_recorder = this;
}

void Recorder::close() { open_recorder = outer_; }

void Recorder::called(const char* op, std::vector<RecordedArgument> arguments) {
  const py::gil_scoped_acquire gil;
  size_t count = 0;
  for (const RecordedArgument& argument : arguments) count += tensors_of(argument);
  calls_.push_back({op, std::move(arguments), {arrived_.end() - count, arrived_.end()}});
  arrived_.clear();
}

py::list Recorder::drain() {
  py::list calls;
  for (const Call& call : calls_) {
    py::list arguments;
    size_t next = 0;
    for (const RecordedArgument& argument : call.arguments) {
      arguments.append(std::visit(
          [&](const auto& value) -> py::object {
            using T = std::decay_t<decltype(value)>;
            if constexpr (std::is_same_v<T, NoArgument>) {
              return py::none();
            } else if constexpr (std::is_same_v<T, TensorView>) {
              return call.tensors[next++];
            } else if constexpr (std::is_same_v<T, std::vector<TensorView>>) {
              py::list several;
              for (size_t i = 0; i < value.size(); ++i) several.append(call.tensors[next++]);
              return several;
            } else {
              return py::cast(value);
            }
          },
          argument));
    }
    calls.append(py::make_tuple(call.op, arguments));
  }
  calls_.clear();
  return calls;
}

}  // namespace lamina
