// The averaged mix, row by row: h = Σ_qe w_qe H_qe, H'_qe = s w_qe h, which equals merging the
// factors of the experts first; and its backward.  Formulas: docs/math.md, "averaged".
// Letters: Q splits of the features, E experts, r rank; n = Q E pairs (q, e).
#pragma once

#include "mix/host_device.h"

namespace moelora {

// One token.
//   hidden  [n, r]
//   weights [n]
//   average [r] out: h
//   mixed   [n, r] out: H'
template <class A>
MOELORA_HD void averaged_forward_row(int n, int r, const A* hidden, const A* weights, A scale,
                                     A* average, A* mixed) {
  for (int j = 0; j < r; ++j) average[j] = 0;
  for (int q = 0; q < n; ++q)
    for (int j = 0; j < r; ++j) average[j] += weights[q] * hidden[q * r + j];
  for (int q = 0; q < n; ++q)
    for (int j = 0; j < r; ++j) mixed[q * r + j] = scale * weights[q] * average[j];
}

// Its backward: dh = s Σ_q w_q dH'_q, dH_q = w_q dh, dw_q = s <dH'_q, h> + <dh, H_q>.
//   dmixed   [n, r]
//   dhidden  [n, r] out
//   dweights [n] out, or null
//   average, daverage [r] scratch
template <class A>
MOELORA_HD void averaged_backward_row(int n, int r, const A* hidden, const A* weights, A scale,
                                      const A* dmixed, A* dhidden, A* dweights, A* average,
                                      A* daverage) {
  for (int j = 0; j < r; ++j) average[j] = daverage[j] = 0;
  for (int q = 0; q < n; ++q)
    for (int j = 0; j < r; ++j) {
      average[j] += weights[q] * hidden[q * r + j];
      daverage[j] += scale * weights[q] * dmixed[q * r + j];
    }
  for (int q = 0; q < n; ++q) {
    A sum = 0;
    for (int j = 0; j < r; ++j) {
      sum += scale * dmixed[q * r + j] * average[j] + daverage[j] * hidden[q * r + j];
      dhidden[q * r + j] = weights[q] * daverage[j];
    }
    if (dweights) dweights[q] = sum;
  }
}

}  // namespace moelora
