// The first kernel of a plan. It finds which token goes where, and into which slot
// (routing/slots.cuh). It writes each token's local experts into the memory of the ranks it goes
// to, then a header with the counts, then a flag. Where copy engines move all rows, it also writes
// which of them matter.
#pragma once

#include "plan/plan.cuh"

namespace ep::plan {

// Tells each rank which tokens of this block's chunks go there, and the slot of the first of each
// chunk. Called after place_tokens.
__device__ inline void send_token_bits(const ep_plan_args& args, const layout::Shape& shape,
                                       const layout::Workspace& workspace) {
  const ep_peers& peers = args.peers;
  const int32_t num_ranks = peers.num_ranks;
  const int32_t begin = blockIdx.x * shape.chunks_per_block;
  const int32_t end = min(begin + shape.chunks_per_block, shape.num_chunks);
  const int64_t of_this_rank =
      static_cast<int64_t>(peers.rank) * ceil_div(args.max_tokens, kChunkTokens);
  for (int32_t i = begin * num_ranks + threadIdx.x; i < end * num_ranks; i += kThreads) {
    const int32_t chunk = i / num_ranks, r = i % num_ranks;
    const uint32_t tokens = workspace.chunk_tokens[i];
    const int64_t first = static_cast<int64_t>(chunk) * kChunkTokens + __ffs(tokens) - 1;
    const int32_t slot = tokens != 0 ? args.routing.send_slot[first * num_ranks + r] : 0;
    uint32_t* const bits = in_memory_of<uint32_t>(peers, r, args.token_bits_offset);
    bits[2 * (of_this_rank + chunk)] = tokens;
    bits[2 * (of_this_rank + chunk) + 1] = static_cast<uint32_t>(slot);
  }
}

// kTokenBits: whether copy engines move the rows. Without it takes fewer registers.
template <typename Input, bool kTokenBits>
__global__ void __launch_bounds__(kThreads)
    send_kernel(const __grid_constant__ ep_plan_args args, const Input input,
                const layout::Shape shape, const Scratch scratch) {
  extern __shared__ int32_t shared[];
  const ep_peers& peers = args.peers;
  const int32_t num_ranks = peers.num_ranks, num_topk = args.routing.num_topk;
  const int32_t experts_per_rank = args.num_experts / num_ranks;
  const int32_t epoch = epoch_of(peers);
  uint32_t* const counters = reinterpret_cast<uint32_t*>(args.counters);
  if (blockIdx.x == 0 && threadIdx.x == 0 && !args.is_begun) begin_operation(peers);

  layout::count_tokens<false>(input, shape, scratch.layout, args.routing.topk_idx, shared);
  bool may_send = !aborted(peers);
  if (may_send && static_cast<int32_t>(threadIdx.x) < num_ranks) {
    may_send = wait_credit(peers, args.credit_offset, epoch, threadIdx.x);
  }
  // A block that may not send has set the fault, which ends the others' wait.
  if (!__syncthreads_and(may_send)) return;
  if (!grid_barrier(peers, &counters[kSendBarrier], gridDim.x)) return;

  layout::place_tokens(shape, scratch.layout, args.routing.num_sent, nullptr,
                       args.routing.send_slot);
  if (blockIdx.x == 0) {
    layout::pick_first_error(shape, scratch.layout.first_error, scratch.sent_error);
  }
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * shape.chunks_per_block * kChunkTokens;
  const int64_t end = min(begin + shape.chunks_per_block * kChunkTokens,
                          static_cast<int64_t>(args.routing.num_tokens));
  const int64_t row_entries = static_cast<int64_t>(num_ranks) * num_topk;
  for (int64_t i = begin * row_entries + threadIdx.x; i < end * row_entries; i += kThreads) {
    const int32_t k = i % num_topk;
    const int64_t t = i / row_entries;
    // Each rank begins with another one, so that not all write to the same one at a time.
    const int32_t r = (i / num_topk + peers.rank + 1) % num_ranks;
    const int32_t slot = args.routing.send_slot[t * num_ranks + r];
    if (slot < 0) continue;
    const int32_t local = args.routing.topk_idx[t * num_topk + k] - r * experts_per_rank;
    int32_t* const idx = in_memory_of<int32_t>(peers, r, args.idx_offset);
    idx[(static_cast<int64_t>(peers.rank) * args.max_tokens + slot) * num_topk + k] =
        local >= 0 && local < experts_per_rank ? local : -1;
  }

  if constexpr (kTokenBits) send_token_bits(args, shape, scratch.layout);

  if (!is_last_block(&args.counters[kSendEnd], gridDim.x)) return;
  if (threadIdx.x == 0) counters[kSendBarrier] = 0;
  if (static_cast<int32_t>(threadIdx.x) < num_ranks) {
    const int32_t r = threadIdx.x;
    int32_t* const header =
        in_memory_of<int32_t>(peers, r, args.header_offset) + peers.rank * kHeaderInts;
    header[0] = args.routing.num_sent[r];
    header[1] = args.asked_tokens;
    for (int i = 0; i < EP_NUM_FIELDS; ++i) header[2 + i] = field_of(args, i);
    signal(peers, in_memory_of<uint32_t>(peers, r, args.flag_offset) + peers.rank,
           static_cast<uint32_t>(epoch));
  }
}

}  // namespace ep::plan
