// What both halves of a dispatch know: a row's slot, and the flag of a chunk of them.
#pragma once

#include "common/peers.cuh"
#include "common/stages.cuh"

namespace ep::dispatch {

constexpr int kMaxChunkTokens = 32;  // a unit's rows are bits of one word
// Tokens pushed after a chunk before its flag is raised: by then its stores have mostly landed.
constexpr int kFlagLag = 2;

__host__ __device__ inline int32_t slot_bytes(const ep_dispatch_args& args) {
  return args.row_bytes + args.scale_bytes + args.weight_bytes;
}

__host__ __device__ inline int32_t out_row_bytes(const ep_dispatch_args& args) {
  return args.recv_kind == EP_RECV_BF16   ? args.row_bytes * 2
         : args.recv_kind == EP_RECV_FP32 ? args.row_bytes * 4
                                          : args.row_bytes;
}

// Slots begin on whole lines: a row across lines that others share costs NVLink 8 %.
constexpr int32_t kLineBytes = 128;
__device__ inline int64_t slot_stride(const ep_dispatch_args& args) {
  return round_up(slot_bytes(args), kLineBytes);
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

// Lane 0 starts to load token t of the input as a slot, and announces `extra` bytes more.
__device__ inline void load_own_token(const ep_dispatch_args& args, const Stages& stages, int32_t i,
                                      int32_t t, int32_t extra) {
  stages.expect(i, slot_bytes(args) + extra);
  stages.load(i, 0, args.x + static_cast<int64_t>(t) * args.row_bytes, args.row_bytes);
  if (args.scale_bytes) {
    const auto* const scales = reinterpret_cast<const uint8_t*>(args.scales);
    stages.load(i, args.row_bytes, scales + static_cast<int64_t>(t) * args.scale_bytes,
                args.scale_bytes);
  }
  if (args.weight_bytes) {
    const auto* const weights = reinterpret_cast<const uint8_t*>(args.weights);
    stages.load(i, args.row_bytes + args.scale_bytes,
                weights + static_cast<int64_t>(t) * args.weight_bytes, args.weight_bytes);
  }
}

}  // namespace ep::dispatch
