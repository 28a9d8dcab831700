// The output gate, row by row: weights from the experts' outputs, computed in rank space, and the
// gated mix with them; and its backward.  Formulas: docs/math.md, "output_gate" (MoLE, 2404.13628,
// eqs. 9-11).  Letters: E experts, r rank, R = E r.
//
// The output of expert i is o_i = s_i B_i H_i.  With P_i = s_i B_iᵀ e_i its product with the gate
// is H_iᵀ P_i, and with s_i B_i = Q_i R_i (QR) its norm is |R_i H_i|: nothing as long as an output.
#pragma once

#include <cmath>
#include <cstdint>

#include "mix/rotate.h"
#include "mix/softmax.h"

namespace moelora {

// How the experts' outputs are normalised before the gate.  The numbers are the operators' argument
// `normalization`.
enum class Normalization : int32_t { kNone = 0, kL2 = 1, kL2PerExpert = 2, kLayerNorm = 3 };
constexpr int kNormalizations = 4;

// What a call shares between its tokens.
template <class A>
struct OutputGate {
  int E, r;
  Normalization normalization;
  const A* projection;              // [R, E]: P; for kLayerNorm one more row, -Σ_i 1ᵀ e_i
  const A* projection_t;            // its transpose
  const A* factors;                 // [E, r, r]: upper triangular R_i
  const A* factors_t;               // their transposes
  const A* means;                   // [R], kLayerNorm only: s_i B_iᵀ 1 / N
  const A* scales;                  // [E]: s_i
  const uint8_t* mask;              // [E] nonzero where an expert may be used, or null for all
  bool mask_input;                  // unused experts do not feed the gate either
  A inv_tau;                        // 1 / τ
  A inv_width;                      // 1 / N, kLayerNorm only
  MOELORA_HD int columns() const {  // of the normalised input
    return E * r + (normalization == Normalization::kLayerNorm ? 1 : 0);
  }
  MOELORA_HD bool feeds(int e) const { return !mask_input || !mask || mask[e]; }
};

constexpr double kNormEpsilon = 1e-12;      // least norm, as torch.nn.functional.normalize
constexpr double kLayerNormEpsilon = 1e-5;  // as torch.nn.LayerNorm

// The mean of an expert's output, for kLayerNorm.
template <class A>
MOELORA_HD A mean_of_expert(const OutputGate<A>& g, int e, const A* hidden) {
  return dot(g.means + e * g.r, hidden + e * g.r, g.r);
}

template <class A>
MOELORA_HD int count_feeding(const OutputGate<A>& g) {
  int feeding = 0;
  for (int e = 0; e < g.E; ++e) feeding += g.feeds(e);
  return feeding;
}

template <class A>
MOELORA_HD A inverse_norm(A square) {
  const A norm = std::sqrt(square), least = static_cast<A>(kNormEpsilon);
  return 1 / (norm < least ? least : norm);
}
// What experts that are normalised together have in common.
template <class A>
struct CommonNorm {
  A mean;     // of all outputs that feed the gate; kLayerNorm only
  A inverse;  // 1 / norm
};
// From squares to norms.
//   inverse [E] in: |R_e H_e|² where an expert feeds the gate, unless without normalisation;
//               out: 1 / norm, 0 where it does not
//   mean_of(e)  see mean_of_expert
template <class A, class Mean>
MOELORA_HD CommonNorm<A> invert_norms(const OutputGate<A>& g, A* inverse, const Mean& mean_of) {
  CommonNorm<A> all = {0, 1};
  if (g.normalization == Normalization::kL2 || g.normalization == Normalization::kLayerNorm) {
    A square = 0;
    for (int e = 0; e < g.E; ++e)
      if (g.feeds(e)) square += inverse[e];
    if (g.normalization == Normalization::kLayerNorm) {
      const int feeding = count_feeding(g);
      for (int e = 0; e < g.E; ++e)
        if (g.feeds(e)) all.mean += mean_of(e) / feeding;
      A spread = 0;
      for (int e = 0; e < g.E; ++e) {
        const A difference = g.feeds(e) ? mean_of(e) - all.mean : A(0);
        spread += difference * difference;
      }
      square = (square * g.inv_width + spread) / feeding + static_cast<A>(kLayerNormEpsilon);
    }
    all.inverse = inverse_norm(square);
  }
  const bool alone = g.normalization == Normalization::kL2PerExpert;
  for (int e = 0; e < g.E; ++e)
    inverse[e] = !g.feeds(e) ? A(0) : alone ? inverse_norm(inverse[e]) : all.inverse;
  return all;
}

// The gate's input in rank space: hidden over the norm that each expert is divided by, and for
// kLayerNorm the mean over it as one more column.
//   normalized [columns()] out
//   inverse    [E] out: 1 / norm per expert, 0 where it does not feed the gate
//   rotated    [R] out: R_e H_e of the experts that feed the gate, unless without normalisation
template <class A>
MOELORA_HD CommonNorm<A> normalize_row(const OutputGate<A>& g, const A* hidden, A* normalized,
                                       A* inverse, A* rotated) {
  const int E = g.E, r = g.r;
  if (g.normalization != Normalization::kNone)
    for (int e = 0; e < E; ++e)
      if (g.feeds(e))
        inverse[e] = rotate(g.factors_t + e * r * r, hidden + e * r, r, rotated + e * r);
  const CommonNorm<A> all =
      invert_norms(g, inverse, [&](int e) { return mean_of_expert(g, e, hidden); });
  if (g.normalization == Normalization::kLayerNorm) normalized[E * r] = all.mean * all.inverse;
  for (int e = 0; e < E; ++e)
    for (int j = e * r; j < (e + 1) * r; ++j)
      normalized[j] = g.feeds(e) ? hidden[j] * inverse[e] : A(0);
  return all;
}

// From the gradient of the gates to that of ε.
//   gates, dgates [E]
//   dlogits       [E] out
//   returns the token's share of dτ
template <class A>
MOELORA_HD A gate_backward_row(const A* gates, const A* dgates, int E, A inv_tau, A* dlogits) {
  for (int n = 0; n < E; ++n) dlogits[n] = 0;
  softmax_backward_row(gates, dgates, E, dlogits);
  // dτ = -Σ_n dz_n z_n / τ with z = ε / τ, which log g is up to a constant; Σ dz = 0 removes that.
  A dtau = 0;
  for (int n = 0; n < E; ++n) {
    if (gates[n] > 0) dtau -= dlogits[n] * std::log(gates[n]) * inv_tau;
    dlogits[n] *= inv_tau;
  }
  return dtau;
}

// Back through the norm ν of an expert: with u = H / ν, dH = du / ν - turn Rᵀ R H + dmean means.
template <class A>
struct ThroughNorm {
  A turn, dmean;
};
//   along      <du, u> over all that ν is the norm of
//   dlast      gradient of the last column; this and what follows for kLayerNorm only
//   difference the expert's mean minus that of all
template <class A>
MOELORA_HD ThroughNorm<A> through_norm(const OutputGate<A>& g, int feeding, A inverse, A along,
                                       A dlast, A difference) {
  const A turn = along * inverse * inverse;
  if (g.normalization == Normalization::kLayerNorm)
    return {turn * g.inv_width / feeding, (dlast * inverse - turn * difference) / feeding};
  // A norm that was clamped is a constant.
  const bool constant =
      g.normalization == Normalization::kNone || inverse >= 1 / static_cast<A>(kNormEpsilon);
  return {constant ? A(0) : turn, 0};
}

// One token.
//   hidden     [R]
//   gates      [E] out: softmax(ε / τ) over the experts that may be used
//   mixed      [R] out: s_e g_e H_e
//   normalized [columns()], inverse [E], rotated [R] scratch
template <class A>
MOELORA_HD void output_gate_forward_row(const OutputGate<A>& g, const A* hidden, A* gates, A* mixed,
                                        A* normalized, A* inverse, A* rotated) {
  const int E = g.E, r = g.r, columns = g.columns();
  normalize_row(g, hidden, normalized, inverse, rotated);
  A* logits = inverse;  // not needed again
  for (int n = 0; n < E; ++n) logits[n] = 0;
  for (int c = 0; c < columns;) {  // expert by expert: short sums err less
    for (int n = 0; n < E; ++n) gates[n] = 0;
    for (const int end = c + r < columns ? c + r : columns; c < end; ++c)
      for (int n = 0; n < E; ++n) gates[n] += normalized[c] * g.projection[c * E + n];
    for (int n = 0; n < E; ++n) logits[n] += gates[n];
  }
  for (int n = 0; n < E; ++n)
    logits[n] = g.mask && !g.mask[n] ? -static_cast<A>(INFINITY) : logits[n] * g.inv_tau;
  softmax_row(logits, E, gates);
  for (int e = 0; e < E; ++e)
    for (int j = e * r; j < (e + 1) * r; ++j) mixed[j] = g.scales[e] * gates[e] * hidden[j];
}

// Its backward.  The gradient of P is normalizedᵀ dlogits, summed over tokens by the caller.
//   dmixed     [R]
//   dgates     [E], or null: a gradient that reaches the gates from elsewhere (balance loss)
//   normalized [columns()] out
//   dlogits    [E] out: gradient of ε
//   dhidden    [R] out
//   returns this token's share of dτ
//   inverse [E], dnormalized [columns()], rotated [R] scratch
template <class A>
MOELORA_HD A output_gate_backward_row(const OutputGate<A>& g, const A* hidden, const A* gates,
                                      const A* dmixed, const A* dgates, A* normalized, A* dlogits,
                                      A* dhidden, A* inverse, A* dnormalized, A* rotated) {
  const int E = g.E, r = g.r, columns = g.columns();
  const CommonNorm<A> all = normalize_row(g, hidden, normalized, inverse, rotated);
  // Through the mix into gates and hidden.
  A* dgate = dnormalized;  // columns() >= E, and needed only until dlogits is known
  for (int e = 0; e < E; ++e) {
    for (int j = e * r; j < (e + 1) * r; ++j) dhidden[j] = g.scales[e] * gates[e] * dmixed[j];
    dgate[e] = g.scales[e] * dot(dmixed + e * r, hidden + e * r, r) + (dgates ? dgates[e] : A(0));
  }
  const A dtau = gate_backward_row(gates, dgate, E, g.inv_tau, dlogits);
  // Through the product with P.
  for (int c = 0; c < columns; ++c) dnormalized[c] = 0;
  for (int n = 0; n < E; ++n)
    for (int c = 0; c < columns; ++c)
      dnormalized[c] += dlogits[n] * g.projection_t[n * columns + c];
  const bool layer_norm = g.normalization == Normalization::kLayerNorm;
  const int feeding = count_feeding(g);
  const A along_all = dot(dnormalized, normalized, columns);
  for (int e = 0; e < E; ++e) {
    if (!g.feeds(e)) continue;
    A* dh = dhidden + e * r;
    A along = along_all;
    if (g.normalization == Normalization::kL2PerExpert)
      along = dot(dnormalized + e * r, normalized + e * r, r);
    const ThroughNorm<A> back =
        through_norm(g, feeding, inverse[e], along, layer_norm ? dnormalized[E * r] : A(0),
                     layer_norm ? mean_of_expert(g, e, hidden) - all.mean : A(0));
    for (int j = 0; j < r; ++j) dh[j] += dnormalized[e * r + j] * inverse[e];
    if (back.turn != 0) add_rotated_back(g.factors + e * r * r, rotated + e * r, r, -back.turn, dh);
    for (int j = 0; layer_norm && j < r; ++j) dh[j] += back.dmean * g.means[e * r + j];
  }
  return dtau;
}

}  // namespace moelora
