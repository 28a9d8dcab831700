// The averaged mix, row by row: h = Σ_qe w_qe H_qe, H'_qe = s w_qe h, which equals merging the
// factors of the experts first; and its backward.  Formulas: docs/math.md, "averaged".
// Letters: Q splits of the features, E experts, r rank; n = Q E pairs (q, e).
#pragma once

#include "mix/host_device.h"

namespace moelora {

// out[j] = Σ_q scale w_q rows[q, j] for j in [j0, j1): h from H, and dh from dH'.
//   rows    [n, r]
//   weights [n]
//   out     [r]
template <class A>
MOELORA_HD void weighted_sum(int n, int r, int j0, int j1, const A* rows, const A* weights, A scale,
                             A* out) {
  for (int j = j0; j < j1; ++j) out[j] = 0;
  for (int q = 0; q < n; ++q)
    for (int j = j0; j < j1; ++j) out[j] += scale * weights[q] * rows[q * r + j];
}

// dw_q = s <dH'_q, h> + <dh, H_q>.
//   dmixed, hidden    [r]: those of q
//   average, daverage [r]
template <class A>
MOELORA_HD A averaged_dweight(int r, const A* dmixed, const A* hidden, const A* average,
                              const A* daverage, A scale) {
  A sum = 0;
  for (int j = 0; j < r; ++j) sum += scale * dmixed[j] * average[j] + daverage[j] * hidden[j];
  return sum;
}

// One token.
//   hidden  [n, r]
//   weights [n]
//   average [r] out: h
//   mixed   [n, r] out: H'
template <class A>
MOELORA_HD void averaged_forward_row(int n, int r, const A* hidden, const A* weights, A scale,
                                     A* average, A* mixed) {
  weighted_sum(n, r, 0, r, hidden, weights, A(1), average);
  for (int q = 0; q < n; ++q)
    for (int j = 0; j < r; ++j) mixed[q * r + j] = scale * weights[q] * average[j];
}

// Its backward: dh = s Σ_q w_q dH'_q, dH_q = w_q dh.
//   dmixed   [n, r]
//   dhidden  [n, r] out
//   dweights [n] out, or null
//   average, daverage [r] scratch
template <class A>
MOELORA_HD void averaged_backward_row(int n, int r, const A* hidden, const A* weights, A scale,
                                      const A* dmixed, A* dhidden, A* dweights, A* average,
                                      A* daverage) {
  weighted_sum(n, r, 0, r, hidden, weights, A(1), average);
  weighted_sum(n, r, 0, r, dmixed, weights, scale, daverage);
  for (int q = 0; q < n; ++q) {
    if (dweights)
      dweights[q] = averaged_dweight(r, dmixed + q * r, hidden + q * r, average, daverage, scale);
    for (int j = 0; j < r; ++j) dhidden[q * r + j] = weights[q] * daverage[j];
  }
}

}  // namespace moelora
