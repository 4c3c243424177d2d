// Rows in FP8: 16 elements of a lane, with the scale of their block.
#pragma once

#include "common/ptx.cuh"
#include "common/vectors.cuh"
#include "common/warp.cuh"

namespace ep::low_latency {

constexpr float kFp8Max = 448.0f;
constexpr float kSmallestAmax = 1e-4f;

// Scale that is sent along, and what elements are multiplied by. See ep_comm.fp8's low-latency
// rules.
__device__ inline float scale_of(float amax, bool is_rounded, float* multiplier) {
  const float exact = __fdiv_rn(amax, kFp8Max);
  if (!is_rounded) {
    *multiplier = __fdiv_rn(kFp8Max, amax);
    return exact;
  }
  const uint32_t bits = __float_as_uint(exact);
  const uint32_t exponent = min((bits >> 23) + ((bits & 0x7fffff) != 0), 253u);
  *multiplier = __uint_as_float((254 - exponent) << 23);
  return __uint_as_float(exponent << 23);
}

// 16 elements as E4M3, in a block of 128 that eight lanes have; their scale.
__device__ inline uint4 quantized(const uint4 (&bits)[2], bool is_rounded, float* scale) {
  float values[16];
  unpack<__nv_bfloat16>(bits[0], values);
  unpack<__nv_bfloat16>(bits[1], values + 8);
  float amax = kSmallestAmax;
#pragma unroll
  for (float value : values) amax = fmaxf(amax, fabsf(value));  // passes over NaN
#pragma unroll
  for (int step = 1; step < 8; step *= 2) {
    amax = fmaxf(amax, __shfl_xor_sync(kFullWarp, amax, step));
  }
  float multiplier;
  *scale = scale_of(amax, is_rounded, &multiplier);
  union {
    uint4 word;
    uint16_t pairs[8];
  } packed;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    packed.pairs[i] = pack_fp8_pair(values[2 * i] * multiplier, values[2 * i + 1] * multiplier);
  }
  return packed.word;
}

}  // namespace ep::low_latency
