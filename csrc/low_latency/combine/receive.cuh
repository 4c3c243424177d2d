// Low-latency combine, receiving: the partial rows of all ranks, added up.
#pragma once

#include "low_latency/combine/roles.cuh"
#include "low_latency/sums.cuh"

namespace ep::low_latency::combine {

// Ranks that token t comes back from.
__device__ inline uint32_t ranks_of(const ep_low_latency_combine_args& args, int32_t t) {
  return t < args.common.num_tokens ? args.handle.ranks[t] : 0;
}

// A lane's words of a unit of the partial rows, loaded, whatever they are by now.
template <int kHidden, int kRanks>
struct Incoming {
  static constexpr int kMaxRanks = kRanks != 0 ? kRanks : EP_MAX_PEERS;

  uint32_t ranks;  // that the token comes back from
  uint4 words[kMaxRanks];

  __device__ void load(const Memory<kHidden, kRanks>& memory, const Operation& operation,
                       const Units& at, uint32_t ranks_of_token) {
    ranks = at.word() < memory.hidden() / kPer ? ranks_of_token & operation.alive : 0;
    memory.delay();
#pragma unroll
    for (int r = 0; r < kMaxRanks; ++r) {
      words[r] = make_uint4(0, 0, 0, 0);
      ptx::load_word_if(ranks >> r & 1, &words[r], slot(memory, operation, at, r));
    }
  }

  // Waits for all that have not come at once. False after a fault.
  __device__ bool wait(const Memory<kHidden, kRanks>& memory, const Operation& operation,
                       const Units& at) {
    const ep_peers& peers = memory.common.peers;
    Wait wait;
    int32_t missing = -1;
    for (;;) {
      const int32_t last = missing;
      missing = -1;
#pragma unroll
      for (int r = 0; r < kMaxRanks; ++r) {
        if (is_waiting(words[r])) missing = r;
      }
      if (last >= 0 && last != missing) wait.has_come(peers, last);
      if (missing < 0) return true;
      if (!wait.goes_on(peers, EP_PHASE_ROWS, missing, operation.epoch)) return false;
#pragma unroll
      for (int r = 0; r < kMaxRanks; ++r) {
        ptx::load_word_if(is_waiting(words[r]), &words[r], slot(memory, operation, at, r));
      }
    }
  }

  __device__ static uint4* slot(const Memory<kHidden, kRanks>& memory, const Operation& operation,
                                const Units& at, int32_t r) {
    return memory.row(memory.rank(), operation.half, r, at.t) + at.word();
  }
};

// One unit of a combined row, by a warp. False after a fault.
template <int kHidden, int kRanks>
__device__ inline bool receive_unit(const ep_low_latency_combine_args& args,
                                    const Memory<kHidden, kRanks>& memory,
                                    const Operation& operation, const Units& at,
                                    Incoming<kHidden, kRanks>& incoming) {
  const int32_t words_of_row = memory.hidden() / kPer;
  const bool fine = incoming.wait(memory, operation, at);
  if (!__all_sync(kFullWarp, fine)) return false;
  float sums[kPer];
#pragma unroll
  for (int i = 0; i < kPer; ++i) sums[i] = incoming.ranks == 0 ? 0.0f : -0.0f;
#pragma unroll
  for (int r = 0; r < incoming.kMaxRanks; ++r) {
    if (!(incoming.ranks >> r & 1)) continue;
    ptx::store_word(incoming.slot(memory, operation, at, r), waiting_word());
    add(sums, incoming.words[r]);
  }
  if (at.word() < words_of_row) {
    ptx::store_global(static_cast<uint4*>(args.combined_x) +
                          static_cast<int64_t>(at.t) * words_of_row + at.word(),
                      pack<__nv_bfloat16>(sums));
  }
  return true;
}

template <int kHidden, int kRanks>
__device__ inline void receive(const ep_low_latency_combine_args& args,
                               const Memory<kHidden, kRanks>& memory, const Operation& operation) {
  // With weights the send has checked them.
  if (is_last_warp() && !args.common.has_weights) check_headers(args, memory, operation);
  __syncwarp();
  // The last warps first, which had the least to send.
  Units at(all_blocks(), kWarps, kWarps - 1 - threadIdx.x / kWarpSize,
           ceil_div<int32_t>(memory.hidden() / kPer, kWarpSize), 1);
  Incoming<kHidden, kRanks> next;
  next.load(memory, operation, at, ranks_of(args, at.t));
#pragma unroll 1
  while (at.t < args.common.num_tokens) {
    const Units unit = at;
    Incoming<kHidden, kRanks> incoming = next;
    at.advance();
    next.load(memory, operation, at, ranks_of(args, at.t));
    if (!receive_unit(args, memory, operation, unit, incoming)) return;
  }
}

}  // namespace ep::low_latency::combine
