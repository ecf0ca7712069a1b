// Lists the devices that this build has code for: asking for the attributes of an embedded kernel fails on the others.
#include <cuda_runtime.h>

#include <atomic>

#include "cuda/device.h"
#include "cuda/launch.h"

namespace lamina {
namespace {

__global__ void runs_here() {}

}  // namespace

std::vector<std::string> cuda_devices() {
  std::vector<std::string> names;
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) return names;
  int current = 0;
  cudaGetDevice(&current);
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp properties;
    cudaFuncAttributes attributes;
    if (cudaSetDevice(device) != cudaSuccess) continue;
    if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) continue;
    if (cudaFuncGetAttributes(&attributes, runs_here) != cudaSuccess) continue;
    names.push_back(std::string(properties.name) + " (sm_" + std::to_string(properties.major) +
                    std::to_string(properties.minor) + ", " + std::to_string(properties.totalGlobalMem >> 30) +
                    " GiB)");
  }
  cudaSetDevice(current);
  return names;
}

bool has_code_cuda(int device) {
  constexpr int kKnown = 64;
  static std::atomic<signed char> known[kKnown];  // 0: not yet
  if (device < 0 || device >= kKnown) return false;
  if (const int answer = known[device].load(std::memory_order_relaxed)) return answer > 0;
  const cuda::DeviceGuard guard(device);
  cudaFuncAttributes attributes;
  const bool there = cudaFuncGetAttributes(&attributes, runs_here) == cudaSuccess;
  if (!there) cudaGetLastError();  // or the next to look for an error would find this one
  known[device].store(there ? 1 : -1, std::memory_order_relaxed);
  return there;
}

}  // namespace lamina
