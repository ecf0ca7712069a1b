#include "ops/tensor.h"

#include "ops/checks.h"

namespace lamina {
namespace {

std::string shape_text(const int64_t* shape, int ndim) {
  std::string text = "[";
  for (int i = 0; i < ndim; ++i) {
    text += (i ? ", " : "") + (shape[i] < 0 ? std::string("*") : std::to_string(shape[i]));
  }
  return text + "]";
}

}  // namespace

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::float32: return "float32";
    case DType::float64: return "float64";
    case DType::float16: return "float16";
    case DType::bfloat16: return "bfloat16";
    case DType::int8: return "int8";
    case DType::uint8: return "uint8";
    case DType::int16: return "int16";
    case DType::int32: return "int32";
    case DType::int64: return "int64";
    case DType::boolean: return "bool";
    case DType::other: break;
  }
  return "an unsupported dtype";
}

int dtype_bytes(DType dtype) {
  switch (dtype) {
    case DType::int8:
    case DType::uint8:
    case DType::boolean: return 1;
    case DType::float16:
    case DType::bfloat16:
    case DType::int16: return 2;
    case DType::float32:
    case DType::int32: return 4;
    case DType::float64:
    case DType::int64: return 8;
    case DType::other: break;
  }
  return 0;
}

int64_t TensorView::numel() const {
  int64_t n = 1;
  for (int i = 0; i < ndim; ++i) n *= shape[i];
  return n;
}

bool TensorView::is_contiguous() const {
  int64_t expected = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    if (shape[i] == 0) return true;
    if (shape[i] != 1 && strides[i] != expected) return false;
    expected *= shape[i];
  }
  return true;
}

std::string describe(const TensorView& t) { return std::string(dtype_name(t.dtype)) + shape_text(t.shape, t.ndim); }

void check_dtype(const char* op, const char* what, const TensorView& t, std::initializer_list<DType> allowed) {
  std::string names;
  for (DType dtype : allowed) {
    if (t.dtype == dtype) return;
    names += (names.empty() ? "" : " or ") + std::string(dtype_name(dtype));
  }
  fail(op, what, " is ", dtype_name(t.dtype), ", but must be ", names);
}

void check_shape(const char* op, const char* what, const TensorView& t, std::initializer_list<int64_t> shape) {
  bool same = t.ndim == static_cast<int>(shape.size());
  int i = 0;
  for (int64_t size : shape) {
    same = same && (size < 0 || t.shape[i] == size);
    ++i;
  }
  if (same) return;  // the texts below cost more than a small op
  fail(op, what, " has shape ", shape_text(t.shape, t.ndim), ", but must be ",
       shape_text(shape.begin(), static_cast<int>(shape.size())));
}

void check_contiguous(const char* op, const char* what, const TensorView& t) {
  check(t.is_contiguous(), op, what, " must be contiguous");
}

}  // namespace lamina
