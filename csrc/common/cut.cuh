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

// Refuses rows that no buffer can hold.
inline int32_t check_row_sizes(int64_t max_tokens, int64_t row_bytes, int32_t num_topk) {
  if (num_topk < 1 || num_topk > EP_MAX_TOPK) {
    return fail(EP_ERR_ARGUMENT, "num_topk = %d is not in [1, %d]", num_topk, EP_MAX_TOPK);
  }
  if (max_tokens < 1 || max_tokens > INT_MAX) {
    return fail(EP_ERR_ARGUMENT, "max_tokens = %lld is not in [1, %d]",
                static_cast<long long>(max_tokens), INT_MAX);
  }
  if (row_bytes < 16 || row_bytes > INT_MAX || row_bytes % 16 != 0) {
    return fail(EP_ERR_ARGUMENT, "row_bytes = %lld is not in [16, %d] and a multiple of 16",
                static_cast<long long>(row_bytes), INT_MAX);
  }
  return EP_OK;
}

}  // namespace ep
