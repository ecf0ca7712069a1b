// The functions of csrc/ops/cuda/attention_decode.h as a C library, for ctypes.
#include "ops/cuda/attention_decode.h"

#include <cuda_runtime.h>

#include <exception>
#include <string>

namespace {

struct View {
  void* data;
  const int64_t *shape, *strides;
  int32_t ndim, dtype;
};

lamina::CudaTensorView view_of(const View& v) {
  lamina::CudaTensorView t;
  t.data = v.data;
  t.ndim = v.ndim;
  t.shape = v.shape;
  t.strides = v.strides;
  t.dtype = lamina::DType(v.dtype);
  return t;
}

std::optional<lamina::CudaTensorView> optional_of(const View* v) {
  if (!v) return std::nullopt;
  return view_of(*v);
}

std::string message;

template <class Call>
const char* guarded(const Call& call) {
  try {
    call();
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}

}  // namespace

extern "C" {

void take_turns_backwards(int on) { emulator::backwards = on != 0; }

int64_t attention_decode_workspace(const View* q, const View* k_cache, const View* v_cache, const View* table) {
  return lamina::attention_decode_workspace_cuda(view_of(*q), view_of(*k_cache), view_of(*v_cache), optional_of(table));
}

const char* attention_decode(const View* q, const View* k_cache, const View* v_cache, const View* lengths,
                             const View* table, double scale, const int64_t* window, const double* softcap,
                             const View* slopes, const View* sinks, const View* k_scale, const View* v_scale,
                             const View* out, const View* lse, const View* workspace) {
  return guarded([&] {
    lamina::attention_decode_cuda(view_of(*q), view_of(*k_cache), view_of(*v_cache), view_of(*lengths),
                                  optional_of(table), scale, window ? std::optional(*window) : std::nullopt,
                                  softcap ? std::optional(*softcap) : std::nullopt, optional_of(slopes),
                                  optional_of(sinks), optional_of(k_scale), optional_of(v_scale), view_of(*out),
                                  optional_of(lse), view_of(*workspace));
  });
}

const char* attention_decode_append(const View* k_cache, const View* v_cache, const View* lengths, const View* k,
                                    const View* v, const View* table, const View* k_scale, const View* v_scale) {
  return guarded([&] {
    lamina::attention_decode_append_cuda(view_of(*k_cache), view_of(*v_cache), view_of(*lengths), view_of(*k),
                                         view_of(*v), optional_of(table), optional_of(k_scale), optional_of(v_scale));
  });
}

}  // extern "C"
