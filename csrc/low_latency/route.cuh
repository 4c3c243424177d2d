// Which ranks a token goes to, and which of their experts want it.
#pragma once

#include "low_latency/words.cuh"

namespace ep::low_latency {

constexpr int kExpertsOfWord = 8;  // 12 bits each, then the epoch
constexpr int kWeightsOfWord = 3;  // FP32, then the epoch
constexpr uint32_t kNoExpert = 0xfff;

__host__ __device__ inline int32_t expert_words(int32_t num_topk) {
  return ceil_div(num_topk, kExpertsOfWord);
}
__host__ __device__ inline int32_t weight_words(int32_t num_topk) {
  return ceil_div(num_topk, kWeightsOfWord);
}

// One token of this rank, known to a warp: lane k has its k-th expert.
struct Route {
  int32_t rank;    // that owns the expert; -1 where there is none
  int32_t local;   // number of the expert there
  int32_t place;   // of the expert among the token's experts on that rank, ascending
  uint32_t ranks;  // bit r: some expert is on rank r; the same in all lanes
};

__device__ inline int64_t expert_at(const ep_low_latency& common, int64_t i) {
  return common.idx_bytes == 8 ? static_cast<const int64_t*>(common.topk_idx)[i]
                               : static_cast<const int32_t*>(common.topk_idx)[i];
}

// Ranks that token t goes to. What is no expert is dropped.
__device__ inline Route route_of(const ep_low_latency& common, int32_t t) {
  const int32_t lane = lane_id(), num_topk = common.num_topk;
  const int32_t num_experts = common.num_local_experts * common.peers.num_ranks;
  Route route{-1, 0, 0, 0};
  if (lane < num_topk) {
    const int64_t expert = expert_at(common, static_cast<int64_t>(t) * num_topk + lane);
    if (expert >= 0 && expert < num_experts) {
      route.rank = static_cast<int32_t>(expert) / common.num_local_experts;
      route.local = static_cast<int32_t>(expert) - route.rank * common.num_local_experts;
    }
  }
  route.ranks = __reduce_or_sync(kFullWarp, route.rank >= 0 ? 1u << route.rank : 0u);
  return route;
}

// Fills in the places. An expert that stands twice in a token has two, so that none is left out.
__device__ inline void find_places(Route* route, int32_t num_topk) {
  for (int32_t k = 0; k < num_topk; ++k) {
    const int32_t rank = __shfl_sync(kFullWarp, route->rank, k);
    const int32_t local = __shfl_sync(kFullWarp, route->local, k);
    const bool is_before = local < route->local || (local == route->local && k < lane_id());
    route->place += rank == route->rank && is_before;
  }
}

// A weight whose bits are all one, a NaN, travels as another NaN.
__device__ inline uint32_t weight_bits(float weight) {
  const uint32_t bits = __float_as_uint(weight);
  return bits == 0xffffffffu ? 0x7fffffffu : bits;
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
  __device__ void fill(const ep_low_latency& common, int32_t t, Route* route) {
    find_places(route, num_topk);
    __syncwarp();  // what was sent before has been read
    for (int32_t i = lane_id(); i < common.peers.num_ranks * num_topk; i += kWarpSize) {
      experts[i] = kNoExpert;
      weights[i] = 0;
    }
    __syncwarp();
    if (route->rank >= 0) {
      const int32_t i = route->rank * num_topk + route->place;
      experts[i] = static_cast<uint16_t>(route->local);
      if (common.has_weights) {
        weights[i] = weight_bits(common.weights[static_cast<int64_t>(t) * num_topk + lane_id()]);
      }
    }
    __syncwarp();
  }

  // Experts of the j-th word for a rank.
  __device__ uint4 expert_word(int32_t rank, int32_t j, uint32_t epoch) const {
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
    return make_uint4(static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), high, epoch);
  }

  __device__ uint4 weight_word(int32_t rank, int32_t j, uint32_t epoch) const {
    uint32_t values[kWeightsOfWord];
#pragma unroll
    for (int i = 0; i < kWeightsOfWord; ++i) {
      const int32_t k = j * kWeightsOfWord + i;
      values[i] = k < num_topk ? weights[rank * num_topk + k] : 0;
    }
    return make_uint4(values[0], values[1], values[2], epoch);
  }
};

// The i-th expert of a word that expert_word() made.
__device__ inline uint32_t expert_of_word(const uint4& word, int i) {
  const uint64_t low = static_cast<uint64_t>(word.y) << 32 | word.x;
  if (i < 5) return static_cast<uint32_t>(low >> (12 * i)) & kNoExpert;
  if (i == 5) return static_cast<uint32_t>(low >> 60) | (word.z & 0xff) << 4;
  return word.z >> (12 * i - 64) & kNoExpert;
}

__device__ inline uint32_t weight_of_word(const uint4& word, int i) {
  return i == 0 ? word.x : i == 1 ? word.y : word.z;
}

}  // namespace ep::low_latency
