// Sets of numbers as lines of bits, in shared memory of a block.
#pragma once

#include "common/ptx.cuh"
#include "common/warp.cuh"

namespace ep::low_latency {

// Lines of bits, whole groups of 128 each.
class Lines {
 public:
  static constexpr __host__ __device__ int64_t bytes(int64_t num_lines, int32_t num_bits) {
    return 16 * num_lines * groups_of(num_bits);
  }
  __device__ Lines(void* shared, int32_t num_bits)
      : lines_(static_cast<uint4*>(shared)), groups_(groups_of(num_bits)) {}

  // What is behind so many lines.
  __device__ uint4* end(int32_t num_lines) const { return lines_ + num_lines * groups_; }

  // Makes lines empty; by `num_threads` threads, of which this is number `thread`.
  __device__ void clear(int32_t num_lines, int32_t thread, int32_t num_threads) const {
#pragma unroll 1
    for (int32_t i = thread; i < num_lines * groups_; i += num_threads) {
      lines_[i] = make_uint4(0, 0, 0, 0);
    }
  }

  __device__ void mark(uint32_t line, int32_t n) const {
    atomicOr(words_of(line) + n / 32, 1u << (n % 32));
  }

  __device__ bool has(uint32_t line, int32_t n) const {
    return words_of(line)[n / 32] >> (n % 32) & 1;
  }

  // How many of a line are before n.
  __device__ int32_t before(int32_t of_line, int32_t n) const {
    const uint4* line = lines_ + of_line * groups_;
    int32_t count = 0;
#pragma unroll 1
    for (; n >= 128; n -= 128, ++line) {
      count += __popc(line->x) + __popc(line->y) + __popc(line->z) + __popc(line->w);
    }
    if (n == 0) return count;
    const uint64_t low = static_cast<uint64_t>(line->y) << 32 | line->x;
    const uint64_t high = static_cast<uint64_t>(line->w) << 32 | line->z;
    const uint64_t before = (1ull << (n & 63)) - 1;
    return count + (n < 64 ? __popcll(low & before) : __popcll(low) + __popcll(high & before));
  }

  // The i-th of a line, from 0, which has so many. By a warp.
  __device__ int32_t select(uint32_t line, int32_t i) const {
    const uint32_t* const words = words_of(line);
#pragma unroll 1
    for (int32_t first = 0;; first += kWarpSize) {
      const int32_t w = first + lane_id();
      const uint32_t bits = w < 4 * groups_ ? words[w] : 0;
      int32_t total;
      const int32_t left = i - sum_before(__popc(bits), &total);
      if (i >= total && first + kWarpSize < 4 * groups_) {
        i -= total;
        continue;
      }
      const uint32_t lanes = __ballot_sync(kFullWarp, left >= 0 && left < __popc(bits));
      uint32_t rest = bits;
#pragma unroll 1
      for (int32_t passed = 0; passed < left && rest != 0; ++passed) rest &= rest - 1;
      return __shfl_sync(kFullWarp, w * 32 + __ffs(rest) - 1, __ffs(lanes) - 1);
    }
  }

 private:
  uint4* lines_;
  int32_t groups_;

  __device__ uint32_t* words_of(uint32_t line) const {
    return reinterpret_cast<uint32_t*>(lines_ + line * groups_);
  }
  static constexpr __host__ __device__ int32_t groups_of(int32_t num_bits) {
    return ceil_div<int32_t>(num_bits, 128);
  }
};

}  // namespace ep::low_latency
