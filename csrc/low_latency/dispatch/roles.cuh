// Low-latency dispatch: who does what in a block, and how long a row is on its way.
#pragma once

#include "common/vectors.cuh"
#include "low_latency/epochs.cuh"

namespace ep::low_latency::dispatch {

// Warps have roles: most send rows; the others tell what the rows are, and find out where those
// that come have to go. Then all receive. In a few microseconds what counts is how many
// instructions there are one after the other.
constexpr int kRowWarps = 14;  // with a word a lane as many as 7168 elements of FP8 need
constexpr int kEntryWarps = 4;
constexpr int kWarps = kRowWarps + kEntryWarps;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kEntryThreads = kEntryWarps * kWarpSize;
// The last of the row warps, which has the least to send, does what nobody waits for.
constexpr int kBookkeepingWarp = kRowWarps - 1;
constexpr int kEntryBarrier = 2;  // number of the entry warps' own
// At this one the row warps wait until the entries are sent. Behind rows they would have to wait
// for the links, and the receivers cannot begin without them.
constexpr int kSentBarrier = 3;
constexpr int kItemsAtOnce = 32;  // of a block, whose rows are known at once

constexpr int kMaxShared = 200 * 1024;
constexpr int kScalesOfWord = 4;

// Words of a row on its way, and those of them that are data; scales follow. A unit of data in FP8
// has the blocks of one word of scales.
struct RowWords {
  int32_t data, all;

  __device__ RowWords(int32_t hidden, int32_t format) {
    data = format == EP_LOW_LATENCY_BF16 ? hidden / 8 : hidden / 16;
    const int32_t scales = format == EP_LOW_LATENCY_BF16 ? 0 : hidden / kScaleBlock;
    all = data + ceil_div<int32_t>(scales, kScalesOfWord);
  }
};
static_assert(kScalesOfWord * kScaleBlock == kWarpSize * 16);

__device__ inline Header own_header(const ep_low_latency_dispatch_args& args) {
  const ep_low_latency& common = args.common;
  return {static_cast<uint32_t>(common.num_tokens),
          static_cast<uint32_t>(args.format) << 16 |
              static_cast<uint32_t>(common.has_weights != 0) << 8 |
              static_cast<uint32_t>(common.num_topk),
          static_cast<uint32_t>(common.max_tokens)};
}

// EP_OK, or EP_ERR_ARGUMENT with a text. Host code.
inline int32_t check_hidden(int32_t hidden, int32_t format) {
  const int32_t block = format == EP_LOW_LATENCY_BF16    ? 8
                        : format == EP_LOW_LATENCY_UE8M0 ? 4 * kScaleBlock
                                                         : kScaleBlock;
  if (hidden % block == 0) return EP_OK;
  return fail(EP_ERR_ARGUMENT, "hidden = %d is not a multiple of %d", hidden, block);
}

}  // namespace ep::low_latency::dispatch
