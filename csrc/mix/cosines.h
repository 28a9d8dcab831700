// Cosines of a layer's output f with every expert's output s_e B_e h_e, row by row and in rank
// space, and their backward: PEMT's task sparsity loss (docs/math.md).  Letters: E experts, r rank.
//
// With g_e = B_eᵀ f and B_e = Q_e R_e (QR), <f, B_e h_e> = <g_e, h_e> and |B_e h_e| = |R_e h_e|.
#pragma once

#include <cmath>
#include <cstdint>

#include "mix/rotate.h"

namespace moelora {

// A call on T tokens.  A: accumulator type of the tensors; strides count elements.
struct Cosines {
  int64_t T, N;
  int E, r;
  const void* f;  // [T, N], ldf
  int64_t ldf;
  const void *seen, *hidden;  // A [T, E, r]
  const void* factors;        // A [E, r, r]: rotations, or backward grams
  const void* scales;         // A [E]
  void* f_norm;               // A [T]
  void *norms, *cosines;      // A [T, E]
};
struct CosinesForward : Cosines {};
struct CosinesBackward : Cosines {
  const void* dcosines;  // A [T, E]
  const void* df_given;  // [T, N], lddf, or null: what reaches f from elsewhere
  int64_t lddf;
  void* df;               // [T, N]: df_given and what comes through |f|
  void *dseen, *dhidden;  // A [T, E, r]
};

constexpr double kSmallestNorm = 1e-8;  // as torch.nn.functional.cosine_similarity

// 1 / (|f| |s B h|), neither norm less than the smallest.
template <class A>
MOELORA_HD A inverse_norms(A f_norm, A norm) {
  const A least = static_cast<A>(kSmallestNorm);
  return 1 / ((f_norm < least ? least : f_norm) * (norm < least ? least : norm));
}

// One token.
//   scales    [E]: s
//   f_norm    |f|
//   seen      [E, r]: g
//   hidden    [E, r]: h
//   rotated   [E, r]: R h
//   cosines   [E] out
//   norms     [E] out: |s B h|
template <class A>
MOELORA_HD void cosines_row(int E, int r, const A* scales, A f_norm, const A* seen, const A* hidden,
                            const A* rotated, A* cosines, A* norms) {
  for (int e = 0; e < E; ++e) {
    const A* z = rotated + e * r;
    norms[e] = std::fabs(scales[e]) * std::sqrt(dot(z, z, r));
    cosines[e] = scales[e] * dot(seen + e * r, hidden + e * r, r) * inverse_norms(f_norm, norms[e]);
  }
}

// Its backward.  Where a norm was clamped it is a constant.
//   turned   [E, r]: Rᵀ R h
//   dcosines [E]
//   dseen    [E, r] out
//   dhidden  [E, r] out
//   returns the coefficient of f in its gradient through |f|
template <class A>
MOELORA_HD A cosines_backward_row(int E, int r, const A* scales, A f_norm, const A* seen,
                                  const A* hidden, const A* turned, const A* cosines,
                                  const A* norms, const A* dcosines, A* dseen, A* dhidden) {
  const A least = static_cast<A>(kSmallestNorm);
  A along = 0;
  for (int e = 0; e < E; ++e) {
    const A each = dcosines[e] * scales[e] * inverse_norms(f_norm, norms[e]);
    const A product = dcosines[e] * cosines[e], ratio = scales[e] / norms[e];
    const A turn = norms[e] > least ? product * ratio * ratio : A(0);
    for (int j = e * r; j < (e + 1) * r; ++j) {
      dseen[j] = each * hidden[j];
      dhidden[j] = each * seen[j] - turn * turned[j];
    }
    along -= product;
  }
  return f_norm > least ? along / (f_norm * f_norm) : A(0);
}

}  // namespace moelora
