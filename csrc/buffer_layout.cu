// ep_buffer_layout(): where everything stands in the symmetric memory of a buffer. Host code alone.

#include "common/cut.cuh"
#include "common/launch.cuh"
#include "common/warp.cuh"
#include "dispatch/slots.cuh"
#include "low_latency/route.cuh"
#include "plan/plan.cuh"

namespace {

using Word = uint8_t[16];

int32_t check_sizes(const ep_buffer_layout_args& args) {
  if (args.num_ranks < 1 || args.num_ranks > EP_MAX_PEERS) {
    return ep::fail(EP_ERR_ARGUMENT, "num_ranks = %d is not in [1, %d]", args.num_ranks,
                    EP_MAX_PEERS);
  }
  return ep::check_buffer_sizes(args);
}

}  // namespace

int32_t ep_buffer_layout(const ep_buffer_layout_args* args, ep_buffer_offsets* offsets) {
  const int32_t status = check_sizes(*args);
  if (status != EP_OK) return status;
  const int64_t ranks = args->num_ranks, others = ranks - 1;
  const int64_t tokens = args->max_tokens, entries = tokens * args->num_topk;
  const int64_t chunks = ep::ceil_div<int64_t>(tokens, EP_MIN_CHUNK_TOKENS);
  ep::Cut cut;
  offsets->farewells = cut.take<int32_t>(ranks);
  offsets->plan_flags = cut.take<uint32_t>(ranks);
  offsets->dispatch_credits = cut.take<uint32_t>(ranks);
  offsets->combine_credits = cut.take<uint32_t>(ranks);
  offsets->plan_headers = cut.take<int32_t>(ranks * ep::plan::kHeaderInts);
  offsets->dispatch_flags = cut.take<uint64_t>(ranks * chunks);
  offsets->combine_flags = cut.take<uint32_t>(ranks * chunks);
  offsets->plan_idx = cut.take<int32_t>(ranks * entries);
  offsets->combine_weights = cut.take<float>(ranks * entries);
  offsets->region_bytes = tokens * ep::longest_slot(args->row_bytes, args->num_topk);
  offsets->dispatch_slots = cut.take<uint8_t>(others * offsets->region_bytes);
  offsets->combine_rows = cut.take<uint8_t>(others * tokens * args->row_bytes);
  offsets->zeros = cut.take<uint8_t>(args->row_bytes);
  const int64_t copying = args->copy_engines ? ranks : 0;
  const int64_t words = 2 * ep::ceil_div<int64_t>(tokens, ep::layout::kChunkTokens);
  offsets->plan_token_bits = cut.take<uint32_t>(copying * words);
  offsets->copy_flags = cut.take<uint32_t>(2 * 2 * copying * EP_COPY_FLAGS);
  offsets->copy_marks = cut.take<uint32_t>(2 * copying);
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
