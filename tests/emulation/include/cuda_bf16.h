#pragma once
#include "emulation.h"
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline __nv_bfloat16 emulation_round(float f) {
  const uint32_t v = __float_as_uint(f);
  if ((v & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<uint16_t>((v + 0x7fff + (v >> 16 & 1)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return {emulation_round(a), emulation_round(b)};
}
inline float __low2float(__nv_bfloat162 pair) {
  return __uint_as_float(static_cast<uint32_t>(pair.x.bits) << 16);
}
inline float __high2float(__nv_bfloat162 pair) {
  return __uint_as_float(static_cast<uint32_t>(pair.y.bits) << 16);
}
