// How the memory of a buffer is cut up. Host code.
#pragma once

#include <climits>
#include <cstdint>

#include "common/launch.cuh"
#include "common/warp.cuh"
#include "dispatch/slots.cuh"

namespace ep {

// Hands out memory from its start on.
class Cut {
 public:
  static constexpr int64_t kAlignment = 256;

  // Returns the offset of room for `count` elements.
  template <typename T>
  int64_t take(int64_t count) {
    const int64_t start = end_;
    end_ = round_up(start + count * static_cast<int64_t>(sizeof(T)), kAlignment);
    return start;
  }
  int64_t end() const { return end_; }

 private:
  int64_t end_ = 0;
};

// Bytes of the longest slot: an unquantised row with probabilities. The same row in FP8 is shorter,
// with its scales too.
inline int64_t longest_slot(int64_t row_bytes, int32_t num_topk) {
  const auto weight_bytes = static_cast<int64_t>(sizeof(float)) * round_up(num_topk, 4);
  return round_up<int64_t>(row_bytes + weight_bytes, dispatch::kLineBytes);
}

// Refuses sizes that no buffer can have. Args: of ep_buffer_layout or ep_nodes_layout.
template <typename Args>
int32_t check_buffer_sizes(const Args& args) {
  if (args.num_topk < 1 || args.num_topk > EP_MAX_TOPK) {
    return fail(EP_ERR_ARGUMENT, "num_topk = %d is not in [1, %d]", args.num_topk, EP_MAX_TOPK);
  }
  if (args.max_tokens < 1 || args.max_tokens > INT_MAX) {
    return fail(EP_ERR_ARGUMENT, "max_tokens = %lld is not in [1, %d]",
                static_cast<long long>(args.max_tokens), INT_MAX);
  }
  if (args.row_bytes < 16 || args.row_bytes > INT_MAX || args.row_bytes % 16 != 0) {
    return fail(EP_ERR_ARGUMENT, "row_bytes = %lld is not in [16, %d] and a multiple of 16",
                static_cast<long long>(args.row_bytes), INT_MAX);
  }
  if (args.low_latency_tokens < 0 || args.low_latency_tokens > EP_LOW_LATENCY_MAX_TOKENS) {
    return fail(EP_ERR_ARGUMENT, "low_latency_tokens = %d is not in [0, %d]",
                args.low_latency_tokens, EP_LOW_LATENCY_MAX_TOKENS);
  }
  return EP_OK;
}

}  // namespace ep
