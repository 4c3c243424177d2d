// What the host does before a plan: it checks the sizes, and cuts up scratch memory and work.
#pragma once

#include <algorithm>

#include "common/launch.cuh"
#include "plan/plan.cuh"

namespace ep::plan {

constexpr int64_t kScratchAlignment = 256;

// Cuts the scratch at address `base` up for the largest sizes and returns the bytes that it takes.
inline int64_t cut_scratch(int64_t max_tokens, int32_t num_experts, int32_t num_ranks,
                           uintptr_t base, Scratch* scratch) {
  const int32_t num_local_experts = num_experts / num_ranks;
  layout::Shape largest = layout::make_shape(max_tokens, 1, num_experts, num_ranks, kMaxPlanBlocks);
  largest.num_blocks = kMaxPlanBlocks;  // fewer tokens may take more blocks
  scratch->receive.max_chunks =
      static_cast<int32_t>(ceil_div<int64_t>(max_tokens * num_ranks, kChunkTokens));
  uintptr_t next = base;
  const auto take = [&next](int64_t bytes) {
    const uintptr_t start = next;
    next += round_up<int64_t>(bytes, kScratchAlignment);
    return start;
  };
  scratch->sent_error = reinterpret_cast<int32_t*>(take(16));
  scratch->receive.expert_count =
      reinterpret_cast<int32_t*>(take(4 * int64_t{kMaxPlanBlocks} * num_local_experts));
  scratch->receive.chunk_rows = reinterpret_cast<uint32_t*>(
      take(4 * static_cast<int64_t>(scratch->receive.max_chunks) * num_local_experts));
  const uintptr_t workspace = next;
  return static_cast<int64_t>(workspace - base) +
         layout::cut_workspace(largest, false, workspace, &scratch->layout);
}

// Refuses what the kernels of a plan cannot do.
template <typename Args>
int32_t check_plan(const Args& args, int32_t num_ranks) {
  const int32_t num_local_experts = args.num_experts / num_ranks;
  if (num_local_experts < 1 || num_local_experts > EP_MAX_LOCAL_EXPERTS) {
    return fail(EP_ERR_ARGUMENT, "num_local_experts = %d is not in [1, %d]", num_local_experts,
                EP_MAX_LOCAL_EXPERTS);
  }
  const int32_t blocks_of_kernels[] = {args.num_send_blocks, args.num_receive_blocks};
  for (const int32_t blocks : blocks_of_kernels) {
    if (blocks < 1 || blocks > kMaxPlanBlocks) {
      return fail(EP_ERR_ARGUMENT, "%d blocks of a plan's kernel are not in [1, %d]", blocks,
                  kMaxPlanBlocks);
    }
  }
  return layout::check_input_kind(args.input_kind);
}

// Divides the receive kernel's work among at most so many blocks; returns how many.
template <int kMaxSources>
inline int32_t divide_receive(int32_t max_blocks, int32_t num_local_experts, Receive* receive) {
  const int32_t blocks = std::clamp(max_blocks, 1, receive->max_chunks);
  receive->chunks_per_group = std::clamp(kMaxGroupWords<kMaxSources> / num_local_experts, 1,
                                         ceil_div(receive->max_chunks, blocks));
  return blocks;
}

}  // namespace ep::plan
