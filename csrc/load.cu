// Loading the kernels: CUDA loads one at its first launch, and then may wait for those that run, which
// may be waiting for another rank.

#include "common/launch.cuh"

int32_t ep_load_kernels(void) {
  int32_t status = ep::load_layout_kernels();
  if (status == EP_OK) status = ep::load_plan_kernels();
  if (status == EP_OK) status = ep::load_dispatch_kernels();
  if (status == EP_OK) status = ep::load_combine_kernels();
  if (status == EP_OK) status = ep::load_quantize_kernels();
  if (status == EP_OK) status = ep::load_probability_kernels();
  return status;
}
