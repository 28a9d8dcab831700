// The topk mix behind a shrink: of x forward, of dy backward.  The mathematics of a token is that
// of mix/topk.h; here a thread takes a row for what is serial, and a warp a row for what is wide.
#include "cuda/decode.cuh"
#include "mix/topk.h"

namespace moelora::cuda {
namespace {

// What a mix keeps of a token beside its sums.
//   gates [E]: weight of each expert; slots [E]: where a token's choice of it stands, or -1
template <class A>
struct Scratch {
  A *gates, *probs, *dprobs, *dlogits, *weights, *dweights;
  int32_t *slots, *selected;

  static __host__ __device__ constexpr int size(int E, int k) { return odd(5 * E + 3 * k); }
  __device__ Scratch(A* scratch, int row, int E, int k) {
    gates = scratch + row * size(E, k);
    probs = gates + E;
    dprobs = probs + E;
    dlogits = dprobs + E;
    slots = reinterpret_cast<int32_t*>(dlogits + E);
    weights = dlogits + 2 * E;
    dweights = weights + k;
    selected = reinterpret_cast<int32_t*>(dweights + k);
  }
  __device__ void choose(const Topk& p, const int32_t* selected, const A* weights) {
    for (int e = 0; e < p.E; ++e) slots[e] = -1;
    for (int s = 0; s < p.k; ++s) {
      slots[selected[s]] = s;
      gates[selected[s]] = static_cast<A>(p.scale) * weights[s];
    }
  }
};

template <class T>
struct ForwardMix {
  using A = acc_t<T>;
  TopkForward p;

  __device__ void save_nothing() { p.hidden = nullptr; }

  // tile [n, pitch]: hidden | logits
  __device__ void operator()(int64_t block, int64_t t0, int n, const A* tile, int pitch,
                             A* scratch) const {
    const int E = p.E, r = p.r, k = p.k, R = E * r;
    const auto row_scratch = [&](int row) { return Scratch<A>(scratch, row, E, k); };
    for (int row = threadIdx.x; row < n; row += blockDim.x) {
      Scratch<A> s = row_scratch(row);
      topk_forward_row(tile + row * pitch + R, E, k, p.renormalize, s.selected, s.weights, s.probs);
      s.choose(p, s.selected, s.weights);
    }
    __syncthreads();

    if (p.hidden) save(block, t0, n, tile, pitch, scratch);
    const A inv_keep = static_cast<A>(p.inv_keep);
    const int ldm = static_cast<int>(padded(R));
    for_each(n, ldm, [&](int row, int c) {
      const Scratch<A> s = row_scratch(row);
      // Exact zeros for the experts not chosen, whatever their hidden.
      const bool chosen = c < R && s.slots[c / r] >= 0;
      static_cast<T*>(p.mixed)[(t0 + row) * ldm + c] =
          static_cast<T>(chosen ? s.gates[c / r] * (inv_keep * tile[row * pitch + c]) : A(0));
    });
  }

 private:
  __device__ void save(int64_t block, int64_t t0, int n, const A* tile, int pitch,
                       A* scratch) const {
    const int E = p.E, r = p.r, k = p.k, R = E * r;
    const auto row_scratch = [&](int row) { return Scratch<A>(scratch, row, E, k); };
    for (int e = threadIdx.x; e < E; e += blockDim.x) {
      A sum = 0;
      int32_t count = 0;
      for (int row = 0; row < n; ++row) {
        const Scratch<A> s = row_scratch(row);
        sum += s.probs[e];
        count += s.slots[e] >= 0;
      }
      static_cast<A*>(p.prob_partials)[block * E + e] = sum;
      p.count_partials[block * E + e] = count;
    }

    const A inv_keep = static_cast<A>(p.inv_keep);
    for_each(n, k, [&](int row, int s) {
      const Scratch<A> scratch_row = row_scratch(row);
      static_cast<A*>(p.weights)[(t0 + row) * k + s] = scratch_row.weights[s];
      p.selected[(t0 + row) * k + s] = scratch_row.selected[s];
    });
    for_each(n, E, [&](int row, int e) {
      static_cast<A*>(p.logits)[(t0 + row) * E + e] = tile[row * pitch + R + e];
    });
    const int kept = p.kept() * r;
    for_each(n, kept, [&](int row, int c) {
      const int e = p.stacked ? c / r : row_scratch(row).selected[c / r];
      static_cast<A*>(p.hidden)[(t0 + row) * kept + c] =
          inv_keep * tile[row * pitch + e * r + c % r];
    });
  }
};

template <class T>
struct BackwardMix {
  using A = acc_t<T>;
  TopkBackward p;

