// Found before CUDA's header of this name.
#pragma once

struct __half {
  _Float16 value;

  __half() = default;
  explicit __half(float value) : value(static_cast<_Float16>(value)) {}
  operator float() const { return static_cast<float>(value); }
};
