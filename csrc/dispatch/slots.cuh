// What both halves of a dispatch know: a row's slot, the flag of a chunk of them, and the ring of stages
// in shared memory that each warp has, filled by bulk loads and emptied by bulk stores.
#pragma once

#include "common/peers.cuh"
#include "common/warp.cuh"

namespace ep::dispatch {

constexpr int kMaxChunkTokens = 32;  // a unit's rows are bits of one word

// How a block's shared memory is cut up.
struct Ring {
  int32_t num_warps;
  int32_t num_stages;
  int32_t stage_bytes;      // slot, then the row's K4 output rows and K4 experts
  int32_t converted_bytes;  // one row as it is given out, where that is not as it came

  __host__ __device__ int32_t warp_bytes() const {
    return num_stages * stage_bytes + converted_bytes;
  }
  __host__ __device__ int32_t shared_bytes() const {
    return num_warps * warp_bytes() + barrier_bytes();
  }
  __host__ __device__ int32_t barrier_bytes() const {
    return (num_warps * num_stages * 8 + 127) / 128 * 128;
  }
};

__host__ __device__ inline int32_t slot_bytes(const ep_dispatch_args& args) {
  return args.row_bytes + args.scale_bytes + args.weight_bytes;
}

__host__ __device__ inline int32_t out_row_bytes(const ep_dispatch_args& args) {
  return args.recv_kind == EP_RECV_BF16   ? args.row_bytes * 2
         : args.recv_kind == EP_RECV_FP32 ? args.row_bytes * 4
                                          : args.row_bytes;
}

// Slots begin on whole 128-byte lines: a row across lines that others share costs NVLink 8 %.
__device__ inline int64_t slot_stride(const ep_dispatch_args& args) {
  return (slot_bytes(args) + 127) / 128 * 128;
}

// A flag says for which dispatch it is, and which slots the chunk fills: stamp | first | count.
__device__ inline uint64_t pack_flag(uint32_t stamp, int32_t first, int32_t count) {
  return static_cast<uint64_t>(stamp) << 32 |
         static_cast<uint64_t>(static_cast<uint32_t>(first)) << 6 |
         static_cast<uint64_t>(static_cast<uint32_t>(count));
}
__device__ inline uint32_t flag_stamp(uint64_t flag) { return static_cast<uint32_t>(flag >> 32); }
__device__ inline int32_t flag_first(uint64_t flag) {
  return static_cast<int32_t>(flag >> 6) & 0x3ffffff;
}
__device__ inline int32_t flag_count(uint64_t flag) { return static_cast<int32_t>(flag) & 0x3f; }

// One warp's part of the ring.
struct Stages {
  uint8_t* memory;
  uint64_t* barriers;
  int32_t num_stages;
  int32_t stage_bytes;

  __device__ Stages(uint8_t* shared, const Ring& ring, int32_t warp)
      : memory(shared + ring.barrier_bytes() + warp * ring.warp_bytes()),
        barriers(reinterpret_cast<uint64_t*>(shared) + warp * ring.num_stages),
        num_stages(ring.num_stages),
        stage_bytes(ring.stage_bytes) {
    const int32_t lane = lane_id();
    if (lane < num_stages) ptx::barrier_init(&barriers[lane], 1);
    ptx::fence_barrier_init();
    ptx::fence_proxy_async_shared();
    __syncwarp();
  }
  __device__ uint8_t* stage(int32_t i) const { return memory + i % num_stages * stage_bytes; }
  __device__ uint8_t* converted() const { return memory + num_stages * stage_bytes; }
  __device__ uint64_t* barrier(int32_t i) const { return &barriers[i % num_stages]; }
  __device__ void wait(int32_t i) const { ptx::barrier_wait(barrier(i), i / num_stages & 1); }
};

// Lane 0: start to load token t of the input as a slot; `extra` bytes more are announced.
__device__ inline void load_own_token(const ep_dispatch_args& args, const Stages& stages, int32_t i,
                                      int32_t t, int32_t extra) {
  uint8_t* const stage = stages.stage(i);
  uint64_t* const barrier = stages.barrier(i);
  ptx::barrier_expect(barrier, slot_bytes(args) + extra);
  ptx::bulk_load(stage, args.x + static_cast<int64_t>(t) * args.row_bytes, args.row_bytes, barrier);
  if (args.scale_bytes) {
    const auto* const scales = reinterpret_cast<const uint8_t*>(args.scales);
    ptx::bulk_load(stage + args.row_bytes, scales + static_cast<int64_t>(t) * args.scale_bytes,
                   args.scale_bytes, barrier);
  }
  if (args.weight_bytes) {
    const auto* const weights = reinterpret_cast<const uint8_t*>(args.weights);
    ptx::bulk_load(stage + args.row_bytes + args.scale_bytes,
                   weights + static_cast<int64_t>(t) * args.weight_bytes, args.weight_bytes,
                   barrier);
  }
}

}  // namespace ep::dispatch
