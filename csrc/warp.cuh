// A warp's size, its mask, and the place of a thread in it.
#pragma once

#include <cstdint>

namespace ep {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

__device__ inline int32_t lane_id() { return threadIdx.x % kWarpSize; }

}  // namespace ep
