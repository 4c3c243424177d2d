#pragma once
#include <algorithm>
#include <cmath>

#include "cuda_fp16.h"
#include "emulation.h"
enum __nv_fp8_interpretation_t { __NV_E4M3 };
enum __nv_saturation_t { __NV_SATFINITE };
inline float emulation_e4m3(uint8_t v) {
  const int exponent = v >> 3 & 15, mantissa = v & 7;
  if (exponent == 15 && mantissa == 7) return std::nanf("");
  const float size = exponent == 0 ? std::ldexp(mantissa / 8.0f, -6)
                                   : std::ldexp(1.0f + mantissa / 8.0f, exponent - 7);
  return v & 0x80 ? -size : size;
}
inline __half2_raw __nv_cvt_fp8x2_to_halfraw2(uint16_t pair, __nv_fp8_interpretation_t) {
  return {emulation_half(emulation_e4m3(pair & 0xff)).bits,
          emulation_half(emulation_e4m3(pair >> 8)).bits};
}
// To nearest, ties to even; what is too large becomes 448, NaN 0x7f.
inline uint8_t emulation_to_e4m3(float f) {
  const uint8_t sign = std::signbit(f) ? 0x80 : 0;
  const float size = std::fabs(f);
  if (std::isnan(f)) return 0x7f;
  if (size >= 448.0f) return sign | 0x7e;
  // Multiples of the distance between neighbours, from which the bits follow.
  const int exponent = std::max(size == 0.0f ? -6 : std::ilogb(size), -6);
  const auto steps = static_cast<int>(std::nearbyint(std::ldexp(size, 3 - exponent)));
  return sign | static_cast<uint8_t>(exponent == -6 ? steps : ((exponent + 6) << 3) + steps);
}
inline uint16_t __nv_cvt_float2_to_fp8x2(float2 pair, __nv_saturation_t,
                                         __nv_fp8_interpretation_t) {
  return emulation_to_e4m3(pair.x) | emulation_to_e4m3(pair.y) << 8;
}
