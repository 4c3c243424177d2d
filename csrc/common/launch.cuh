// How a failure gets from inside the library to ep_last_error(), and how kernels are loaded.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "ep_comm.h"

namespace ep {

// Keeps the printf-formatted text for ep_last_error() and returns `status`.
int32_t fail(int32_t status, const char* format, ...) __attribute__((format(printf, 2, 3)));

// EP_OK, or EP_ERR_CUDA with a text that says what failed (`what`) and CUDA's reason.
int32_t check_cuda(cudaError_t error, const char* what);

// Load all kernels of a file on the current device, see load.cu.
int32_t load_layout_kernels();
int32_t load_plan_kernels();
int32_t load_dispatch_kernels();
int32_t load_combine_kernels();
int32_t load_quantize_kernels();
int32_t load_probability_kernels();

// Loads `kernel` on the current device.
inline int32_t load_kernel(const void* kernel, const char* what) {
  cudaFuncAttributes attributes;
  return check_cuda(cudaFuncGetAttributes(&attributes, kernel), what);
}

// Loads one whose blocks may have `bytes` of dynamic shared memory.
inline int32_t load_with_shared(const void* kernel, int32_t bytes, const char* what) {
  return check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), what);
}

// Loads one whose blocks leave room on their SM for those of a dispatch: an SM that is set up for
// little shared memory could not take one before it is idle.
inline int32_t load_beside_dispatch(const void* kernel, const char* what) {
  return check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                         cudaSharedmemCarveoutMaxShared),
                    what);
}

}  // namespace ep
