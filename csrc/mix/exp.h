// exp for the softmax: branch-free so that loops over it vectorise, one source for CPU and CUDA;
// and the logistic function.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "mix/host_device.h"

namespace moelora {

// Within 1.2 ulp of exp(x) for x <= 0, which is all a softmax needs; 0 below -87; NaN stays NaN.
// Cody-Waite reduction to |r| <= ln(2)/2 and a degree-6 polynomial (Cephes' constants).
MOELORA_HD float exp_nonpositive(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;  // NaN fails the comparison and stays
  // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low mantissa bits.
  const float shifted = clamped * 1.44269504088896341f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3F800000u;
  float power;
  memcpy(&power, &bits, sizeof power);
  return x < -87.0f ? 0.0f : p * power;
}

MOELORA_HD double exp_nonpositive(double x) { return exp(x); }

// 1 / (1 + exp(-v)), without overflow on either side.
template <class A>
MOELORA_HD A logistic(A v) {
  const A small = exp_nonpositive(v < 0 ? v : -v);  // NaN takes the second and stays
  return (v < 0 ? small : A(1)) / (1 + small);
}

}  // namespace moelora
