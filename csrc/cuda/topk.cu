// The topk mix behind a shrink: of x forward, of dy backward.  The mathematics of a token is that
// of mix/topk.h; here a thread takes a row for what is serial, and a warp a row for what is wide.
#include "cuda/decode.cuh"
#include "cuda/topk.cuh"

namespace moelora::cuda {
namespace {

// What a mix keeps of a token beside its sums.
//   gates [E]: weight of each expert; slots [E]: where a token's choice of it stands, or -1
template <class A>
struct Scratch {
  A *gates, *probs, *dlogits, *weights, *dweights;
  int32_t *slots, *selected;

  static __host__ __device__ constexpr int size(int E, int k) { return odd(5 * E + 3 * k); }
  __device__ Scratch(A* scratch, int row, int E, int k) {
    gates = scratch + row * size(E, k);
    probs = gates + E;  // with what follows, the scratch of topk_backward_row
    weights = probs + 2 * E;
    dlogits = weights + k;
    slots = reinterpret_cast<int32_t*>(dlogits + E);
    dweights = dlogits + 2 * E;
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
    save_routing(p, block, t0, n, tile + R, pitch, row_scratch);
    for (int e = threadIdx.x; e < E; e += blockDim.x) {
      int32_t count = 0;
      for (int row = 0; row < n; ++row) count += row_scratch(row).slots[e] >= 0;
      p.count_partials[block * E + e] = count;
    }
    const A inv_keep = static_cast<A>(p.inv_keep);
    for_each(n, R, [&](int row, int c) {
      static_cast<A*>(p.hidden)[(t0 + row) * R + c] = inv_keep * tile[row * pitch + c];
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
    const int E = p.E, r = p.r, k = p.k, R = E * r;
    const A* hidden = static_cast<const A*>(p.hidden) + t0 * R;
    const A* weights = static_cast<const A*>(p.weights) + t0 * k;
    const int32_t* selected = p.selected + t0 * k;
    const auto row_scratch = [&](int row) { return Scratch<A>(scratch, row, E, k); };

    for (int i = threadIdx.x; i < n * k; i += blockDim.x) {
      const int row = i / k, e = selected[i];
      row_scratch(row).dweights[i % k] = dweight_row(
          tile + row * pitch + e * r, hidden + row * R + e * r, r, static_cast<A>(p.scale));
    }
    __syncthreads();
    for (int row = threadIdx.x; row < n; row += blockDim.x) {
      Scratch<A> s = row_scratch(row);
      s.choose(p, selected + row * k, weights + row * k);
      topk_backward_row(static_cast<const A*>(p.logits) + (t0 + row) * E, weights + row * k,
                        selected + row * k, s.dweights, static_cast<const A*>(p.dprob_sums), E, k,
                        p.renormalize, s.probs, s.dlogits);
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
      const bool chosen = c < R && s.slots[c / r] >= 0;
      static_cast<T*>(p.mixed)[(t0 + row) * ldm + c] =
          static_cast<T>(chosen ? s.gates[c / r] * hidden[row * R + c] : A(0));
    });
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
                const Expand& expand, void* stream) {
  launch_between<ForwardMix>("topk_forward", dtype, p, mix, plan, expand, stream);
}

void launch_mix(DType dtype, const Shrink& p, const TopkBackward& mix, const ShrinkPlan& plan,
                void* stream) {
  launch_behind_shrink<BackwardMix>("topk_backward", dtype, p, mix, plan, stream);
}

}  // namespace moelora::cuda
