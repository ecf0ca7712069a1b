// What every launcher needs: the device of its operands made current, and errors of the runtime as exceptions.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>
#include <utility>

#if defined(__CUDACC__) || defined(LAMINA_CUDA_EMULATOR)
#include <cuda_runtime.h>
#endif

namespace lamina::cuda {

// Throws std::runtime_error "attention_decode: CUDA: invalid argument".
inline void check(cudaError_t status, const char* op) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(op) + ": CUDA: " + cudaGetErrorString(status));
}

// Makes `device` the current one until the end of the scope. Costs nothing where it is current already.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    if (cudaGetDevice(&before_) != cudaSuccess) before_ = device;
    if (before_ != device) check(cudaSetDevice(device), "lamina");
    changed_ = before_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

#if defined(__CUDACC__) || defined(LAMINA_CUDA_EMULATOR)
// Where and in which order a kernel runs. `overlaps`: it may start before the kernel in front of it has ended, for
// whose results it asks by wait_for_the_kernel_before() (ptx.h); only from compute capability 9.0 on.
struct Launch {
  dim3 grid, block;
  size_t shared_bytes = 0;
  void* stream = nullptr;
  bool overlaps = false;
};

template <class... Params, class... Args>
void launch(const char* op, const Launch& how, void (*kernel)(Params...), Args&&... args) {
  constexpr size_t kWithoutAsking = 48 << 10;  // more shared memory than this must be allowed kernel by kernel
  if (how.shared_bytes > kWithoutAsking) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(how.shared_bytes)), op);
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid;
  config.blockDim = how.block;
  config.dynamicSmemBytes = how.shared_bytes;
  config.stream = static_cast<cudaStream_t>(how.stream);
  config.attrs = &attribute;
  config.numAttrs = how.overlaps ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...), op);
}
#endif

}  // namespace lamina::cuda