  // tile [n, pitch]: dH' without the scale
  __device__ void operator()(int64_t, int64_t t0, int n, const A* tile, int pitch,
                             A* scratch) const {
    const int E = p.E, r = p.r, k = p.k, R = E * r, kept = p.kept();
    const A* hidden = static_cast<const A*>(p.hidden) + t0 * kept * r;
    const A* weights = static_cast<const A*>(p.weights) + t0 * k;
    const int32_t* selected = p.selected + t0 * k;
    const auto row_scratch = [&](int row) { return Scratch<A>(scratch, row, E, k); };
    const auto slot_of = [&](int e, int s) { return p.stacked ? e : s; };

    for (int i = threadIdx.x; i < n * k; i += blockDim.x) {
      const int row = i / k, e = selected[i];
      row_scratch(row).dweights[i % k] =
          dweight_row(tile + row * pitch + e * r, hidden + (row * kept + slot_of(e, i % k)) * r, r,
                      static_cast<A>(p.scale));
    }
    __syncthreads();
    for (int row = threadIdx.x; row < n; row += blockDim.x) {
      Scratch<A> s = row_scratch(row);
      s.choose(p, selected + row * k, weights + row * k);
      mix_backward(s, t0 + row, weights + row * k, selected + row * k);
    }
    __syncthreads();

    const A inv_keep = static_cast<A>(p.inv_keep);
    const int ldg = static_cast<int>(padded(R + E)), ldm = static_cast<int>(padded(R));
    for_each(n, ldg, [&](int row, int c) {
      const Scratch<A> s = row_scratch(row);
      A value = 0;
      // Both uses of dH pass the mask, which therefore carries no 1 / (1 - p) of its own.
      if (c < R && s.slots[c / r] >= 0)
        value = inv_keep * s.gates[c / r] * tile[row * pitch + c];
      else if (R <= c && c < R + E)
        value = s.dlogits[c - R];
      static_cast<T*>(p.gradients)[(t0 + row) * ldg + c] = static_cast<T>(value);
    });
    if (!p.mixed) return;
    for_each(n, ldm, [&](int row, int c) {
      const Scratch<A> s = row_scratch(row);
      const int slot = c < R ? s.slots[c / r] : -1;
      A value = 0;
      if (slot >= 0)
        value = s.gates[c / r] * hidden[(row * kept + slot_of(c / r, slot)) * r + c % r];
      static_cast<T*>(p.mixed)[(t0 + row) * ldm + c] = static_cast<T>(value);
    });
  }

 private:
  // dlogits of one token.
  __device__ void mix_backward(Scratch<A>& s, int64_t t, const A* weights,
                               const int32_t* selected) const {
    const int E = p.E, k = p.k;
    for (int e = 0; e < E; ++e) s.dlogits[e] = 0;
    if (p.renormalize) {
      topk_backward_selected(weights, s.dweights, k, s.weights);
      for (int i = 0; i < k; ++i) s.dlogits[selected[i]] = s.weights[i];
      if (!p.dprob_sums) return;
    }
    const A* dsums = static_cast<const A*>(p.dprob_sums);
    for (int e = 0; e < E; ++e) s.dprobs[e] = dsums ? dsums[e] : A(0);
    if (!p.renormalize)
      for (int i = 0; i < k; ++i) s.dprobs[selected[i]] += s.dweights[i];
    softmax_row(static_cast<const A*>(p.logits) + t * E, E, s.probs);
    softmax_backward_row(s.probs, s.dprobs, E, s.dlogits);
  }
};

//   rows  how many the shrink before the mix has
int64_t bytes(DType dtype, const Topk& mix, int rows) {
  const int64_t size = accumulator_size(dtype);
  return (odd(rows) + Scratch<float>::size(mix.E, mix.k)) * size;
}

}  // namespace

int64_t row_bytes(DType dtype, const TopkForward& mix) {
  return bytes(dtype, mix, mix.E * (mix.r + 1));
}
int64_t row_bytes(DType dtype, const TopkBackward& mix) { return bytes(dtype, mix, mix.E * mix.r); }

void launch_mix(DType dtype, const Shrink& p, const TopkForward& mix, const ShrinkPlan& plan,
                void* stream) {
  launch_behind_shrink<ForwardMix>("topk_forward", dtype, p, mix, plan, stream);
}

void launch_decode(DType dtype, const Shrink& shrink, const TopkForward& mix,
                   const ShrinkPlan& plan, const Expand& expand, void* stream) {
  launch_mix_and_expand<ForwardMix>("topk_decode", dtype, shrink, mix, plan, expand, stream);
}

void launch_mix(DType dtype, const Shrink& p, const TopkBackward& mix, const ShrinkPlan& plan,
                void* stream) {
  launch_behind_shrink<BackwardMix>("topk_backward", dtype, p, mix, plan, stream);
}

}  // namespace moelora::cuda
