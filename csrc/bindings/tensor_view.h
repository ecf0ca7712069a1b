// torch.Tensor -> TensorView, through the DLPack C exchange API: a table of C functions that hangs on the tensor's
// type. Nothing is owned, copied or synchronised, and this module links no torch, so one build serves every torch.
// Objects without the table (numpy arrays) come in through plain __dlpack__().
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "ops/tensor.h"

namespace lamina {

// Throws pybind11::type_error in one sentence for objects that are no tensors, live on another device, or have no data.
TensorView tensor_view_of(pybind11::handle object);
// The same for tensors on a CUDA device.
CudaTensorView cuda_tensor_view_of(pybind11::handle object);

}  // namespace lamina

namespace pybind11::detail {

template <>
struct type_caster<lamina::TensorView> {
  PYBIND11_TYPE_CASTER(lamina::TensorView, const_name("torch.Tensor"));

  bool load(handle source, bool) {
    value = lamina::tensor_view_of(source);
    return true;
  }
};

template <>
struct type_caster<lamina::CudaTensorView> {
  PYBIND11_TYPE_CASTER(lamina::CudaTensorView, const_name("torch.Tensor"));

  bool load(handle source, bool) {
    value = lamina::cuda_tensor_view_of(source);
    return true;
  }
};

}  // namespace pybind11::detail
