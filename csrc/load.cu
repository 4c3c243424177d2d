// Loading the kernels. CUDA would load one at its first launch, and may wait then for kernels that
// run. Those may be waiting for another rank.

#include <algorithm>

#include "common/launch.cuh"

namespace ep {

Kernels* Kernels::first_ = nullptr;

int32_t load_kernel(const void* kernel, const char* what, Setup setup, int32_t shared_bytes) {
  cudaFuncAttributes attributes;
  switch (setup) {
    case Setup::kShared:
      return check_cuda(
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
          what);
    case Setup::kBesideDispatch:
      return check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                             cudaSharedmemCarveoutMaxShared),
                        what);
    default:
      return check_cuda(cudaFuncGetAttributes(&attributes, kernel), what);
  }
}

// CUDA would give threads a larger stack at the first launch that needs one, and waits then for all
// that runs on the GPU.
static int32_t reserve_stack(size_t needed) {
  size_t reserved = 0;
  int32_t status =
      check_cuda(cudaDeviceGetLimit(&reserved, cudaLimitStackSize), "stack of kernels");
  if (status == EP_OK && needed > reserved) {
    status = check_cuda(cudaDeviceSetLimit(cudaLimitStackSize, needed), "stack of kernels");
  }
  return status;
}

int32_t Kernels::load_all() {
  size_t stack = 0;
  for (const Kernels* file = first_; file != nullptr; file = file->next_) {
    for (int i = 0; i < kMax && file->kernels_[i] != nullptr; ++i) {
      int32_t status =
          load_kernel(file->kernels_[i], file->what_, file->setup_, file->shared_bytes_);
      if (status != EP_OK) return status;
      cudaFuncAttributes attributes{};
      status = check_cuda(cudaFuncGetAttributes(&attributes, file->kernels_[i]), file->what_);
      if (status != EP_OK) return status;
      stack = std::max(stack, attributes.localSizeBytes);
    }
  }
  return reserve_stack(stack);
}

}  // namespace ep

int32_t ep_load_kernels(void) { return ep::Kernels::load_all(); }
