// The grid mix, row by row: H'_j = s Σ_i G_ij H_i with G = a softmax(logits) + b external, and its
// backward.  Formulas: docs/math.md, "grid".  Letters: r1 rows of down, r2 rows of up, G = r1 r2
// gates; in the diagonal form ("rank1" mode) r1 = r2 = G and H'_j = s G_j H_j.
#pragma once

#include "mix/softmax.h"

namespace moelora {

struct GridShape {
  int r1, r2;
  bool diagonal;
  MOELORA_HD int gates() const { return diagonal ? r1 : r1 * r2; }
};

// What the learned scalars and the fixed ones amount to: a, b, s above.
template <class A>
struct GridScales {
  A token, task, output;
};

// The learned scalars are omega and beta before σ(100 ·).
template <class A>
MOELORA_HD A sharp_sigmoid(A v) {
  return logistic(100 * v);
}
template <class A>
MOELORA_HD A sharp_sigmoid_slope(A v) {
  return 100 * sharp_sigmoid(v) * sharp_sigmoid(-v);
}
template <class A>
MOELORA_HD GridScales<A> grid_scales(A omega, A beta, A token_scale, A task_scale) {
  return {token_scale * sharp_sigmoid(omega), task_scale * sharp_sigmoid(-omega),
          sharp_sigmoid(beta)};
}
// Gradients of omega and beta from those of the scales.
template <class A>
MOELORA_HD A grid_domega(A omega, A token_scale, A task_scale, GridScales<A> d) {
  return sharp_sigmoid_slope(omega) * (token_scale * d.token - task_scale * d.task);
}
template <class A>
MOELORA_HD A grid_dbeta(A beta, GridScales<A> d) {
  return sharp_sigmoid_slope(beta) * d.output;
}

// One token.
//   hidden   [r1]
//   logits   [gates]
//   external [gates], or null for zero
//   gate     [gates] out: G, and where softmax leaves its result first; may be logits
//   mixed    [r2] out: H'
template <class A>
MOELORA_HD void grid_forward_row(GridShape shape, const A* hidden, const A* logits,
                                 const A* external, GridScales<A> scales, A* gate, A* mixed) {
  const int n = shape.gates();
  softmax_row(logits, n, gate);
  for (int g = 0; g < n; ++g)
    gate[g] = scales.token * gate[g] + (external ? scales.task * external[g] : A(0));
  if (shape.diagonal) {
    for (int j = 0; j < n; ++j) mixed[j] = scales.output * gate[j] * hidden[j];
    return;
  }
  for (int j = 0; j < shape.r2; ++j) mixed[j] = 0;
  for (int i = 0; i < shape.r1; ++i)
    for (int j = 0; j < shape.r2; ++j) mixed[j] += gate[i * shape.r2 + j] * hidden[i];
  for (int j = 0; j < shape.r2; ++j) mixed[j] *= scales.output;
}

// Its backward: dG_ij = s H_i dH'_j, dH_i = s Σ_j G_ij dH'_j, and through G to logits, external and
// the three scales.
//   dmixed   [r2]
//   dhidden  [r1] out; may be hidden
//   dlogits  [gates] out; may be logits
//   mixed    [r2] out: H' again
//   dscales  out: this token's share
//   dexternal [gates] out, or null; may be external
//   probs, dgate [gates] scratch
template <class A>
MOELORA_HD void grid_backward_row(GridShape shape, const A* hidden, const A* logits,
                                  const A* external, GridScales<A> scales, const A* dmixed,
                                  A* dhidden, A* dlogits, A* mixed, GridScales<A>* dscales,
                                  A* dexternal, A* probs, A* dgate) {
  const int n = shape.gates(), r2 = shape.r2;
  softmax_row(logits, n, probs);
  const auto gate = [&](int g) {
    return scales.token * probs[g] + (external ? scales.task * external[g] : A(0));
  };
  // H' / s, so that ds needs no division by an s that may be 0.
  if (shape.diagonal) {
    for (int j = 0; j < n; ++j) {
      mixed[j] = gate(j) * hidden[j];
      dgate[j] = scales.output * hidden[j] * dmixed[j];
      dhidden[j] = scales.output * gate(j) * dmixed[j];
    }
  } else {
    for (int j = 0; j < r2; ++j) mixed[j] = 0;
    for (int i = 0; i < shape.r1; ++i) {
      A sum = 0;
      for (int j = 0; j < r2; ++j) {
        const A value = gate(i * r2 + j);
        mixed[j] += value * hidden[i];
        sum += value * dmixed[j];
        dgate[i * r2 + j] = scales.output * hidden[i] * dmixed[j];
      }
      dhidden[i] = scales.output * sum;
    }
  }
  *dscales = {0, 0, 0};
  for (int j = 0; j < r2; ++j) {
    dscales->output += dmixed[j] * mixed[j];
    mixed[j] *= scales.output;
  }
  for (int g = 0; g < n; ++g) {
    dscales->token += dgate[g] * probs[g];
    if (external) dscales->task += dgate[g] * external[g];
    if (dexternal) dexternal[g] = scales.task * dgate[g];
    dgate[g] *= scales.token;
    dlogits[g] = 0;
  }
  softmax_backward_row(probs, dgate, n, dlogits);
}

}  // namespace moelora
