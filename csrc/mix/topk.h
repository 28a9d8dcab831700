// The topk mix, row by row: logits -> softmax -> top-k -> (renormalised) weights, and its backward.
// Formulas: docs/math.md, "topk".  Letters: E experts, r rank, k top-k.
#pragma once

#include <cstdint>

#include "mix/softmax.h"

namespace moelora {

// One token's choice.  Ties go to the lower index.
//   logits   [E]
//   selected [k]  out: experts in descending order of logit
//   weights  [k]  out: softmax over the selected (renormalize) or their share of the full softmax
//   probs    [E]  out: the full softmax
template <class A>
MOELORA_HD void topk_forward_row(const A* logits, int E, int k, bool renormalize, int32_t* selected,
                                 A* weights, A* probs) {
  // One pass with an insertion into the sorted choices: most logits cost one comparison.  Comparing
  // is strict, so equal keys keep the lower index, and it is on integers, so NaN cannot select a
  // column that does not exist.
  auto smallest = order_key(A(0));
  for (int e = 0; e < E; ++e) {
    const auto key = order_key(logits[e]);
    if (e >= k && key <= smallest) continue;
    int s = e < k ? e : k - 1;
    for (; s > 0 && key > order_key(logits[selected[s - 1]]); --s) selected[s] = selected[s - 1];
    selected[s] = e;
    if (e + 1 >= k) smallest = order_key(logits[selected[k - 1]]);
  }

  const A largest = logits[selected[0]];
  A total = 0;
  for (int e = 0; e < E; ++e) probs[e] = exp_nonpositive(logits[e] - largest);
  for (int e = 0; e < E; ++e) total += probs[e];
  A chosen = total;
  if (renormalize) {
    chosen = 0;
    for (int s = 0; s < k; ++s) chosen += probs[selected[s]];
  }
  for (int s = 0; s < k; ++s) weights[s] = probs[selected[s]] / chosen;
  for (int e = 0; e < E; ++e) probs[e] /= total;
}

// dweights[s] = scale <dH'_s, H_s>: how the loss moves with the weight of slot s.  Rows are r long.
template <class A>
MOELORA_HD A dweight_row(const A* dhidden_out, const A* hidden, int r, A scale) {
  A sum = 0;
  for (int j = 0; j < r; ++j) sum += dhidden_out[j] * hidden[j];
  return scale * sum;
}

// Renormalised weights are a softmax over the selected logits only:
//   dlogits_s = w_s (dw_s - Σ_s' w_s' dw_s'), zero for every other expert.
//   dweights [k] in, dlogits [k] out: one per slot
template <class A>
MOELORA_HD void topk_backward_selected(const A* weights, const A* dweights, int k, A* dlogits) {
  A mean = 0;
  for (int s = 0; s < k; ++s) mean += weights[s] * dweights[s];
  for (int s = 0; s < k; ++s) dlogits[s] = weights[s] * (dweights[s] - mean);
}

// The gradient of one token's logits.
//   logits     [E];  weights, selected, dweights [k], one per slot
//   dprob_sums [E] or null
//   scratch    [2 E + k]
//   dlogits    [E] out
template <class A>
MOELORA_HD void topk_backward_row(const A* logits, const A* weights, const int32_t* selected,
                                  const A* dweights, const A* dprob_sums, int E, int k,
                                  bool renormalize, A* scratch, A* dlogits) {
  A *probs = scratch, *dprobs = probs + E, *chosen = dprobs + E;
  for (int e = 0; e < E; ++e) dlogits[e] = 0;
  if (renormalize) {
    topk_backward_selected(weights, dweights, k, chosen);
    for (int s = 0; s < k; ++s) dlogits[selected[s]] = chosen[s];
    if (!dprob_sums) return;
  }
  for (int e = 0; e < E; ++e) dprobs[e] = dprob_sums ? dprob_sums[e] : A(0);
  if (!renormalize)
    for (int s = 0; s < k; ++s) dprobs[selected[s]] += dweights[s];
  softmax_row(logits, E, probs);
  softmax_backward_row(probs, dprobs, E, dlogits);
}

}  // namespace moelora
