// Sums of rows in FP32, a word of 8 BF16 elements at a time.
#pragma once

#include "common/vectors.cuh"

namespace ep::low_latency {

constexpr int kPer = kPerVector<__nv_bfloat16>;

// Adds to a sum that begins at -0, because -0 + x is x for every x, -0 too.
__device__ inline void add(float (&sums)[kPer], const uint4& word) {
  float values[kPer];
  unpack<__nv_bfloat16>(word, values);
#pragma unroll
  for (int i = 0; i < kPer; ++i) sums[i] = __fadd_rn(sums[i], values[i]);
}

__device__ inline void add(float (&sums)[kPer], const uint4& word, float weight) {
  float values[kPer];
  unpack<__nv_bfloat16>(word, values);
#pragma unroll
  for (int i = 0; i < kPer; ++i) sums[i] = __fadd_rn(sums[i], __fmul_rn(weight, values[i]));
}

}  // namespace ep::low_latency
