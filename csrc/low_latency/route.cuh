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
      // The quotient of an expert by those of a rank: a half is further from the next whole number
      // than the product is from the true one.
      const float of_rank = __fdividef(1.0f, static_cast<float>(common.num_local_experts));
      rank =
          static_cast<int32_t>((static_cast<float>(static_cast<int32_t>(expert)) + 0.5f) * of_rank);
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

  // By the warp: the j-th word of experts for a rank, of the k-th ones in their order; the epoch is
  // still to be written.
  __device__ uint4 expert_word(int32_t of_rank, int32_t j) const {
    const int32_t i = lane_id() - j * kExpertsOfWord;
    const uint32_t expert = rank == of_rank ? local : kNoExpert;
    const bool is_here = i >= 0 && i < kExpertsOfWord;
    const int32_t first = i < 3 ? 0 : i < 6 ? 1 : 2;  // of three times 32 bits
    const uint64_t bits = is_here ? static_cast<uint64_t>(expert) << (12 * i - 32 * first) : 0;
    const auto low = static_cast<uint32_t>(bits), high = static_cast<uint32_t>(bits >> 32);
    const uint32_t x = first == 0 ? low : 0;
    const uint32_t y = first == 0 ? high : first == 1 ? low : 0;
    const uint32_t z = first == 0 ? 0 : first == 1 ? high : low;
    return make_uint4(__reduce_or_sync(kFullWarp, x), __reduce_or_sync(kFullWarp, y),
                      __reduce_or_sync(kFullWarp, z), 0);
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

// Lane k's weight of token t; 0 where weights do not travel.
__device__ inline float load_weight(const ep_low_latency& common, int32_t t) {
  if (!common.has_weights || lane_id() >= common.num_topk || t >= common.num_tokens) return 0.0f;
  return common.weights[static_cast<int64_t>(t) * common.num_topk + lane_id()];
}

// By the warp: lane i gets the j-th word of a token's weights, of which lane k has the k-th; j may
// differ between lanes. The epoch is still to be written.
__device__ inline uint4 weight_word(float weight, int32_t j) {
  const uint32_t bits = weight_bits(weight);
  const auto of = [&](int32_t k) { return __shfl_sync(kFullWarp, bits, k % kWarpSize); };
  const int32_t first = j * kWeightsOfWord;
  return make_uint4(of(first), of(first + 1), of(first + 2), 0);
}

// The i-th expert of a word that expert_word() made.
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
