// Low-latency dispatch, sending: what ranks have to know of the rows, by the entry warps.
#pragma once

#include "low_latency/dispatch/roles.cuh"
#include "low_latency/route.cuh"

namespace ep::low_latency::dispatch {

// Words that say which experts of a rank want a token, and words of its weights. A thread makes one
// at a time, from what it loads itself, before the operation is known. Every rank gets all of them,
// those of tokens that do not go there too. Receivers begin with the experts: they leave first.
template <typename Memory>
class Entries {
 public:
  __device__ Entries(const ep_low_latency& common, const Memory& memory, int32_t num_tokens)
      : common_(common), memory_(memory), num_tokens_(num_tokens) {
    num_expert_words_ = expert_words(common.num_topk);
    const int32_t num_words =
        num_expert_words_ + (common.has_weights ? weight_words(common.num_topk) : 0);
    count_ = num_words * memory.num_ranks() * num_tokens;
    // Those of a warp are neighbours. Warps are on different SMs as long as there are enough.
    const int32_t entry_warp = static_cast<int32_t>(threadIdx.x) / kWarpSize - kRowWarps;
    i_ = (entry_warp * gridDim.x + blockIdx.x) * kWarpSize + lane_id();
    if (has_word()) make();
  }

  // Whether there is a word to be sent.
  __device__ bool has_word() const { return i_ < count_; }

  // Sends it, and makes the next one.
  __device__ void send(const Operation& operation) {
    memory_.delay();
    word_.w = operation.epoch;
    if (operation.alive >> to_ & 1) ptx::store_word(address(operation), word_);
    i_ += kEntryThreads * gridDim.x;
    if (has_word()) make();
  }

 private:
  const ep_low_latency& common_;
  const Memory& memory_;
  int32_t num_tokens_, num_expert_words_, count_, i_;
  int32_t j_, to_, t_;  // see EntryWord
  uint4 word_;

  __device__ uint4* address(const Operation& operation) const {
    return memory_.entry(to_, operation.half, memory_.rank(), t_) + j_;
  }

  __device__ void make() {
    const EntryWord at(memory_, num_tokens_, i_);
    j_ = at.j, to_ = at.to, t_ = at.t;
    const int64_t first = static_cast<int64_t>(t_) * common_.num_topk;
    if (j_ >= num_expert_words_) {
      const int32_t k = (j_ - num_expert_words_) * kWeightsOfWord;
      word_ = weight_word(common_.weights + first + k, common_.num_topk - k);
      return;
    }
    const int32_t k = j_ * kExpertsOfWord, count = common_.num_topk - k;
    word_ = common_.idx_bytes == 8
                ? expert_word(common_, static_cast<const int64_t*>(common_.topk_idx) + first + k,
                              count, to_)
                : expert_word(common_, static_cast<const int32_t*>(common_.topk_idx) + first + k,
                              count, to_);
  }
};

// By the entry warps. False after a fault.
template <typename Memory>
__device__ inline bool begin_and_send_entries(const ep_low_latency_dispatch_args& args,
                                              const Memory& memory, const Begin& begin,
                                              Operation* operation) {
  const ep_low_latency& common = args.common;
  const bool sends = common.phases & EP_LOW_LATENCY_SEND;
  Entries<Memory> entries(common, memory, sends ? common.num_tokens : 0);
  *operation = begin.operation();
  has_read_state(kThreads);
  if (!sends) return operation->can_begin;
  const bool is_fine = operation->can_begin && wait_credits(memory, *operation);
  if (is_fine && threadIdx.x / kWarpSize == kWarps - 1 && blockIdx.x == gridDim.x - 1) {
    send_header(memory, *operation, own_header(args));
    if (lane_id() == 0) begin_record(common, *operation, args.handle.epochs);
  }
#pragma unroll 1
  while (is_fine && entries.has_word()) entries.send(*operation);
  __syncwarp();
  ptx::named_arrive(kSentBarrier, kThreads);
  return is_fine;
}

}  // namespace ep::low_latency::dispatch
