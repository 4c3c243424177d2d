// Low-latency dispatch between nodes, sending: to each rank the rows that go there.
#pragma once

#include "low_latency/cast.cuh"
#include "low_latency/dispatch/roles.cuh"
#include "low_latency/route.cuh"
#include "nodes/low_latency/pack.cuh"

namespace ep::low_latency::far {

using dispatch::RowWords;

// Which tokens of this rank go to which ranks: a bitmap for each rank, and from what row on
// those to the rank k after stand among all.
struct Sends {
  int32_t* first;  // [R + 1]
  Bitmaps tokens;

  static __host__ __device__ int64_t bytes(int32_t num_ranks, int32_t max_tokens) {
    return first_bytes(num_ranks) + Bitmaps::bytes(num_ranks, max_tokens);
  }
  static __host__ __device__ int64_t first_bytes(int32_t num_ranks) {
    return round_up<int64_t>(4 * (num_ranks + 1ll), 16);
  }
  __device__ Sends(uint8_t* shared, int32_t num_ranks, int32_t num_tokens)
      : first(reinterpret_cast<int32_t*>(shared)),
        tokens(shared + first_bytes(num_ranks), num_tokens) {}

  // By all threads of a block.
  __device__ void find(const Memory& memory) const {
    const ep_low_latency& common = memory.common;
    const int32_t num_ranks = memory.num_ranks(), num_tokens = common.num_tokens;
    tokens.clear(num_ranks, threadIdx.x, kThreads);
    __syncthreads();
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < num_tokens * common.num_topk; i += kThreads) {
      const Expert expert(common, num_ranks, expert_at(common, i));
      if (expert.rank < 0 || !is_alive(common, expert.rank)) continue;
      tokens.set(expert.rank, i / common.num_topk);
    }
    __syncthreads();
    if (threadIdx.x < kWarpSize) {
      prefix_sums(first, num_ranks,
                  [&](int32_t k) { return tokens.count_before(memory.rank_after(k), num_tokens); });
    }
    __syncthreads();
  }
};

// As leave_notice of one host, which has another place for it. One of all threads of an operation.
__device__ __noinline__ inline void leave_far_notice(const ep_low_latency_dispatch_args& args,
                                                     uint32_t epoch, int32_t kind, int32_t t,
                                                     int32_t k, int64_t expert) {
  auto* const notice = reinterpret_cast<volatile int32_t*>(args.notice);
  auto* const state = reinterpret_cast<FarState*>(args.common.state);
  if (notice[0] != EP_NOTICE_NONE || atomicExch(&state->noticed, epoch) == epoch) return;
  const int64_t shown =
      max(min(expert, static_cast<int64_t>(INT32_MAX)), static_cast<int64_t>(INT32_MIN));
  volatile int32_t* const error = notice + EP_NODES_NOTICE_ERROR;
  error[0] = kind, error[1] = t, error[2] = k, error[3] = static_cast<int32_t>(shown);
  __threadfence_system();
  notice[0] = EP_NOTICE_ROUTING;
}

// By a warp for each token: keeps for combine where it comes back from, and tells the host of a
// wrong routing.
__device__ inline void keep_sends(const ep_low_latency_dispatch_args& args, const Memory& memory,
                                  const FarOperation& operation, const Sends& sends) {
  const ep_low_latency& common = args.common;
  const int32_t num_topk = common.num_topk, lane = lane_id();
#pragma unroll 1
  for (int32_t t = threadIdx.x / kWarpSize * gridDim.x + blockIdx.x; t < common.num_tokens;
       t += kWarps * gridDim.x) {
    const int64_t given = load_expert(common, t);
    const Expert expert(common, memory.num_ranks(), given);
    const bool is_second = expert.is_second();
    if (is_second || expert.is_none) {
      leave_far_notice(args, operation.epoch,
                       is_second ? EP_ROUTING_DUPLICATE : EP_ROUTING_OUT_OF_RANGE, t, lane, given);
    }
    const bool goes = expert.rank >= 0 && is_alive(common, expert.rank);
    const int32_t to = goes ? expert.rank : -1 - lane;  // those that go nowhere are all different
    const uint32_t same = __match_any_sync(kFullWarp, to);
    const bool is_first = goes && (same & ((1u << lane) - 1)) == 0;
    int32_t back = INT32_MAX;
    if (is_first) back = to * common.max_tokens + sends.tokens.count_before(to, t);
    int32_t place = 0;
#pragma unroll 1
    for (int32_t k = 0; k < num_topk; ++k) {
      const int32_t other = __shfl_sync(kFullWarp, back, k);
      place += other < back || (other == back && k < lane);
    }
    if (lane >= num_topk) continue;
    args.handle.ranks[static_cast<int64_t>(t) * num_topk + place] = is_first ? back : -1;
  }
}

