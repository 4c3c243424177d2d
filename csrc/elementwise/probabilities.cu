// Probabilities of a token's selected experts out of those of all experts, and the way back.

#include <algorithm>

#include "common/launch.cuh"
#include "common/warp.cuh"
#include "ep_comm.h"

namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) select_kernel(const ep_probabilities_args args) {
  const int64_t count = args.num_tokens * args.num_topk, stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += stride) {
    const int32_t expert = args.topk_idx[i];
    const int64_t t = i / args.num_topk;
    args.output[i] = expert < 0 ? 0.0f : args.input[t * args.num_experts + expert];
  }
}

// A thread for each expert of a token: everything is written once, and needs no clearing before.
__global__ void __launch_bounds__(kThreads) scatter_kernel(const ep_probabilities_args args) {
  const int64_t count = args.num_tokens * args.num_experts, stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += stride) {
    const int64_t t = i / args.num_experts;
    const auto expert = static_cast<int32_t>(i % args.num_experts);
    float value = 0.0f;
    for (int32_t k = 0; k < args.num_topk; ++k) {
      if (args.topk_idx[t * args.num_topk + k] == expert) value = args.input[t * args.num_topk + k];
    }
    args.output[i] = value;
  }
}

using Kernel = void (*)(ep_probabilities_args);

int32_t launch(Kernel kernel, const ep_probabilities_args& args, int64_t count, void* stream,
               const char* name) {
  constexpr int64_t kMaxGrid = 132 * 16;
  if (count == 0) return EP_OK;
  const auto grid =
      static_cast<unsigned>(std::min(ep::ceil_div<int64_t>(count, kThreads), kMaxGrid));
  kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return ep::check_cuda(cudaGetLastError(), name);
}

const ep::Kernels kernels("probability kernels", ep::Setup::kPlain, 0, select_kernel,
                          scatter_kernel);

}  // namespace

int32_t ep_select_probabilities(const ep_probabilities_args* args, void* stream) {
  return launch(select_kernel, *args, args->num_tokens * args->num_topk, stream,
                "ep_select_probabilities");
}

int32_t ep_scatter_probabilities(const ep_probabilities_args* args, void* stream) {
  return launch(scatter_kernel, *args, args->num_tokens * args->num_experts, stream,
                "ep_scatter_probabilities");
}
