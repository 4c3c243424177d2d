// Low-latency dispatch, sending: the rows, by the row warps.
#pragma once

#include "low_latency/cast.cuh"
#include "low_latency/dispatch/roles.cuh"
#include "low_latency/route.cuh"

namespace ep::low_latency::dispatch {

// What a lane has loaded of a unit of a row: the elements of its word; and, as lane k, the token's
// k-th expert.
struct Input {
  uint4 bits[2];
  int64_t expert;

  __device__ void load(const ep_low_latency_dispatch_args& args, int32_t hidden, const Units& at) {
    const bool is_bf16 = args.format == EP_LOW_LATENCY_BF16;
    const bool is_there = at.word() < hidden / (is_bf16 ? 8 : 16);
    const auto* const x = static_cast<const uint4*>(args.x) +
                          static_cast<int64_t>(at.t) * (hidden / 8) +
                          (is_bf16 ? at.word() : 2 * at.word());
    bits[0] = bits[1] = make_uint4(0, 0, 0, 0);
    ptx::load_global_if(is_there, &bits[0], x);
    ptx::load_global_if(is_there && !is_bf16, &bits[1], x + 1);
    expert = load_expert(args.common, at.t);
  }
};

// By one warp of each token: keeps for combine where it went, and tells the host of a wrong
// routing.
__device__ inline void tell_route(const ep_low_latency_dispatch_args& args, const Route& route,
                                  int32_t t, int64_t expert, uint32_t alive) {
  if (lane_id() == 0) args.handle.ranks[t] = route.ranks & alive;
  const bool is_second = route.is_second();
  if (is_second || route.is_none) {
    leave_notice(args.notice, is_second ? EP_ROUTING_DUPLICATE : EP_ROUTING_OUT_OF_RANGE, t,
                 expert);
  }
}

// By the row warps. The first unit is ready before the warp knows the operation. False after a
// fault.
template <typename Memory>
__device__ inline bool begin_and_send_rows(const ep_low_latency_dispatch_args& args,
                                           const Memory& memory, const Begin& begin,
                                           const RowWords& row, Operation* operation) {
  const ep_low_latency& common = args.common;
  const bool sends = common.phases & EP_LOW_LATENCY_SEND;
  const int32_t num_tokens = sends ? common.num_tokens : 0;
  const bool is_bf16 = args.format == EP_LOW_LATENCY_BF16;
  const bool keeps_books = threadIdx.x / kWarpSize == kBookkeepingWarp;
  bool has_begun = false;
  Units at(all_blocks(), kRowWarps, threadIdx.x / kWarpSize, ceil_div<int32_t>(row.data, kWarpSize),
           1);
  Input next;
  if (at.t < num_tokens) next.load(args, memory.hidden(), at);
#pragma unroll 1
  for (;;) {
    const Units unit = at;
    const Input input = next;
    at.advance();
    if (at.t < num_tokens) next.load(args, memory.hidden(), at);  // on its way meanwhile

    const bool is_there = unit.t < num_tokens, has_word = unit.word() < row.data;
    Route route;
    uint4 word = input.bits[0], scales{};
    if (is_there) {
      route.find(common, input.expert);
      if (is_bf16) {
        if (is_waiting(word)) word.x = 0xffff7fffu;  // eight NaN: the first becomes another
      } else {
        float scale;
        word = quantized(input.bits, args.format != EP_LOW_LATENCY_FP8, &scale);
        if (!has_word) scale = 1.0f;  // beyond the row: padding, which is no waiting pattern
        scales.x = __float_as_uint(__shfl_sync(kFullWarp, scale, 0));
        scales.y = __float_as_uint(__shfl_sync(kFullWarp, scale, 8));
        scales.z = __float_as_uint(__shfl_sync(kFullWarp, scale, 16));
        scales.w = __float_as_uint(__shfl_sync(kFullWarp, scale, 24));
      }
    }
    if (!has_begun) {
      has_begun = true;
      *operation = begin.operation();
      if (!keeps_books) has_read_state(kThreads);
      const bool exchanges = keeps_books && blockIdx.x == gridDim.x - 1;
      // Entries may have to wait for a credit, and so this rank's own credits may not wait for
      // them.
      if (sends && exchanges) ptx::named_arrive(kSentBarrier, kThreads);
      if (sends && !exchanges) ptx::named_barrier(kSentBarrier, kThreads);
      if (!operation->can_begin) break;
      if (exchanges) exchange_credits(memory, begin, *operation);
      if (!sends || !wait_credits(memory, *operation)) break;
    }
    if (!is_there) break;
    memory.delay();
    for_ranks(memory, route.ranks & operation->alive, [&](int32_t r) {
      uint4* const slot = memory.row(r, operation->half, memory.rank(), unit.t);
      if (has_word) ptx::store_word(slot + unit.word(), word);
      if (lane_id() == 0 && !is_bf16) ptx::store_word(slot + row.data + unit.unit, scales);
    });
    if (unit.unit == 0) tell_route(args, route, unit.t, input.expert, operation->alive);
  }
  if (keeps_books) count_operation(common, begin, *operation, kThreads);
  return operation->can_begin;
}

}  // namespace ep::low_latency::dispatch
