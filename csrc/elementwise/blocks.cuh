// The scale of a block of 128 elements: a power of two, Transformer Engine's bits.
#pragma once

#include <cstdint>

namespace ep {

constexpr float kFp8Max = 448.0f;

// min(2^floor(log2(448 / amax)), 2^127); 1 where amax is 0 or infinite.
__device__ inline float power_of_two_scale(float amax) {
  constexpr uint32_t kExponentBits = 0x7f800000u;
  constexpr uint32_t kTwoPow127Bits = 0x7f000000u;
  if (amax == 0.0f || __float_as_uint(amax) == kExponentBits) return 1.0f;
  const uint32_t exponent = __float_as_uint(kFp8Max / amax) & kExponentBits;
  return __uint_as_float(min(exponent, kTwoPow127Bits));
}

}  // namespace ep
