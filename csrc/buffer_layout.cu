// ep_buffer_layout(): where everything stands in the symmetric memory of a buffer. Host code alone.

#include <climits>

#include "common/launch.cuh"
#include "common/warp.cuh"
#include "dispatch/slots.cuh"
#include "low_latency/route.cuh"
#include "plan/plan.cuh"

namespace {

constexpr int64_t kAlignment = 256;

using Word = uint8_t[16];

// Hands out memory from its start on.
class Cut {
 public:
  // Returns the offset of room for `count` elements.
  template <typename T>
  int64_t take(int64_t count) {
    const int64_t start = end_;
    end_ = ep::round_up(start + count * static_cast<int64_t>(sizeof(T)), kAlignment);
    return start;
  }
  int64_t end() const { return end_; }

 private:
  int64_t end_ = 0;
};

// Bytes of the longest slot: an unquantised row with probabilities. The same row in FP8 is shorter,
// with its scales too.
int64_t longest_slot(const ep_buffer_layout_args& args) {
  const auto weight_bytes = static_cast<int64_t>(sizeof(float)) * ep::round_up(args.num_topk, 4);
  return ep::round_up<int64_t>(args.row_bytes + weight_bytes, ep::dispatch::kLineBytes);
}

int32_t check_sizes(const ep_buffer_layout_args& args) {
  if (args.num_ranks < 1 || args.num_ranks > EP_MAX_PEERS) {
    return ep::fail(EP_ERR_ARGUMENT, "num_ranks = %d is not in [1, %d]", args.num_ranks,
                    EP_MAX_PEERS);
  }
  if (args.num_topk < 1 || args.num_topk > EP_MAX_TOPK) {
    return ep::fail(EP_ERR_ARGUMENT, "num_topk = %d is not in [1, %d]", args.num_topk, EP_MAX_TOPK);
  }
  if (args.max_tokens < 1 || args.max_tokens > INT_MAX) {
    return ep::fail(EP_ERR_ARGUMENT, "max_tokens = %lld is not in [1, %d]",
                    static_cast<long long>(args.max_tokens), INT_MAX);
  }
  if (args.row_bytes < 16 || args.row_bytes > INT_MAX || args.row_bytes % 16 != 0) {
    return ep::fail(EP_ERR_ARGUMENT, "row_bytes = %lld is not in [16, %d] and a multiple of 16",
                    static_cast<long long>(args.row_bytes), INT_MAX);
  }
  if (args.low_latency_tokens < 0 || args.low_latency_tokens > EP_LOW_LATENCY_MAX_TOKENS) {
    return ep::fail(EP_ERR_ARGUMENT, "low_latency_tokens = %d is not in [0, %d]",
                    args.low_latency_tokens, EP_LOW_LATENCY_MAX_TOKENS);
  }
  return EP_OK;
}

}  // namespace

int32_t ep_buffer_layout(const ep_buffer_layout_args* args, ep_buffer_offsets* offsets) {
  const int32_t status = check_sizes(*args);
  if (status != EP_OK) return status;
  const int64_t ranks = args->num_ranks, others = ranks - 1;
  const int64_t tokens = args->max_tokens, entries = tokens * args->num_topk;
  const int64_t chunks = ep::ceil_div<int64_t>(tokens, EP_MIN_CHUNK_TOKENS);
  Cut cut;
  offsets->farewells = cut.take<int32_t>(ranks);
  offsets->plan_flags = cut.take<uint32_t>(ranks);
  offsets->dispatch_credits = cut.take<uint32_t>(ranks);
  offsets->combine_credits = cut.take<uint32_t>(ranks);
  offsets->plan_headers = cut.take<int32_t>(ranks * ep::plan::kHeaderInts);
  offsets->dispatch_flags = cut.take<uint64_t>(ranks * chunks);
  offsets->combine_flags = cut.take<uint32_t>(ranks * chunks);
  offsets->plan_idx = cut.take<int32_t>(ranks * entries);
  offsets->combine_weights = cut.take<float>(ranks * entries);
  offsets->dispatch_slots = cut.take<uint8_t>(others * tokens * longest_slot(*args));
  offsets->combine_rows = cut.take<uint8_t>(others * tokens * args->row_bytes);
  offsets->zeros = cut.take<uint8_t>(args->row_bytes);
  const int64_t tokens_of_halves = 2 * ranks * args->low_latency_tokens;
  const int64_t low_latency_row = 2ll * args->hidden;  // BF16
  const int64_t weight_words = ep::low_latency::weight_words(args->num_topk);
  const int64_t entry_words = ep::low_latency::expert_words(args->num_topk) + weight_words;
  offsets->low_latency_credits = cut.take<uint32_t>(tokens_of_halves ? 2 * 2 * ranks : 0);
  offsets->low_latency_headers = cut.take<Word>(tokens_of_halves ? 2 * 2 * ranks : 0);
  offsets->low_latency_entries = cut.take<Word>(tokens_of_halves * entry_words);
  offsets->low_latency_weights = cut.take<Word>(tokens_of_halves * weight_words);
  offsets->low_latency_dispatch = cut.take<uint8_t>(tokens_of_halves * low_latency_row);
  offsets->low_latency_combine = cut.take<uint8_t>(tokens_of_halves * low_latency_row);
  offsets->total = cut.end();
  offsets->max_chunks = static_cast<int32_t>(chunks);
  return EP_OK;
}
