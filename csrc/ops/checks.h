// How an op refuses its input: one sentence with the op's name, the offending value and what would work.
// std::invalid_argument becomes ValueError in Python.
#pragma once

#include <initializer_list>
#include <sstream>
#include <stdexcept>

#include "ops/tensor.h"

namespace lamina {

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << op << ": ";
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// Packed data that is foreign, damaged or from another version; lamina.FormatError in Python, which is a ValueError.
struct FormatError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

template <class... Parts>
[[noreturn]] void fail_format(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << op << ": ";
  (message << ... << parts);
  throw FormatError(message.str());
}

template <class... Parts>
void check(bool ok, const char* op, const Parts&... parts) {
  if (!ok) fail(op, parts...);
}

// `what` names the argument: "x", "packed_weight.scale".
void check_dtype(const char* op, const char* what, const TensorView& t, std::initializer_list<DType> allowed);
// -1 in `shape` stands for any size.
void check_shape(const char* op, const char* what, const TensorView& t, std::initializer_list<int64_t> shape);
void check_contiguous(const char* op, const char* what, const TensorView& t);

}  // namespace lamina
