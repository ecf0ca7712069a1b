#include "bindings/plan.h"

#include <pybind11/stl.h>

#include <algorithm>

#include "bindings/recorder.h"
#include "bindings/tensor_view.h"
#include "plan/plan.h"

namespace py = pybind11;

namespace lamina {
namespace {

DType parse_dtype(const std::string& name) {
  for (int i = 0; i < int(DType::other); ++i) {
    if (name == dtype_name(DType(i))) return DType(i);
  }
  throw FormatError("plan: '" + name + "' is no dtype that an op knows");
}

Argument argument_of(py::handle object) {
  if (object.is_none()) return NoArgument{};
  if (py::isinstance<py::bool_>(object)) return object.cast<bool>();
  if (py::isinstance<py::int_>(object)) return object.cast<int64_t>();
  if (py::isinstance<py::float_>(object)) return object.cast<double>();
  if (py::isinstance<py::str>(object)) return object.cast<std::string>();
  if (py::isinstance<Operand>(object)) return object.cast<Operand>();
  const auto items = object.cast<py::sequence>();
  if (py::len(items) > 0 && py::isinstance<Operand>(items[0])) return items.cast<std::vector<Operand>>();
  for (const py::handle item : items) {
    if (py::isinstance<py::float_>(item)) return items.cast<std::vector<double>>();
  }
  return items.cast<std::vector<int64_t>>();
}

// What the arguments of a plan must be, told in a fraction of the time that Python would take.
class Guard {
 public:
  explicit Guard(const py::sequence& examples) {
    for (const py::handle example : examples) {
      if (PyLong_Check(example.ptr())) {
        forms_.push_back(example.cast<int64_t>());
      } else {
        const TensorView t = tensor_view_of(example);
        forms_.push_back(Form{t.dtype, {t.shape, t.shape + t.ndim}, {t.strides, t.strides + t.ndim}});
      }
    }
  }

  bool fits(const py::sequence& arguments) const {
    if (py::len(arguments) != forms_.size()) return false;
    size_t i = 0;
    for (const py::handle argument : arguments) {
      if (!std::visit([&](const auto& form) { return is(argument, form); }, forms_[i++])) return false;
    }
    return true;
  }

 private:
  struct Form {
    DType dtype;
    std::vector<int64_t> shape, strides;
  };

  static bool is(py::handle argument, int64_t number) {
    return PyLong_Check(argument.ptr()) && argument.cast<int64_t>() == number;
  }
  static bool is(py::handle argument, const Form& form) {
    if (PyLong_Check(argument.ptr())) return false;
    const TensorView t = tensor_view_of(argument);
    return t.dtype == form.dtype && size_t(t.ndim) == form.shape.size() &&
           std::equal(form.shape.begin(), form.shape.end(), t.shape) &&
           std::equal(form.strides.begin(), form.strides.end(), t.strides);
  }

  std::vector<std::variant<int64_t, Form>> forms_;
};

// A plan and its constants, which live as long as it does.
class HeldPlan {
 public:
  HeldPlan(std::shared_ptr<ArenaPool> pool, std::vector<int64_t> sizes, py::list constants, const py::sequence& steps)
      : constants_(std::move(constants)), plan_(std::move(pool), std::move(sizes), specs_of(steps)) {
    for (const py::handle constant : constants_) fixed_.push_back(tensor_view_of(constant).data);
  }

  void run(const py::sequence& tensors) const {
    const std::vector<void*> addresses = addresses_with(tensors);
    const py::gil_scoped_release no_gil;
    plan_.run(addresses.data());
  }

  py::list profile(const py::sequence& tensors) const {
    const std::vector<void*> addresses = addresses_with(tensors);
    std::vector<StepTime> times;
    {
      const py::gil_scoped_release no_gil;
      times = plan_.profile(addresses.data());
    }
    py::list result;
    for (const StepTime& time : times) result.append(py::make_tuple(time.seconds, time.isa));
    return result;
  }

 private:
  static std::vector<StepSpec> specs_of(const py::sequence& steps) {
    std::vector<StepSpec> specs;
    for (const py::handle step : steps) {
      const auto pair = step.cast<py::sequence>();
      StepSpec spec{pair[0].cast<std::string>(), {}};
      for (const py::handle argument : pair[1].cast<py::sequence>()) spec.arguments.push_back(argument_of(argument));
      specs.push_back(std::move(spec));
    }
    return specs;
  }

  std::vector<void*> addresses_with(const py::sequence& tensors) const {
    std::vector<void*> addresses;
    addresses.reserve(plan_.address_count());
    addresses.insert(addresses.end(), fixed_.begin(), fixed_.end());
    for (const py::handle tensor : tensors) addresses.push_back(tensor_view_of(tensor).data);
    if (addresses.size() != plan_.address_count()) {
      throw py::value_error("plan: " + std::to_string(addresses.size()) + " buffers were given, but it has " +
                            std::to_string(plan_.address_count()));
    }
    return addresses;
  }

  py::list constants_;
  Plan plan_;
  std::vector<void*> fixed_;
};

}  // namespace

void define_plan(py::module_& m) {
  py::class_<Operand>(m, "Operand")
      .def(py::init([](int64_t buffer, int64_t offset, const std::string& dtype, std::vector<int64_t> shape,
                       std::vector<int64_t> strides) {
             return Operand{buffer, offset, parse_dtype(dtype), std::move(shape), std::move(strides)};
           }),
           py::arg("buffer"), py::arg("offset"), py::arg("dtype"), py::arg("shape"), py::arg("strides"));

  py::class_<ArenaPool, std::shared_ptr<ArenaPool>>(m, "ArenaPool").def(py::init<>());

  py::class_<Guard>(m, "Guard").def(py::init<const py::sequence&>(), py::arg("examples")).def("fits", &Guard::fits);

  py::class_<HeldPlan>(m, "Plan")
      .def(py::init<std::shared_ptr<ArenaPool>, std::vector<int64_t>, py::list, const py::sequence&>(), py::arg("pool"),
           py::arg("sizes"), py::arg("constants"), py::arg("steps"))
      .def("run", &HeldPlan::run)
      .def("profile", &HeldPlan::profile);

  py::class_<Recorder>(m, "Recorder")
      .def(py::init<>())
      .def("open", &Recorder::open)
      .def("close", &Recorder::close)
      .def("drain", &Recorder::drain);
}

}  // namespace lamina
