// Loading the kernels. CUDA would load one at its first launch, and may wait then for kernels that
// run. Those may be waiting for another rank.

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

int32_t Kernels::load_all() {
  for (const Kernels* file = first_; file != nullptr; file = file->next_) {
    for (int i = 0; i < kMax && file->kernels_[i] != nullptr; ++i) {
      const int32_t status =
          load_kernel(file->kernels_[i], file->what_, file->setup_, file->shared_bytes_);
      if (status != EP_OK) return status;
    }
  }
  return EP_OK;
}

}  // namespace ep

int32_t ep_load_kernels(void) { return ep::Kernels::load_all(); }
