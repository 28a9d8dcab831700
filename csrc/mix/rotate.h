// Norms of experts' outputs in rank space: |s B H| = |R H| with s B = Q R (QR).
#pragma once

#include "mix/host_device.h"

namespace moelora {

// <a, b> in eight independent sums, which a compiler may keep in a register.
template <class A>
MOELORA_HD A dot(const A* a, const A* b, int n) {
  A lanes[8] = {}, sum = 0;
  int i = 0;
  for (; i + 8 <= n; i += 8)
    for (int l = 0; l < 8; ++l) lanes[l] += a[i + l] * b[i + l];
  for (; i < n; ++i) sum += a[i] * b[i];
  for (int l = 0; l < 8; ++l) sum += lanes[l];
  return sum;
}

// z = R h, an expert's output in an orthonormal basis; |z|² is returned.  Loops run along
// contiguous memory with independent sums, so that they vectorise.
//   factor_t [r, r]: Rᵀ
//   z        [r] out
template <class A>
MOELORA_HD A rotate(const A* factor_t, const A* h, int r, A* z) {
  for (int i = 0; i < r; ++i) z[i] = 0;
  for (int j = 0; j < r; ++j)
    for (int i = 0; i < r; ++i) z[i] += factor_t[j * r + i] * h[j];
  return dot(z, z, r);
}
// dh += coefficient Rᵀ z.
template <class A>
MOELORA_HD void add_rotated_back(const A* factor, const A* z, int r, A coefficient, A* dh) {
  for (int i = 0; i < r; ++i) {
    const A scaled = coefficient * z[i];
    for (int j = 0; j < r; ++j) dh[j] += scaled * factor[i * r + j];
  }
}

}  // namespace moelora
