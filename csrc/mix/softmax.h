// Softmax of one token, forward and backward; what every routed mix shares.
#pragma once

#include <cstdint>
#include <cstring>

#include "mix/exp.h"
#include "mix/host_device.h"

namespace moelora {

// Integers in the order of the floats, so that a comparison cannot be defeated by NaN: NaN ranks
// highest, as in torch.topk, and -0 equals +0.
MOELORA_HD int32_t order_key(float v) {
  if (v != v) return INT32_MAX;
  v += 0.0f;
  int32_t bits;
  memcpy(&bits, &v, sizeof bits);
  return bits ^ ((bits >> 31) & INT32_MAX);
}

MOELORA_HD int64_t order_key(double v) {
  if (v != v) return INT64_MAX;
  v += 0.0;
  int64_t bits;
  memcpy(&bits, &v, sizeof bits);
  return bits ^ ((bits >> 63) & INT64_MAX);
}

// probs [n] = softmax(logits [n]).
template <class A>
MOELORA_HD void softmax_row(const A* logits, int n, A* probs) {
  A largest = logits[0];
  for (int e = 1; e < n; ++e)
    if (order_key(logits[e]) > order_key(largest)) largest = logits[e];
  A total = 0;
  for (int e = 0; e < n; ++e) probs[e] = exp_nonpositive(logits[e] - largest);
  for (int e = 0; e < n; ++e) total += probs[e];
  for (int e = 0; e < n; ++e) probs[e] /= total;
}

// dlogits_e = p_e (dp_e - Σ p dp), added to dlogits [n].
//   dprobs [n]: the gradient of probs
template <class A>
MOELORA_HD void softmax_backward_row(const A* probs, const A* dprobs, int n, A* dlogits) {
  A mean = 0;
  for (int e = 0; e < n; ++e) mean += probs[e] * dprobs[e];
  for (int e = 0; e < n; ++e) dlogits[e] += probs[e] * (dprobs[e] - mean);
}

}  // namespace moelora
