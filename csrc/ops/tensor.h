// A borrowed view of somebody else's tensor: what every function in csrc/ops takes. It owns nothing and is valid for
// the duration of the call.
#pragma once

#include <stdint.h>

#include <string>

namespace lamina {

enum class DType : uint8_t { float32, float64, float16, bfloat16, int8, uint8, int16, int32, int64, boolean, other };

const char* dtype_name(DType dtype);
// Bytes of an element; 0 for DType::other.
int dtype_bytes(DType dtype);

struct TensorView {
  void* data = nullptr;
  int ndim = 0;
  const int64_t* shape = nullptr;
  const int64_t* strides = nullptr;  // in elements
  DType dtype = DType::other;

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
  int64_t size(int dim) const { return shape[dim < 0 ? dim + ndim : dim]; }
  int64_t stride(int dim) const { return strides[dim < 0 ? dim + ndim : dim]; }
  int64_t numel() const;
  bool is_contiguous() const;
};

// A tensor on a CUDA device, with the stream its work is to be put on. Another type than TensorView, not another value
// in it: a function of the CPU can't be handed a pointer that it must not follow.
struct CudaTensorView : TensorView {
  int device = 0;
  void* stream = nullptr;  // a cudaStream_t: PyTorch's current one on that device
};

// "float32[2, 3]", for error messages.
std::string describe(const TensorView& tensor);

}  // namespace lamina
