// Found before CUDA's header of this name.
#pragma once

#include <bit>
#include <cstdint>

struct __nv_bfloat16 {
  uint16_t bits;

  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float value) {
    const uint32_t wide = std::bit_cast<uint32_t>(value);
    // To the nearest, ties to even; a NaN must not become an infinity.
    bits = value != value ? 0x7FFF : (wide + 0x7FFF + (wide >> 16 & 1)) >> 16;
  }
  operator float() const { return std::bit_cast<float>(uint32_t{bits} << 16); }
};
