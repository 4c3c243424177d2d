// Quantisation to FP8 E4M3 in blocks of 128 with power-of-two scales: Transformer Engine's bits.

#include <algorithm>

#include "common/launch.cuh"
#include "common/vectors.cuh"
#include "common/warp.cuh"
#include "elementwise/blocks.cuh"
#include "ep_comm.h"

namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 16;                          // of one block of elements
constexpr int kPerLane = ep::kScaleBlock / kLanes;  // 8: one 8-byte store

template <typename T>
__device__ inline void load(const T* x, float* out) {
#pragma unroll
  for (int v = 0; v < kPerLane / ep::kPerVector<T>; ++v) {
    ep::unpack<T>(reinterpret_cast<const uint4*>(x)[v], out + v * ep::kPerVector<T>);
  }
}

// 16 lanes a block of 128 elements; blocks of neighbouring lanes are neighbours in memory.
template <typename T>
__global__ void __launch_bounds__(kThreads) quantize_kernel(const ep_quantize_args args) {
  const auto* const x = static_cast<const T*>(args.x);
  const int64_t num_lanes = args.num_blocks * kLanes;
  // Whole warps take part in the shuffles, also beyond the end.
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads; first < num_lanes;
       first += stride) {
    const int64_t i = first + threadIdx.x;
    const bool inside = i < num_lanes;
    float values[kPerLane] = {};
    if (inside) load(x + i * kPerLane, values);
    float amax = 0.0f;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) amax = fmaxf(amax, fabsf(values[j]));  // passes over NaN
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, offset));
    }
    const float scale = ep::power_of_two_scale(amax);
    union {
      uint2 bits;
      uint16_t pairs[kPerLane / 2];
    } packed;
#pragma unroll
    for (int j = 0; j < kPerLane / 2; ++j) {
      packed.pairs[j] = ep::pack_fp8_pair(values[2 * j] * scale, values[2 * j + 1] * scale);
    }
    if (!inside) continue;
    reinterpret_cast<uint2*>(args.data)[i] = packed.bits;
    if (i % kLanes == 0) args.scales[i / kLanes] = 1.0f / scale;
  }
}

const ep::Kernels kernels("quantisation kernels", ep::Setup::kPlain, 0,
                          quantize_kernel<__nv_bfloat16>, quantize_kernel<float>);

}  // namespace

int32_t ep_quantize(const ep_quantize_args* args, void* stream_pointer) {
  constexpr int64_t kMaxGrid = 132 * 16;
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const int64_t wanted = ep::ceil_div<int64_t>(args->num_blocks * kLanes, kThreads);
  const auto grid = static_cast<unsigned>(std::min(wanted, kMaxGrid));
  if (grid == 0) return EP_OK;
  if (args->dtype == EP_BF16) {
    quantize_kernel<__nv_bfloat16><<<grid, kThreads, 0, stream>>>(*args);
  } else if (args->dtype == EP_FP32) {
    quantize_kernel<float><<<grid, kThreads, 0, stream>>>(*args);
  } else {
    return ep::fail(EP_ERR_ARGUMENT, "dtype = %d is not one of EP_BF16, EP_FP32", args->dtype);
  }
  return ep::check_cuda(cudaGetLastError(), "ep_quantize");
}
