// Low-latency dispatch, sending: what ranks have to know of the rows, by the entry warps.
#pragma once

#include "low_latency/dispatch/roles.cuh"
#include "low_latency/route.cuh"

namespace ep::low_latency::dispatch {

// What the entry warps send of one token: words that say which experts want it, and its weights.
// What can be is ready before the operation is known.
template <typename Memory>
class Selection {
 public:
  __device__ Selection(const ep_low_latency& common, const Memory& memory)
      : common_(common), memory_(memory) {
    num_expert_words_ = expert_words(common.num_topk);
    num_words_ = num_expert_words_ + (common.has_weights ? weight_words(common.num_topk) : 0);
  }

  __device__ void prepare(int32_t t) {
    t_ = t;
    expert_ = load_expert(common_, t);
    weight_ = load_weight(common_, t);
    route_ = Route();
    route_.find(common_, expert_);
    take(0);
  }

  // To every rank, those that the token does not go to too.
  __device__ void send(const ep_low_latency_dispatch_args& args, const Operation& operation) {
    memory_.delay();
#pragma unroll 1
    for (int32_t first = 0; first < num_words_ * memory_.num_ranks(); first += kWarpSize) {
      if (first != 0) take(first);
      word_.w = operation.epoch;
      if (has_word_ && operation.alive >> to_ & 1) {
        ptx::store_word(memory_.entry(to_, operation.half, memory_.rank(), t_) + j_, word_);
      }
    }
    if (lane_id() == 0) args.handle.ranks[t_] = route_.ranks & operation.alive;
    const bool is_second = route_.is_second();
    if (is_second || route_.is_none) {
      leave_notice(args.notice, is_second ? EP_ROUTING_DUPLICATE : EP_ROUTING_OUT_OF_RANGE, t_,
                   expert_);
    }
  }

 private:
  const ep_low_latency& common_;
  const Memory& memory_;
  int32_t num_expert_words_, num_words_, t_;
  Route route_;
  int64_t expert_;
  float weight_;
  // Of this lane: the j-th word for rank `to`.
  uint4 word_;
  int32_t to_, j_;
  bool has_word_;

  // By the warp: makes the words from the first-th on.
  __device__ void take(int32_t first) {
    const int32_t i = first + lane_id(), behind = i / num_words_;
    j_ = i - behind * num_words_;
    has_word_ = behind < memory_.num_ranks();
    to_ = has_word_ ? memory_.rank_behind(behind + 1) : 0;
    word_ = weight_word(weight_, max(j_ - num_expert_words_, 0));
#pragma unroll 1
    for (int32_t b = 0; b < memory_.num_ranks(); ++b) {
#pragma unroll 1
      for (int32_t j = 0; j < num_expert_words_; ++j) {
        const uint4 word = route_.expert_word(memory_.rank_behind(b + 1), j);
        if (behind == b && j_ == j) word_ = word;
      }
    }
  }
};

// By the entry warps. False after a fault.
template <typename Memory>
__device__ inline bool begin_and_send_entries(const ep_low_latency_dispatch_args& args,
                                              const Memory& memory, const Begin& begin,
                                              Operation* operation) {
  const ep_low_latency& common = args.common;
  const bool sends = common.phases & EP_LOW_LATENCY_SEND;
  const int32_t of_entries = static_cast<int32_t>(threadIdx.x) / kWarpSize - kRowWarps;
  const int32_t num_tokens = sends ? common.num_tokens : 0;
  const int32_t stride = kEntryWarps * gridDim.x;
  int32_t t = of_entries * gridDim.x + blockIdx.x;
  Selection<Memory> selection(common, memory);
  if (t < num_tokens) selection.prepare(t);
  *operation = begin.operation();
  has_read_state(kThreads);
  if (!sends) return operation->can_begin;
  const bool is_fine = operation->can_begin && wait_credits(memory, *operation);
  if (is_fine && of_entries == kEntryWarps - 1 && blockIdx.x == gridDim.x - 1) {
    send_header(memory, *operation, own_header(args));
    if (lane_id() == 0) begin_record(common, *operation, args.handle.epochs);
  }
#pragma unroll 1
  while (is_fine && t < num_tokens) {
    selection.send(args, *operation);
    t += stride;
    if (t < num_tokens) selection.prepare(t);
  }
  ptx::named_arrive(kSentBarrier, kThreads);
  return is_fine;
}

}  // namespace ep::low_latency::dispatch
