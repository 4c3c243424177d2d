// A warp's size, its mask, the place of a thread in it, and sums over its lanes. Divisions that
// round up, and short ones. A search among such sums.
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

// n / d for 0 <= n < kMostToDivide and 1 <= d, in a few instructions where a division takes thirty.
// (n + 0.5) / d is at least 0.5 / d away from every whole number, which is more than the product's
// rounding error.
constexpr int32_t kMostToDivide = 1 << 20;
__device__ inline int32_t quotient(int32_t n, int32_t d) {
  const float reciprocal = __fdividef(1.0f, static_cast<float>(d));
  return static_cast<int32_t>((static_cast<float>(n) + 0.5f) * reciprocal);
}

__device__ inline int32_t lane_id() { return threadIdx.x % kWarpSize; }

// By each warp at the start of a short kernel: has its parameters loaded, a word of each line. They
// are in no cache then, and each line that is met later is a wait of its own.
// unused: a word of shared memory for each warp.
template <typename Args>
__device__ inline void load_parameters(const Args& args, uint32_t* unused) {
  constexpr int kWordsOfLine = 16, kWords = sizeof(Args) / sizeof(uint32_t);
  if (lane_id() != 0) return;
  volatile uint32_t* const to = unused + threadIdx.x / kWarpSize;  // or the loads would be left out
#pragma unroll
  for (int i = 0; i < kWords; i += kWordsOfLine) {
    *to = reinterpret_cast<const uint32_t*>(&args)[i];
  }
}

// Exclusive prefix sum: of `count` over the lanes before this one. *total: the sum over all lanes.
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

// Returns the group of item i: the last of num_groups groups whose first item, first[group], is i
// or before it. first[0] is 0.
__device__ inline int32_t group_of(int32_t i, const int32_t* first, int32_t num_groups) {
  int32_t group = 0, end = num_groups;
  while (end - group > 1) {
    const int32_t middle = (group + end) / 2;
    if (first[middle] <= i) {
      group = middle;
    } else {
      end = middle;
    }
  }
  return group;
}

}  // namespace ep
