// The gated mix behind a shrink: of x forward, of dy backward.  The mathematics is that of
// mix/gated.h, an element at a time: no expert meets another.
#include "cuda/decode.cuh"
#include "mix/gated.h"

namespace moelora::cuda {
namespace {

// s w_e of n tokens from t0 on, for all threads to see.
//   gates [n, odd(E)]
template <class A>
__device__ __forceinline__ void load_gates(const Gated& p, int64_t t0, int n, A* gates) {
  for_each(n, p.E, [&](int row, int e) {
    gates[row * odd(p.E) + e] = static_cast<A>(p.scale) * table_value<A>(p.weights, t0 + row, e);
  });
  __syncthreads();
}

// mixed of n tokens from t0 on: H', what multiplies the up biases, zeros.
//   hidden(row, c) H before φ
template <class T, class Hidden>
__device__ __forceinline__ void store_mixed(const Gated& p, int64_t t0, int n,
                                            const acc_t<T>* gates, const Hidden& hidden) {
  using A = acc_t<T>;
  const int R = p.E * p.r, columns = p.mixed_columns(), ld = static_cast<int>(padded(columns));
  for_each(n, ld, [&](int row, int c) {
    const A* gate = gates + row * odd(p.E);
    A value = 0;
    if (c < R)
      value = gate[c / p.r] * activate(p.activation, hidden(row, c));
    else if (c < columns)
      value = gate[c - R];
    static_cast<T*>(p.mixed)[(t0 + row) * ld + c] = static_cast<T>(value);
  });
}

template <class T>
struct ForwardMix {
  using A = acc_t<T>;
  GatedForward p;

  __device__ void save_nothing() { p.hidden = nullptr; }

  // tile [n, pitch]: H without what dropout multiplies by and without biases
  __device__ void operator()(int64_t, int64_t t0, int n, A* tile, int pitch, A* scratch) const {
    const int R = p.E * p.r;
    const A inv_keep = static_cast<A>(p.inv_keep);
    const T* bias = static_cast<const T*>(p.down_bias);
    for_each(n, R, [&](int row, int c) {
      A& hidden = tile[row * pitch + c];
      hidden = inv_keep * hidden + (bias ? static_cast<A>(bias[c]) : A(0));
      if (p.hidden) static_cast<A*>(p.hidden)[(t0 + row) * R + c] = hidden;
    });
    load_gates(p, t0, n, scratch);
    store_mixed<T>(p, t0, n, scratch, [&](int row, int c) { return tile[row * pitch + c]; });
  }
};

template <class T>
struct BackwardMix {
  using A = acc_t<T>;
  GatedBackward p;

  // tile [n, pitch]: dH' and, if the weights get a gradient, <dy, up bias>; without the scale
  __device__ void operator()(int64_t, int64_t t0, int n, const A* tile, int pitch,
                             A* scratch) const {
    const int E = p.E, r = p.r, R = E * r;
    const A* saved = static_cast<const A*>(p.hidden) + t0 * R;
    const auto hidden = [&](int row, int c) { return saved[row * R + c]; };
    load_gates(p, t0, n, scratch);
    if (p.dweights)
      for (int i = threadIdx.x; i < n * E; i += blockDim.x) {
        const int row = i / E, e = i % E;
        const A* dmixed = tile + row * pitch;
        static_cast<A*>(p.dweights)[t0 * E + i] =
            gated_dweight(p.activation, dmixed + e * r, saved + row * R + e * r, r,
                          static_cast<A>(p.scale), p.up_bias ? dmixed[R + e] : A(0));
      }
    if (p.dhidden) {
      const int ld = static_cast<int>(padded(R));
      for_each(n, ld, [&](int row, int c) {
        A value = 0;
        // Both uses of dH pass the mask, which therefore carries no 1 / (1 - p) of its own.
        if (c < R)
          value = static_cast<A>(p.inv_keep) * scratch[row * odd(E) + c / r] *
                  tile[row * pitch + c] * activate_slope(p.activation, hidden(row, c));
        static_cast<T*>(p.dhidden)[(t0 + row) * ld + c] = static_cast<T>(value);
      });
    }
    if (p.mixed) store_mixed<T>(p, t0, n, scratch, hidden);
  }
};

int64_t bytes(DType dtype, const Gated& mix) {
  const int64_t size = accumulator_size(dtype);
  return (odd(mix.mixed_columns()) + odd(mix.E)) * size;
}

}  // namespace

int64_t row_bytes(DType dtype, const GatedForward& mix) { return bytes(dtype, mix); }
int64_t row_bytes(DType dtype, const GatedBackward& mix) { return bytes(dtype, mix); }

void launch_mix(DType dtype, const Shrink& p, const GatedForward& mix, const ShrinkPlan& plan,
                const Expand& expand, void* stream) {
  launch_between<ForwardMix>("gated_forward", dtype, p, mix, plan, expand, stream);
}

void launch_mix(DType dtype, const Shrink& p, const GatedBackward& mix, const ShrinkPlan& plan,
                void* stream) {
  launch_behind_shrink<BackwardMix>("gated_backward", dtype, p, mix, plan, stream);
}

}  // namespace moelora::cuda
