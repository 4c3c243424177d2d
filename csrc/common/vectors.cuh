// Elements of rows as FP32 numbers, and back: 16 bytes of BF16, FP16 or FP32, pairs of E4M3.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

namespace ep {

// Elements of an FP8 row that share a scale.
constexpr int kScaleBlock = 128;

// Elements of 16 bytes.
template <typename T>
constexpr int kPerVector = 16 / sizeof(T);

template <typename T>
__device__ void unpack(const uint4& bits, float* out);

// A BF16 number is the upper half of the same FP32 number.
template <>
__device__ inline void unpack<__nv_bfloat16>(const uint4& bits, float* out) {
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = __uint_as_float(words[i] << 16);
    out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

template <>
__device__ inline void unpack<__half>(const uint4& bits, float* out) {
  const auto* const pairs = reinterpret_cast<const __half2*>(&bits);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = __half22float2(pairs[i]);
    out[2 * i] = pair.x;
    out[2 * i + 1] = pair.y;
  }
}

template <>
__device__ inline void unpack<float>(const uint4& bits, float* out) {
  out[0] = __uint_as_float(bits.x);
  out[1] = __uint_as_float(bits.y);
  out[2] = __uint_as_float(bits.z);
  out[3] = __uint_as_float(bits.w);
}

// Rounds to nearest even.
template <typename T>
__device__ uint4 pack(const float* values);

template <>
__device__ inline uint4 pack<__nv_bfloat16>(const float* values) {
  uint4 bits;
  auto* const pairs = reinterpret_cast<__nv_bfloat162*>(&bits);
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
  return bits;
}

// Too large for FP16 becomes infinite.
template <>
__device__ inline uint4 pack<__half>(const float* values) {
  uint4 bits;
  auto* const pairs = reinterpret_cast<__half2*>(&bits);
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
  return bits;
}

template <>
__device__ inline uint4 pack<float>(const float* values) {
  return make_uint4(__float_as_uint(values[0]), __float_as_uint(values[1]),
                    __float_as_uint(values[2]), __float_as_uint(values[3]));
}

// The first element stands in the lower byte.
__device__ inline float2 unpack_fp8_pair(uint16_t pair) {
  const __half2_raw raw = __nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3);
  return __half22float2(__half2(raw));
}

// Rounds to nearest even; what is too large becomes the largest.
__device__ inline uint16_t pack_fp8_pair(float first, float second) {
  return __nv_cvt_float2_to_fp8x2(make_float2(first, second), __NV_SATFINITE, __NV_E4M3);
}

}  // namespace ep
