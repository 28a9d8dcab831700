// What the topk mix keeps of its routing, by all experts (topk.cu) or by segments (routing.cu).
#pragma once

#include "cuda/mix.cuh"
#include "mix/topk.h"

namespace moelora::cuda {

// Saves the routing of n tokens from t0 on, and sums their probabilities for this block.
//   logits  [n, pitch]
//   row(i)  weights [k], selected [k] and probs [E] of a token
template <class A, class Row>
__device__ __forceinline__ void save_routing(const TopkForward& p, int64_t block, int64_t t0, int n,
                                             const A* logits, int pitch, const Row& row) {
  const int E = p.E, k = p.k;
  for (int e = threadIdx.x; e < E; e += blockDim.x) {
    double sum = 0;  // a router may give an expert nearly the same, again and again
    for (int i = 0; i < n; ++i) sum += row(i).probs[e];
    static_cast<A*>(p.prob_partials)[block * E + e] = static_cast<A>(sum);
  }
  for_each(n, k, [&](int i, int s) {
    static_cast<A*>(p.weights)[(t0 + i) * k + s] = row(i).weights[s];
    p.selected[(t0 + i) * k + s] = row(i).selected[s];
  });
  for_each(n, E, [&](int i, int e) {
    static_cast<A*>(p.logits)[(t0 + i) * E + e] = logits[i * pitch + e];
  });
}

}  // namespace moelora::cuda
