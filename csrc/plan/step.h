// One step of a plan: a function of csrc/ops and its arguments, kept until it is called.
//
// A function is made callable by name with register_step(name, function): its parameter types say how each recorded
// argument turns into a parameter again, so that no op writes anything of its own for it.
#pragma once

#include <stdint.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "ops/checks.h"
#include "ops/tensor.h"

namespace lamina {

// A tensor of a step: where it lies in one of the plan's buffers, and its form.
struct Operand {
  int64_t buffer = 0, offset = 0;  // offset in bytes
  DType dtype = DType::other;
  std::vector<int64_t> shape, strides;

  TensorView view(void* data) const { return {data, int(shape.size()), shape.data(), strides.data(), dtype}; }
};

struct NoArgument {};

// An argument as it is recorded, saved and loaded. A Tensor is a TensorView while calls are recorded, and an Operand in
// a plan.
template <class Tensor>
using ArgumentOf = std::variant<NoArgument, bool, int64_t, double, std::string, std::vector<int64_t>,
                                std::vector<double>, Tensor, std::vector<Tensor>>;
using Argument = ArgumentOf<Operand>;
using RecordedArgument = ArgumentOf<TensorView>;

namespace step {

template <class T>
struct Tag {};

template <class T>
struct IsOptional : std::false_type {};
template <class T>
struct IsOptional<std::optional<T>> : std::true_type {
  using Value = T;
};

// A parameter as an argument.
template <class T>
RecordedArgument recorded(const T& value) {
  if constexpr (IsOptional<T>::value) {
    return value ? recorded(*value) : RecordedArgument(NoArgument{});
  } else if constexpr (std::is_same_v<T, bool>) {
    return value;
  } else if constexpr (std::is_integral_v<T>) {
    return int64_t{value};
  } else if constexpr (std::is_same_v<T, std::vector<float>>) {
    return std::vector<double>(value.begin(), value.end());
  } else {
    return value;
  }
}

// What a step keeps of one parameter: its value, or for tensors which of the step's views it is.
template <class T>
class Parameter {
 public:
  // next: the number of tensors in the parameters before, which grows by those in this one.
  Parameter(const Argument& argument, int&) : value_(value_of<T>(argument)) {}

  const T& get(const TensorView*) const { return value_; }

 private:
  template <class V>
  static V value_of(const Argument& argument) {
    if constexpr (IsOptional<V>::value) {
      if (std::holds_alternative<NoArgument>(argument)) return std::nullopt;
      return value_of<typename IsOptional<V>::Value>(argument);
    } else if constexpr (std::is_same_v<V, bool> || std::is_same_v<V, std::string>) {
      return get_as<V>(argument);
    } else if constexpr (std::is_integral_v<V>) {
      return V(get_as<int64_t>(argument));
    } else if constexpr (std::is_floating_point_v<V>) {
      if (const auto* whole = std::get_if<int64_t>(&argument)) return V(*whole);
      return V(get_as<double>(argument));
    } else if constexpr (std::is_same_v<V, std::vector<int64_t>>) {
      return get_as<V>(argument);
    } else {
      // Of floats; an empty list has no type of its own.
      if (const auto* whole = std::get_if<std::vector<int64_t>>(&argument)) return V(whole->begin(), whole->end());
      const auto& values = get_as<std::vector<double>>(argument);
      return V(values.begin(), values.end());
    }
  }

  template <class V>
  static const V& get_as(const Argument& argument) {
    const V* value = std::get_if<V>(&argument);
    if (!value) throw FormatError("plan: an argument of a step has another type than its function takes");
    return *value;
  }

  T value_;
};

template <>
class Parameter<TensorView> {
 public:
  Parameter(const Argument& argument, int& next) : index_(next++) {
    if (!std::holds_alternative<Operand>(argument)) throw FormatError("plan: a step lacks a tensor");
  }
  const TensorView& get(const TensorView* views) const { return views[index_]; }

 private:
  int index_;
};

template <>
class Parameter<std::optional<TensorView>> {
 public:
  Parameter(const Argument& argument, int& next) {
    if (std::holds_alternative<Operand>(argument)) {
      index_ = next++;
    } else if (!std::holds_alternative<NoArgument>(argument)) {
      throw FormatError("plan: a step has another argument where a tensor may be");
    }
  }
  std::optional<TensorView> get(const TensorView* views) const {
    return index_ < 0 ? std::nullopt : std::optional<TensorView>(views[index_]);
  }

 private:
  int index_ = -1;
};

template <>
class Parameter<std::vector<TensorView>> {
 public:
  Parameter(const Argument& argument, int& next) : first_(next) {
    if (const auto* operands = std::get_if<std::vector<Operand>>(&argument)) {
      count_ = int(operands->size());
      next += count_;
    } else if (const auto* none = std::get_if<std::vector<int64_t>>(&argument); !none || !none->empty()) {
      throw FormatError("plan: a step lacks a list of tensors");
    }
  }
  std::vector<TensorView> get(const TensorView* views) const { return {views + first_, views + first_ + count_}; }

 private:
  int first_, count_ = 0;
};

}  // namespace step

// A function with all its arguments but the places of its tensors.
class StepCall {
 public:
  virtual ~StepCall() = default;
  // views: the step's tensors, in the order of its arguments.
  virtual void run(const TensorView* views) const = 0;
};

template <class... Ps>
class BoundCall final : public StepCall {
 public:
  BoundCall(void (*function)(Ps...), const std::vector<Argument>& arguments)
      : function_(function), parameters_(bind(arguments, std::index_sequence_for<Ps...>{})) {}

  void run(const TensorView* views) const override {
    std::apply([&](const auto&... parameters) { function_(parameters.get(views)...); }, parameters_);
  }

 private:
  using Parameters = std::tuple<step::Parameter<std::decay_t<Ps>>...>;

  template <size_t... I>
  static Parameters bind(const std::vector<Argument>& arguments, std::index_sequence<I...>) {
    if (arguments.size() != sizeof...(Ps)) throw FormatError("plan: a step has too few or too many arguments");
    int next = 0;
    return Parameters{step::Parameter<std::decay_t<Ps>>(arguments[I], next)...};  // braces: from left to right
  }

  void (*function_)(Ps...);
  Parameters parameters_;
};

using StepMaker = std::unique_ptr<StepCall> (*)(const void* function, const std::vector<Argument>& arguments);

// Makes a function of csrc/ops callable by name; called while the module is loaded.
void register_step(const std::string& name, const void* function, StepMaker maker);

// FormatError for a name that no function has, and for arguments that its function does not take.
std::unique_ptr<StepCall> make_step(const std::string& name, const std::vector<Argument>& arguments);

template <class... Ps>
void register_step(const std::string& name, void (*function)(Ps...)) {
  register_step(name, reinterpret_cast<const void*>(function),
                [](const void* function, const std::vector<Argument>& arguments) -> std::unique_ptr<StepCall> {
                  using Function = void (*)(Ps...);
                  return std::make_unique<BoundCall<Ps...>>(reinterpret_cast<Function>(const_cast<void*>(function)),
                                                            arguments);
                });
}

}  // namespace lamina
