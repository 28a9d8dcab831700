// The gated mix, row by row: H'_e = s w_e φ(H_e), and its backward.  Formulas: docs/math.md,
// "gated". Letters: E experts, r rank.
#pragma once

#include <cmath>
#include <cstdint>

#include "mix/exp.h"
#include "mix/host_device.h"

namespace moelora {

// φ.  The numbers are the operators' argument `activation`.
enum class Activation : int32_t { kIdentity = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3 };
constexpr int kActivations = 4;

// gelu with the tanh approximation is v σ(2u), u = √(2/π) (v + 0.044715 v³).
template <class A>
MOELORA_HD A gelu_tanh_argument(A v) {
  return A(1.5957691216057308) * (v + A(0.044715) * v * v * v);
}

template <class A>
MOELORA_HD A activate(Activation activation, A v) {
  switch (activation) {
    case Activation::kRelu: return v < 0 ? A(0) : v;  // NaN stays
    case Activation::kGelu: return A(0.5) * v * (1 + std::erf(v * A(0.7071067811865476)));
    case Activation::kGeluTanh: return v * logistic(gelu_tanh_argument(v));
    default: return v;
  }
}

// φ'(v); relu's is 0 at 0, as in PyTorch.
template <class A>
MOELORA_HD A activate_slope(Activation activation, A v) {
  switch (activation) {
    case Activation::kRelu: return v > 0 ? A(1) : v != v ? v : A(0);
    case Activation::kGelu: {
      const A density = A(0.3989422804014327) * exp_nonpositive(A(-0.5) * v * v);
      return A(0.5) * (1 + std::erf(v * A(0.7071067811865476))) + v * density;
    }
    case Activation::kGeluTanh: {
      const A share = logistic(gelu_tanh_argument(v));
      const A slope = A(1.5957691216057308) * (1 + A(3 * 0.044715) * v * v);
      return share + v * share * (1 - share) * slope;
    }
    default: return A(1);
  }
}

// dw_e = s <dH'_e, φ(H_e)> (+ s <dy, up bias e>).
//   dmixed, hidden [r] of one expert
//   dbias          <dy, up bias e>, or 0
template <class A>
MOELORA_HD A gated_dweight(Activation activation, const A* dmixed, const A* hidden, int r, A scale,
                           A dbias) {
  A sum = dbias;
  for (int j = 0; j < r; ++j) sum += dmixed[j] * activate(activation, hidden[j]);
  return scale * sum;
}

// One token.
//   hidden  [E, r]  in: H before φ
//   weights [E]
//   mixed   [E, r]  out: H', then if with_bias [E]: what multiplies the experts' up biases
template <Activation activation, class A>
MOELORA_HD void gated_forward_row(int E, int r, const A* hidden, const A* weights, A scale,
                                  bool with_bias, A* mixed) {
  for (int e = 0; e < E; ++e) {
    const A gate = scale * weights[e];
    for (int j = 0; j < r; ++j) mixed[e * r + j] = gate * activate(activation, hidden[e * r + j]);
  }
  if (with_bias)
    for (int e = 0; e < E; ++e) mixed[E * r + e] = scale * weights[e];
}

// Its backward: dH_e = s w_e dH'_e φ'(H_e), and dw_e.
//   dmixed   [E, r] and if with_bias [E]: gradients of mixed
//   dhidden  [E, r] out
//   dweights [E] out, or null
template <Activation activation, class A>
MOELORA_HD void gated_backward_row(int E, int r, const A* hidden, const A* weights, A scale,
                                   bool with_bias, const A* dmixed, A* dhidden, A* dweights) {
  for (int e = 0; e < E; ++e) {
    const A gate = scale * weights[e];
    for (int j = e * r; j < (e + 1) * r; ++j)
      dhidden[j] = gate * dmixed[j] * activate_slope(activation, hidden[j]);
  }
  if (!dweights) return;
  for (int e = 0; e < E; ++e)
    dweights[e] = gated_dweight(activation, dmixed + e * r, hidden + e * r, r, scale,
                                with_bias ? dmixed[E * r + e] : A(0));
}

}  // namespace moelora
