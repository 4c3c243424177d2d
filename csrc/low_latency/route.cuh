// Which ranks a token goes to, and which of their experts want it.
#pragma once

#include "low_latency/epochs.cuh"

namespace ep::low_latency {

constexpr uint32_t kNoExpert = 0xfff;

// Where an expert is.
struct Expert {
  int32_t rank = -1;     // that owns it; -1 where there is none
  int32_t local = 0;     // its number there
  bool is_none = false;  // what was given is neither an expert nor -1

  Expert() = default;
  // expert: as it was given.
  __device__ Expert(const ep_low_latency& common, int32_t num_ranks, int64_t expert) {
    locate(common, num_ranks, expert);
  }

  __device__ void locate(const ep_low_latency& common, int32_t num_ranks, int64_t expert) {
    if (expert >= 0 && expert < common.num_local_experts * num_ranks) {
      rank = quotient(static_cast<int32_t>(expert), common.num_local_experts);
      local = static_cast<int32_t>(expert) - rank * common.num_local_experts;
    }
    is_none = rank < 0 && expert != -1;
  }

  // By the warp: whether an earlier lane has the same expert.
  __device__ bool is_second() const {
    const uint32_t same = __match_any_sync(kFullWarp, rank << 16 | local);
    return rank >= 0 && same & ((1u << lane_id()) - 1);
  }
};

// A token of this rank, known to a warp: lane k has the k-th of its experts.
struct Route : Expert {
  uint32_t ranks = 0;  // bit r: some expert is on rank r; the same in all lanes

  // expert: what load_expert() gave.
  __device__ void find(const ep_low_latency& common, int64_t expert) {
    locate(common, common.peers.num_ranks, expert);
    ranks = __reduce_or_sync(kFullWarp, rank >= 0 ? 1u << rank : 0u);
  }
};

// The i-th entry of topk_idx, as it was given.
__device__ inline int64_t expert_at(const ep_low_latency& common, int64_t i) {
  return common.idx_bytes == 8 ? static_cast<const int64_t*>(common.topk_idx)[i]
                               : static_cast<const int32_t*>(common.topk_idx)[i];
}

// Lane k's expert of token t, as it was given; -1 after the last.
__device__ inline int64_t load_expert(const ep_low_latency& common, int32_t t) {
  if (lane_id() >= common.num_topk || t >= common.num_tokens) return -1;
  return expert_at(common, static_cast<int64_t>(t) * common.num_topk + lane_id());
}

// Tells the host of an expert that is none, or that a token has twice. Where several threads do,
// the notice of one stays, whole: 16 bytes are written at once.
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

// The word, for a rank, of the experts that stand at `experts`, of which the first `count` are the
// token's.
template <typename Idx>
__device__ inline uint4 expert_word(const ep_low_latency& common, const Idx* experts, int32_t count,
                                    int32_t rank) {
  Idx expert[kExpertsOfWord];
#pragma unroll
  for (int k = 0; k < kExpertsOfWord; ++k) expert[k] = k < count ? experts[k] : -1;
  const int64_t first = rank * common.num_local_experts;
  uint32_t local[kExpertsOfWord];
#pragma unroll
  for (int k = 0; k < kExpertsOfWord; ++k) {
    const auto i = static_cast<uint64_t>(expert[k] - first);  // large for what is before them
    const bool is_here = i < static_cast<uint64_t>(common.num_local_experts);
    local[k] = is_here ? static_cast<uint32_t>(i) : kNoExpert;
  }
  return pack_experts(local);
}

// The same, of the entries of topk_idx from `at` on.
__device__ inline uint4 expert_word_at(const ep_low_latency& common, int64_t at, int32_t count,
                                       int32_t rank) {
  return common.idx_bytes == 8
             ? expert_word(common, static_cast<const int64_t*>(common.topk_idx) + at, count, rank)
             : expert_word(common, static_cast<const int32_t*>(common.topk_idx) + at, count, rank);
}

// The i-th expert of a word.
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
