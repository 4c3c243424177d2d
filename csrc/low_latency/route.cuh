// Which ranks a token goes to, and which of their experts want it.
#pragma once

#include "low_latency/epochs.cuh"

namespace ep::low_latency {

constexpr uint32_t kNoExpert = 0xfff;

// A token of this rank, known to a warp: lane k has the k-th of its experts.
class Route {
 public:
  int32_t rank = -1;   // that owns the expert; -1 where there is none
  int32_t local = 0;   // number of the expert there
  int32_t place = 0;   // of the expert among the token's experts on that rank, ascending
  uint32_t ranks = 0;  // bit r: some expert is on rank r; the same in all lanes
  bool is_none = false;  // what was given for an expert is none, and not -1

  // expert: what load_expert() gave. What is none is dropped.
  __device__ void find(const ep_low_latency& common, int64_t expert) {
    if (expert >= 0 && expert < common.num_local_experts * common.peers.num_ranks) {
      // The quotient of an expert by those of a rank: a half is further from the next whole number
      // than the product is from the true one.
      const float of_rank = __fdividef(1.0f, static_cast<float>(common.num_local_experts));
      rank = static_cast<int32_t>((static_cast<float>(expert) + 0.5f) * of_rank);
      local = static_cast<int32_t>(expert) - rank * common.num_local_experts;
    }
    is_none = rank < 0 && expert != -1;
    ranks = __reduce_or_sync(kFullWarp, rank >= 0 ? 1u << rank : 0u);
  }

  // Fills in the places. An expert that stands twice in a token has two, so that none is left out.
  // Returns whether this lane's is the second of them.
  __device__ bool find_places(int32_t num_topk) {
    const int32_t key = rank << 16 | local;
    bool is_second = false;
#pragma unroll 1
    for (int32_t k = 0; k < num_topk; ++k) {
      const int32_t other = __shfl_sync(kFullWarp, key, k);
      const bool is_same = other == key && k < lane_id();
      place += other >> 16 == rank && (other < key || is_same);
      is_second |= is_same;
    }
    return is_second && rank >= 0;
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
  const int64_t shown = max(min(expert, static_cast<int64_t>(INT32_MAX)),
                            static_cast<int64_t>(INT32_MIN));
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

// The entries of one token for each rank, in shared memory of a warp.
struct Entries {
  uint16_t* experts;  // [R, K]
  uint32_t* weights;  // [R, K]
  int32_t num_topk;

  static constexpr __host__ __device__ int32_t bytes(int32_t num_ranks, int32_t num_topk) {
    return round_up<int32_t>(num_ranks * num_topk * 6, 16);
  }
  __device__ Entries(uint8_t* shared, const ep_low_latency& common)
      : experts(reinterpret_cast<uint16_t*>(shared + common.peers.num_ranks * common.num_topk *
                                                         sizeof(uint32_t))),
        weights(reinterpret_cast<uint32_t*>(shared)),
        num_topk(common.num_topk) {}

  // By the warp.
  __device__ void fill(const Route& route, int32_t num_ranks, float weight) {
    __syncwarp();  // what was sent before has been read
#pragma unroll 1
    for (int32_t i = lane_id(); i < num_ranks * num_topk; i += kWarpSize) {
      experts[i] = kNoExpert;
      weights[i] = 0;
    }
    __syncwarp();
    if (route.rank >= 0) {
      const int32_t i = route.rank * num_topk + route.place;
      experts[i] = static_cast<uint16_t>(route.local);
      weights[i] = weight_bits(weight);
    }
    __syncwarp();
  }

  // The j-th word of experts for a rank; the epoch is still to be written.
  __device__ uint4 expert_word(int32_t rank, int32_t j) const {
    uint64_t low = 0;
    uint32_t high = 0;
#pragma unroll
    for (int i = 0; i < kExpertsOfWord; ++i) {
      const int32_t k = j * kExpertsOfWord + i;
      const uint32_t expert = k < num_topk ? experts[rank * num_topk + k] : kNoExpert;
      if (i < 5) {
        low |= static_cast<uint64_t>(expert) << (12 * i);
      } else if (i == 5) {
        low |= static_cast<uint64_t>(expert) << 60;
        high |= expert >> 4;
      } else {
        high |= expert << (12 * i - 64);
      }
    }
    return make_uint4(static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), high, 0);
  }

  __device__ uint4 weight_word(int32_t rank, int32_t j) const {
    uint32_t values[kWeightsOfWord];
#pragma unroll
    for (int i = 0; i < kWeightsOfWord; ++i) {
      const int32_t k = j * kWeightsOfWord + i;
      values[i] = k < num_topk ? weights[rank * num_topk + k] : 0;
    }
    return make_uint4(values[0], values[1], values[2], 0);
  }
};

// The i-th expert of a word that expert_word() made.
__device__ inline uint32_t expert_of_word(const uint4& word, int32_t i) {
  const bool is_first = i < 3;  // its 12 bits end in the second of three times 32 bits
  const uint64_t pair = static_cast<uint64_t>(is_first ? word.y : word.z) << 32 |
                        (is_first ? word.x : word.y);
  return static_cast<uint32_t>(pair >> (12 * i - (is_first ? 0 : 32))) & kNoExpert;
}

__device__ inline uint32_t weight_of_word(const uint4& word, int i) {
  return i == 0 ? word.x : i == 1 ? word.y : word.z;
}

}  // namespace ep::low_latency
