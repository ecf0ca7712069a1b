// What the CUDA runtime says about the GPUs of this machine.
#pragma once

#include <string>
#include <vector>

namespace lamina {

// "NVIDIA H200 (sm_90, 139 GiB)" for each device that the kernels of this build can run on; empty without a driver.
// Initialises CUDA: never called on import.
std::vector<std::string> cuda_devices();

// Whether this build has code for the device. Asked once for each.
bool has_code_cuda(int device);

}  // namespace lamina
