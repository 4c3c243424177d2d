#pragma once
#include <cstring>

#include "emulation.h"
struct __half {
  uint16_t bits;
};
struct __half2_raw {
  uint16_t x, y;
};
struct __half2 {
  __half x, y;
  __half2() = default;
  explicit __half2(__half2_raw raw) : x{raw.x}, y{raw.y} {}
};
inline float emulation_widen(__half h) {
  _Float16 value;
  std::memcpy(&value, &h.bits, sizeof value);
  return static_cast<float>(value);
}
inline __half emulation_half(float f) {
  const auto value = static_cast<_Float16>(f);
  __half h;
  std::memcpy(&h.bits, &value, sizeof value);
  return h;
}
inline float2 __half22float2(__half2 h) { return {emulation_widen(h.x), emulation_widen(h.y)}; }
inline __half2 __floats2half2_rn(float a, float b) {
  return __half2(__half2_raw{emulation_half(a).bits, emulation_half(b).bits});
}