__device__ inline int32_t entry_words(const ep_low_latency& common) {
  return expert_words(common.num_topk) + (common.has_weights ? weight_words(common.num_topk) : 0);
}

// The header, and of each row the words with its experts and weights. The first one ends in the
// token's number.
__device__ inline void send_heads(const ep_low_latency_dispatch_args& args, const Memory& memory,
                                  const FarOperation& operation, const Sends& sends) {
  const ep_low_latency& common = args.common;
  const int32_t num_topk = common.num_topk, words = entry_words(common);
  const int32_t num_expert_words = expert_words(num_topk);
#pragma unroll 1
  for (int32_t k = blockIdx.x; k < memory.num_ranks(); k += gridDim.x) {
    const int32_t r = memory.rank_after(k);
    if (!is_alive(common, r)) continue;
    uint4* const head = memory.head_to_write(operation.half, k);
    const int32_t count = sends.first[k + 1] - sends.first[k];
    if (threadIdx.x == 0) {
      const Header own = dispatch::own_header(args);
      ptx::store_global(head, make_uint4(count, own.call, own.of, own.num_tokens));
    }
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < common.num_tokens * words; i += kThreads) {
      const int32_t t = i / words, j = i - t * words;
      if (!sends.tokens.test(r, t)) continue;
      const int64_t at = static_cast<int64_t>(t) * num_topk;
      const int32_t first =
          j < num_expert_words ? j * kExpertsOfWord : (j - num_expert_words) * kWeightsOfWord;
      uint4 word = j < num_expert_words
                       ? expert_word_at(common, at + first, num_topk - first, r)
                       : weight_word(common.weights + at + first, num_topk - first);
      if (j == 0) word.w = t;
      ptx::store_global(head + 1 + sends.tokens.count_before(r, t) * words + j, word);
    }
    __syncthreads();
    memory.send_head(operation.half, k, 16 * (1 + static_cast<int64_t>(count) * words),
                     operation.head_value(), network::BlockGroup());
  }
}

// Packs words of a row: by a warp, a unit of them. See the send phase of one host.
__device__ inline void pack_unit(const ep_low_latency_dispatch_args& args, const RowWords& row,
                                 int32_t t, int32_t unit, uint4* to) {
  const int32_t at = unit * kWarpSize + lane_id(), hidden = args.common.hidden;
  const bool is_bf16 = args.format == EP_LOW_LATENCY_BF16, has_word = at < row.data;
  const auto* const x = static_cast<const uint4*>(args.x) + static_cast<int64_t>(t) * (hidden / 8) +
                        (is_bf16 ? at : 2 * at);
  uint4 bits[2] = {};
  ptx::load_global_if(has_word, &bits[0], x);
  if (is_bf16) {
    if (!has_word) return;
    if (is_waiting(bits[0])) bits[0].x = 0xffff7fffu;  // as on one host: the same bits everywhere
    ptx::store_global(to + at, bits[0]);
    return;
  }
  ptx::load_global_if(has_word, &bits[1], x + 1);
  if (!has_word) bits[0] = bits[1] = make_uint4(0, 0, 0, 0);
  float scale;
  const uint4 word = quantized(bits, args.format != EP_LOW_LATENCY_FP8, &scale);
  if (!has_word) scale = 1.0f;  // beyond the row: padding
  uint4 scales;
  scales.x = __float_as_uint(__shfl_sync(kFullWarp, scale, 0));
  scales.y = __float_as_uint(__shfl_sync(kFullWarp, scale, 8));
  scales.z = __float_as_uint(__shfl_sync(kFullWarp, scale, 16));
  scales.w = __float_as_uint(__shfl_sync(kFullWarp, scale, 24));
  if (has_word) ptx::store_global(to + at, word);
  if (lane_id() == 0) ptx::store_global(to + row.data + unit, scales);
}

// By all threads of a block. False after a fault.
__device__ inline bool send(const ep_low_latency_dispatch_args& args, const Memory& memory,
                            const FarOperation& operation, const RowWords& row, uint8_t* shared) {
  const Sends sends(shared, memory.num_ranks(), args.common.num_tokens);
  sends.find(memory);
  if (!wait_credits(memory, operation)) return false;
  send_heads(args, memory, operation, sends);
  keep_sends(args, memory, operation, sends);
  const int32_t units = ceil_div<int32_t>(row.data, kWarpSize);
  return send_rows(
      memory, operation, sends.first, row.all,
      [&](int32_t k, int32_t begin, int32_t end, uint4* to) {
        const int32_t r = memory.rank_after(k);
#pragma unroll 1
        for (int32_t u = threadIdx.x / kWarpSize; u < (end - begin) * units; u += kWarps) {
          const int32_t i = u / units;
          pack_unit(args, row, sends.tokens.select(r, begin + i), u - i * units, to + i * row.all);
        }
        return true;
      });
}

}  // namespace ep::low_latency::far
