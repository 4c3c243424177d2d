// Sets of numbers as bitmaps, in shared memory of a block.
#pragma once

#include "common/ptx.cuh"
#include "common/warp.cuh"

namespace ep::low_latency {

// Bitmaps of the same size, whole groups of 128 bits each.
class Bitmaps {
 public:
  static constexpr __host__ __device__ int64_t bytes(int64_t num_bitmaps, int32_t num_bits) {
    return 16 * num_bitmaps * groups_of(num_bits);
  }
  __device__ Bitmaps(void* shared, int32_t num_bits)
      : bitmaps_(static_cast<uint4*>(shared)), groups_(groups_of(num_bits)) {}

  // What comes after so many bitmaps.
  __device__ uint4* end(int32_t num_bitmaps) const { return bitmaps_ + num_bitmaps * groups_; }

  // Clears so many; by `num_threads` threads, of which this is number `thread`.
  __device__ void clear(int32_t num_bitmaps, int32_t thread, int32_t num_threads) const {
#pragma unroll 1
    for (int32_t i = thread; i < num_bitmaps * groups_; i += num_threads) {
      bitmaps_[i] = make_uint4(0, 0, 0, 0);
    }
  }

  __device__ void set(uint32_t bitmap, int32_t n) const {
    atomicOr(words_of(bitmap) + n / 32, 1u << (n % 32));
  }

  __device__ bool test(uint32_t bitmap, int32_t n) const {
    return words_of(bitmap)[n / 32] >> (n % 32) & 1;
  }

  // How many bits of a bitmap are set before bit n.
  __device__ int32_t count_before(int32_t bitmap, int32_t n) const {
    const uint4* group = bitmaps_ + bitmap * groups_;
    int32_t count = 0;
#pragma unroll 1
    for (; n >= 128; n -= 128, ++group) {
      count += __popc(group->x) + __popc(group->y) + __popc(group->z) + __popc(group->w);
    }
    if (n == 0) return count;
    const uint64_t low = static_cast<uint64_t>(group->y) << 32 | group->x;
    const uint64_t high = static_cast<uint64_t>(group->w) << 32 | group->z;
    const uint64_t before = (1ull << (n & 63)) - 1;
    return count + (n < 64 ? __popcll(low & before) : __popcll(low) + __popcll(high & before));
  }

  // The number of the i-th set bit, from 0, of a bitmap that has so many. By a warp.
  __device__ int32_t select(uint32_t bitmap, int32_t i) const {
    const uint32_t* const words = words_of(bitmap);
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
  uint4* bitmaps_;
  int32_t groups_;

  __device__ uint32_t* words_of(uint32_t bitmap) const {
    return reinterpret_cast<uint32_t*>(bitmaps_ + bitmap * groups_);
  }
  static constexpr __host__ __device__ int32_t groups_of(int32_t num_bits) {
    return ceil_div<int32_t>(num_bits, 128);
  }
};

}  // namespace ep::low_latency
