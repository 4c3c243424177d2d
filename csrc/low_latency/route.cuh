// Which ranks a token goes to, and which of their experts want it.
#pragma once

#include "low_latency/epochs.cuh"

namespace ep::low_latency {

constexpr uint32_t kNoExpert = 0xfff;

// A token of this rank, known to a warp: lane k has the k-th of its experts.
struct Route {
  int32_t rank = -1;     // that owns the expert; -1 where there is none
  int32_t local = 0;     // number of the expert there
  uint32_t ranks = 0;    // bit r: some expert is on rank r; the same in all lanes
  bool is_none = false;  // what was given for an expert is none, and not -1

  // expert: what load_expert() gave. What is none is dropped.
  __device__ void find(const ep_low_latency& common, int64_t expert) {
    if (expert >= 0 && expert < common.num_local_experts * common.peers.num_ranks) {
      rank = quotient(static_cast<int32_t>(expert), common.num_local_experts);
      local = static_cast<int32_t>(expert) - rank * common.num_local_experts;
    }
    is_none = rank < 0 && expert != -1;
    ranks = __reduce_or_sync(kFullWarp, rank >= 0 ? 1u << rank : 0u);
  }

  // By the warp: whether this lane's expert stands before it already.
  __device__ bool is_second() const {
    const uint32_t same = __match_any_sync(kFullWarp, rank << 16 | local);
    return rank >= 0 && same & ((1u << lane_id()) - 1);
  }
};

// Lane k's expert of token t, as it was given; -1 behind the last.
__device__ inline int64_t load_expert(const ep_low_latency& common, int32_t t) {
  if (lane_id() >= common.num_topk || t >= common.num_tokens) return -1;
  const int64_t i = static_cast<int64_t>(t) * common.num_topk + lane_id();
  return common.idx_bytes == 8 ? static_cast<const int64_t*>(common.topk_idx)[i]
                               : static_cast<const int32_t*>(common.topk_idx)[i];
}

// Tells the host of an expert that is none, or that a token has twice. Of several notices one whole
// one stays: 16 bytes are written at once.
__device__ __noinline__ inline void leave_notice(ep_notice* notice, int32_t kind, int32_t t,
                                                 int64_t expert) {
  volatile int32_t* const code = &notice->code;
  if (*code != EP_NOTICE_NONE) return;
  const int64_t shown =
      max(min(expert, static_cast<int64_t>(INT32_MAX)), static_cast<int64_t>(INT32_MIN));
  ptx::store_word(reinterpret_cast<uint4*>(notice->routing_error),
                  make_uint4(kind, t, lane_id(), static_cast<uint32_t>(shown)));
  __threadfence_system();
  *code = EP_NOTICE_ROUTING;
}

// A weight whose bits are all one, a NaN, travels as another NaN.
__device__ inline uint32_t weight_bits(float weight) {
  const uint32_t bits = __float_as_uint(weight);
  return bits == 0xffffffffu ? 0x7fffffffu : bits;
}

// A word of the weights that stand at `weights`, of which the first `count` are the token's. The
// epoch is still to be written.
__device__ inline uint4 weight_word(const float* weights, int32_t count) {
  uint32_t bits[kWeightsOfWord];
#pragma unroll
  for (int k = 0; k < kWeightsOfWord; ++k) bits[k] = k < count ? weight_bits(weights[k]) : 0;
  return make_uint4(bits[0], bits[1], bits[2], 0);
}

// A word of a token's entry: numbers of experts on a rank, or kNoExpert, of 12 bits each. The epoch
// is still to be written.
__device__ inline uint4 pack_experts(const uint32_t (&e)[kExpertsOfWord]) {
  return make_uint4(e[0] | e[1] << 12 | e[2] << 24, e[2] >> 8 | e[3] << 4 | e[4] << 16 | e[5] << 28,
                    e[5] >> 4 | e[6] << 8 | e[7] << 20, 0);
}

// The i-th of them.
__device__ inline uint32_t expert_of_word(const uint4& word, int32_t i) {
  const bool is_first = i < 3;  // its 12 bits end in the second of three times 32 bits
  const uint64_t pair =
      static_cast<uint64_t>(is_first ? word.y : word.z) << 32 | (is_first ? word.x : word.y);
  return static_cast<uint32_t>(pair >> (12 * i - (is_first ? 0 : 32))) & kNoExpert;
}

__device__ inline uint32_t weight_of_word(const uint4& word, int i) {
  return i == 0 ? word.x : i == 1 ? word.y : word.z;
}

}  // namespace ep::low_latency
