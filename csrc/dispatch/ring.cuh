// How a dispatch cuts up the shared memory of its blocks. Host code.
#pragma once

#include <algorithm>

#include "common/launch.cuh"
#include "dispatch/slots.cuh"

namespace ep::dispatch {

constexpr int kMaxWarps = 8;
constexpr int kMaxStages = 16;
// It leaves room for a block of a plan's second kernel. More brings nothing.
constexpr int kMaxShared = 184 * 1024;

inline Ring divide_stages(const ep_dispatch_args& args) {
  Ring ring{};
  const int32_t wanted = slot_bytes(args) + 2 * args.routing.num_topk4 * 4;
  ring.stage_bytes = round_up(wanted, kStageAlignment);
  ring.converted_bytes = args.recv_kind == EP_RECV_BYTES || args.num_expand_blocks == 0
                             ? 0
                             : round_up(out_row_bytes(args), kStageAlignment);
  constexpr int32_t kRoom = kMaxShared - 1024;
  // Three stages a warp, or two where a row is so long that not even one warp has three.
  for (int32_t stages = 3; stages >= 2 && ring.num_warps == 0; --stages) {
    ring.num_warps =
        std::min(kMaxWarps, kRoom / (stages * ring.stage_bytes + ring.converted_bytes));
    if (stages == 2) ring.num_warps = std::min(ring.num_warps, 1);
  }
  if (ring.num_warps > 0) {
    ring.num_stages =
        std::min(kMaxStages, (kRoom / ring.num_warps - ring.converted_bytes) / ring.stage_bytes);
  }
  return ring;
}

// Refuses what the kernel cannot move; else *ring is how it does.
inline int32_t make_ring(const ep_dispatch_args& args, Ring* ring) {
  if (args.row_bytes % 16 || args.scale_bytes % 16 || args.weight_bytes % 16) {
    return fail(EP_ERR_ARGUMENT,
                "rows of %d, scales of %d and weights of %d bytes: all must be "
                "multiples of 16",
                args.row_bytes, args.scale_bytes, args.weight_bytes);
  }
  if (args.chunk_tokens <= kFlagLag || args.chunk_tokens > kMaxChunkTokens) {
    return fail(EP_ERR_ARGUMENT, "chunk_tokens = %d is not in [%d, %d]", args.chunk_tokens,
                kFlagLag + 1, kMaxChunkTokens);
  }
  if (args.routing.num_topk > kWarpSize) {
    return fail(EP_ERR_ARGUMENT, "num_topk = %d is more than %d", args.routing.num_topk, kWarpSize);
  }
  *ring = divide_stages(args);
  if (ring->num_warps == 0) {
    return fail(EP_ERR_ARGUMENT, "a row of %d bytes does not fit the stages of shared memory",
                args.row_bytes);
  }
  return EP_OK;
}

}  // namespace ep::dispatch
