// A warp's size, its mask, the place of a thread in it, and sums over its lanes. Divisions that
// round up.
#pragma once

#include <cstdint>

namespace ep {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

template <typename Int>
__host__ __device__ constexpr Int ceil_div(Int a, Int b) {
  return (a + b - 1) / b;
}
template <typename Int>
__host__ __device__ constexpr Int round_up(Int a, Int b) {
  return (a + b - 1) / b * b;
}

__device__ inline int32_t lane_id() { return threadIdx.x % kWarpSize; }

// Sum of `count` over the lanes before this one; `total` is that over all.
__device__ inline int32_t sum_before(int32_t count, int32_t* total) {
  int32_t sum = count;
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2) {
    const int32_t before = __shfl_up_sync(kFullWarp, sum, step);
    if (lane_id() >= step) sum += before;
  }
  *total = __shfl_sync(kFullWarp, sum, kWarpSize - 1);
  return sum - count;
}

}  // namespace ep
