// Element types and their conversions, without torch's headers.
#pragma once

#include <cstdint>
#include <cstring>

namespace moelora {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// What products of T accumulate in.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using acc_t = typename Accumulator<T>::type;

inline uint32_t float_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, sizeof u);
  return u;
}
inline float float_of(uint32_t u) {
  float f;
  memcpy(&f, &u, sizeof f);
  return f;
}

inline float to_acc(float v) { return v; }
inline double to_acc(double v) { return v; }
inline float to_acc(BFloat16 v) { return float_of(static_cast<uint32_t>(v.bits) << 16); }

inline float to_acc(Float16 v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000) << 16;
  const uint32_t magnitude = v.bits & 0x7FFF;
  if (magnitude >= 0x7C00) return float_of(sign | 0x7F800000u | (magnitude << 13));  // inf, NaN
  // Rescaling by 2^112 also makes subnormals come out right.
  return float_of(sign | float_bits(float_of(magnitude << 13) * 0x1p112f));
}

// Round to nearest, ties to even; NaN stays a quiet NaN.
template <class T>
T from_acc(acc_t<T> v);

template <>
inline float from_acc<float>(float v) {
  return v;
}
template <>
inline double from_acc<double>(double v) {
  return v;
}
template <>
inline BFloat16 from_acc<BFloat16>(float v) {
  const uint32_t u = float_bits(v);
  if ((u & 0x7FFFFFFF) > 0x7F800000) return {static_cast<uint16_t>((u >> 16) | 0x40)};
  return {static_cast<uint16_t>((u + 0x7FFF + ((u >> 16) & 1)) >> 16)};
}
template <>
inline Float16 from_acc<Float16>(float v) {
  const uint32_t u = float_bits(v), magnitude = u & 0x7FFFFFFF;
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000);
  if (magnitude > 0x7F800000) return {static_cast<uint16_t>(sign | 0x7E00)};
  if (magnitude >= 0x477FF000) return {static_cast<uint16_t>(sign | 0x7C00)};  // rounds to inf
  if (magnitude < 0x38800000) {  // subnormal: let a float addition do the rounding
    const uint32_t shifted = float_bits(float_of(magnitude) + 0.5f);
    return {static_cast<uint16_t>(sign | (shifted - 0x3F000000))};
  }
  const uint32_t rounded = magnitude + 0xC8000FFF + ((magnitude >> 13) & 1);
  return {static_cast<uint16_t>(sign | (rounded >> 13))};
}

}  // namespace moelora
