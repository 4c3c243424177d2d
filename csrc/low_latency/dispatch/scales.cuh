// Low-latency dispatch, receiving: scales of FP8 rows.
#pragma once

#include "low_latency/dispatch/roles.cuh"

namespace ep::low_latency::dispatch {

// Where the scales of a row of recv_x stand. Each lane finds that of its own row, and takes others
// from their lanes: it is a division, which would take long for one row after the other.
struct ScaleRow {
  int32_t expert, place;

  ScaleRow() = default;
  // row: may be negative, of a lane that nobody asks. num_rows: of each expert.
  __device__ ScaleRow(int32_t row, int32_t num_rows)
      : expert(row / num_rows), place(row - expert * num_rows) {}

  // By the warp.
  __device__ ScaleRow of_lane(int32_t lane) const {
    ScaleRow other;
    other.expert = __shfl_sync(kFullWarp, expert, lane);
    other.place = __shfl_sync(kFullWarp, place, lane);
    return other;
  }
};

// Stores the four scales of a word: column-major, rows next to each other.
__device__ inline void store_scales(const ep_low_latency_dispatch_args& args, int32_t hidden,
                                    const ScaleRow& row, int32_t index, const uint4& word) {
  const int32_t blocks = hidden / kScaleBlock;
  const uint32_t scales[kScalesOfWord] = {word.x, word.y, word.z, word.w};
  auto* const out = static_cast<uint32_t*>(args.recv_scales);
  if (args.format == EP_LOW_LATENCY_UE8M0) {
    uint32_t exponents = 0;
#pragma unroll
    for (int i = 0; i < kScalesOfWord; ++i) exponents |= (scales[i] >> 23 & 0xff) << (8 * i);
    out[static_cast<int64_t>(row.expert * (blocks / 4) + index) * args.scale_stride + row.place] =
        exponents;
    return;
  }
#pragma unroll
  for (int i = 0; i < kScalesOfWord; ++i) {
    const int32_t block = index * kScalesOfWord + i;
    if (block >= blocks) break;
    out[static_cast<int64_t>(row.expert * blocks + block) * args.scale_stride + row.place] =
        scales[i];
  }
}

}  // namespace ep::low_latency::dispatch
