// The output-gated mix behind a shrink: of x forward, of dy backward.  The mathematics is that of
// mix/output_gate.h; here a thread takes an element or an expert of a row for what is wide, and a
// row for what is serial.
#include "cuda/decode.cuh"
#include "mix/output_gate.h"

namespace moelora::cuda {
namespace {

template <class A>
__device__ OutputGate<A> gate_of(const OutputGating& p) {
  OutputGate<A> gate = {};  // without the transposes, which a CPU's vectors want
  gate.E = p.E, gate.r = p.r;
  gate.normalization = p.normalization;
  gate.projection = static_cast<const A*>(p.projection);
  gate.factors = static_cast<const A*>(p.factors);
  gate.means = static_cast<const A*>(p.means);
  gate.scales = static_cast<const A*>(p.scales);
  gate.mask = p.mask;
  gate.mask_input = p.mask_input;
  gate.inv_tau = 1 / *static_cast<const A*>(p.tau);
  gate.inv_width = static_cast<A>(1 / p.width);
  return gate;
}

// What both mixes keep of a token beside its sums.
//   rotated [R]: R_e H_e;  inverse [E]: see invert_norms;  means [E]: of the experts' outputs
template <class A>
struct Scratch {
  A *rotated, *inverse, *means;
  CommonNorm<A>* common;

  static __host__ __device__ constexpr int size(int E, int R) { return R + 2 * E + 2; }
  __device__ Scratch(A* at, int E, int R)
      : rotated(at),
        inverse(at + R),
        means(inverse + E),
        common(reinterpret_cast<CommonNorm<A>*>(means + E)) {}
};

// All of it but the sums, for n rows.  Ends with a barrier.
//   hidden_of(row), scratch_of(row)
template <class A, class Hidden, class ScratchOf>
__device__ __forceinline__ void norms(const OutputGate<A>& g, int n, const Hidden& hidden_of,
                                      const ScratchOf& scratch_of) {
  const int E = g.E, r = g.r;
  const bool layer_norm = g.normalization == Normalization::kLayerNorm;
  if (g.normalization != Normalization::kNone) {
    for_each(n, E * r, [&](int row, int c) {
      const int i = c % r;  // R_e is upper triangular
      scratch_of(row).rotated[c] =
          dot(g.factors + static_cast<int64_t>(c) * r + i, hidden_of(row) + c, r - i);
    });
    __syncthreads();
    for_each(n, E, [&](int row, int e) {
      const Scratch<A> s = scratch_of(row);
      s.inverse[e] = dot(s.rotated + e * r, s.rotated + e * r, r);
      if (layer_norm) s.means[e] = mean_of_expert(g, e, hidden_of(row));
    });
    __syncthreads();
  }
  for (int row = threadIdx.x; row < n; row += blockDim.x) {
    const Scratch<A> s = scratch_of(row);
    *s.common = invert_norms(g, s.inverse, [&](int e) { return s.means[e]; });
  }
  __syncthreads();
}

template <class T>
struct ForwardMix {
  using A = acc_t<T>;
  OutputGateForward p;

  // logits, gates [E] beside what both keep
  static __host__ __device__ constexpr int scratch(int E, int R) {
    return odd(Scratch<A>::size(E, R) + 2 * E);
  }

  __device__ void save_nothing() { p.hidden = nullptr; }

  // tile [n, pitch]: hidden
  __device__ void operator()(int64_t, int64_t t0, int n, const A* tile, int pitch,
                             A* shared) const {
    const OutputGate<A> g = gate_of<A>(p);
    const int E = p.E, r = p.r, R = E * r;
    const auto hidden_of = [&](int row) { return tile + row * pitch; };
    const auto scratch_of = [&](int row) { return Scratch<A>(shared + row * scratch(E, R), E, R); };
    const auto logits_of = [&](int row) {
      return shared + row * scratch(E, R) + Scratch<A>::size(E, R);
    };
    norms(g, n, hidden_of, scratch_of);
    for_each(n, E, [&](int row, int e) {
      const Scratch<A> s = scratch_of(row);
      A logit = 0;
      for (int i = 0; i < E; ++i) {  // expert by expert: short sums err less
        A sum = 0;
        for (int c = i * r; c < (i + 1) * r; ++c)
          sum += hidden_of(row)[c] * g.projection[static_cast<int64_t>(c) * E + e];
        if (g.feeds(i)) logit += s.inverse[i] * sum;
      }
      if (g.normalization == Normalization::kLayerNorm)
        logit += s.common->mean * s.common->inverse * g.projection[static_cast<int64_t>(R) * E + e];
      logits_of(row)[e] = g.mask && !g.mask[e] ? -static_cast<A>(INFINITY) : logit * g.inv_tau;
    });
    __syncthreads();
    for (int row = threadIdx.x; row < n; row += blockDim.x)
      softmax_row(logits_of(row), E, logits_of(row) + E);
    __syncthreads();

    const auto gates_of = [&](int row) { return logits_of(row) + E; };
    if (p.hidden)
      for_each(n, E, [&](int row, int e) {
        static_cast<A*>(p.gates)[(t0 + row) * E + e] = gates_of(row)[e];
      });
    const int ldm = static_cast<int>(padded(R));
    for_each(n, ldm, [&](int row, int c) {
      A value = 0;
      if (c < R) {
        const A h = hidden_of(row)[c];
        if (p.hidden) static_cast<A*>(p.hidden)[(t0 + row) * R + c] = h;
        value = g.scales[c / r] * gates_of(row)[c / r] * h;
      }
      static_cast<T*>(p.mixed)[(t0 + row) * ldm + c] = static_cast<T>(value);
    });
  }
};

template <class T>
struct BackwardMix {
  using A = acc_t<T>;
  OutputGateBackward p;

  // What is kept of a token beside what both mixes keep.
  //   dnormalized [input columns];  back [E]: see through_norm
  struct Own {
    A *hidden, *dnormalized, *dlogits, *dgates;
    ThroughNorm<A>* back;

    static __host__ __device__ constexpr int size(int E, int R) { return 2 * R + 4 * E + 1; }
    __device__ Own(A* at, int E, int R)
        : hidden(at),
          dnormalized(hidden + R),
          dlogits(dnormalized + R + 1),
          dgates(dlogits + E),
          back(reinterpret_cast<ThroughNorm<A>*>(dgates + E)) {}
  };
  static __host__ __device__ constexpr int scratch(int E, int R) {
    return odd(Scratch<A>::size(E, R) + Own::size(E, R));
  }

  // tile [n, pitch]: dH' without the scale
  __device__ void operator()(int64_t, int64_t t0, int n, const A* tile, int pitch,
                             A* shared) const {
    const OutputGate<A> g = gate_of<A>(p);
    const int E = p.E, r = p.r, R = E * r, columns = p.input_columns();
    const auto scratch_of = [&](int row) { return Scratch<A>(shared + row * scratch(E, R), E, R); };
    const auto own_of = [&](int row) {
      return Own(shared + row * scratch(E, R) + Scratch<A>::size(E, R), E, R);
    };
    const auto hidden_of = [&](int row) { return own_of(row).hidden; };
    for_each(n, R, [&](int row, int c) {
      hidden_of(row)[c] = static_cast<const A*>(p.hidden)[(t0 + row) * R + c];
    });
    __syncthreads();
    // Ordered before they are read by the barriers of norms.
    const A* dgates = static_cast<const A*>(p.dgates);
    for_each(n, E, [&](int row, int e) {
      const A reached = dgates ? dgates[(t0 + row) * E + e] : A(0);
      own_of(row).dgates[e] =
          g.scales[e] * dot(tile + row * pitch + e * r, hidden_of(row) + e * r, r) + reached;
    });
    norms(g, n, hidden_of, scratch_of);
    const A* gates = static_cast<const A*>(p.gates) + t0 * E;
    for (int row = threadIdx.x; row < n; row += blockDim.x) {
      const Own own = own_of(row);
      static_cast<A*>(p.dtau)[t0 + row] =
          gate_backward_row(gates + row * E, own.dgates, E, g.inv_tau, own.dlogits);
    }
    __syncthreads();

    for_each(n, E, [&](int row, int e) {
      static_cast<A*>(p.dlogits)[(t0 + row) * E + e] = own_of(row).dlogits[e];
    });
    for_each(n, columns, [&](int row, int c) {
      const Scratch<A> s = scratch_of(row);
      const Own own = own_of(row);
      A value = s.common->mean * s.common->inverse, sum = 0;
      if (c < R) value = g.feeds(c / r) ? own.hidden[c] * s.inverse[c / r] : A(0);
      static_cast<A*>(p.normalized)[(t0 + row) * columns + c] = value;
      for (int e = 0; e < E; ++e)
        sum += own.dlogits[e] * g.projection[static_cast<int64_t>(c) * E + e];
      own.dnormalized[c] = sum;
    });
    if (!p.dhidden) return;
    __syncthreads();
    through_norms(g, n, scratch_of, own_of);

    const int ldm = static_cast<int>(padded(R));
    for_each(n, ldm, [&](int row, int c) {
      const Own own = own_of(row);
      A value = 0;
      if (c < R) {
        const int e = c / r;
        value = g.scales[e] * gates[row * E + e] * tile[row * pitch + c];
        if (g.feeds(e)) {
          const Scratch<A> s = scratch_of(row);
          const ThroughNorm<A> back = own.back[e];
          A turned = 0;
          if (back.turn != 0)
            for (int i = 0; i <= c % r; ++i)
              turned +=
                  s.rotated[e * r + i] * g.factors[(static_cast<int64_t>(e) * r + i) * r + c % r];
          value += own.dnormalized[c] * s.inverse[e] - back.turn * turned;
          if (g.normalization == Normalization::kLayerNorm) value += back.dmean * g.means[c];
        }
      }
      static_cast<T*>(p.dhidden)[(t0 + row) * ldm + c] = static_cast<T>(value);
    });
  }

 private:
  // own.back of n rows.  Ends with a barrier.
  template <class ScratchOf, class OwnOf>
  __device__ __forceinline__ void through_norms(const OutputGate<A>& g, int n,
                                                const ScratchOf& scratch_of,
                                                const OwnOf& own_of) const {
    const int E = g.E, r = g.r;
    const bool layer_norm = g.normalization == Normalization::kLayerNorm;
    for_each(n, E, [&](int row, int e) {
      const Own own = own_of(row);
      // <du, u> of each expert, where its dgate was.
      own.dgates[e] =
          dot(own.dnormalized + e * r, own.hidden + e * r, r) * scratch_of(row).inverse[e];
    });
    __syncthreads();
    const int feeding = count_feeding(g);
    for_each(n, E, [&](int row, int e) {
      const Scratch<A> s = scratch_of(row);
      const Own own = own_of(row);
      A along = own.dgates[e], dlast = 0, difference = 0;
      if (g.normalization != Normalization::kL2PerExpert) {
        along = 0;
        for (int i = 0; i < E; ++i)
          if (g.feeds(i)) along += own.dgates[i];
      }
      if (layer_norm) {
        dlast = own.dnormalized[E * r];
        along += dlast * s.common->mean * s.common->inverse;
        difference = s.means[e] - s.common->mean;
      }
      own.back[e] = through_norm(g, feeding, s.inverse[e], along, dlast, difference);
    });
    __syncthreads();
  }
};

template <template <class> class Mix>
int64_t bytes(DType dtype, const OutputGating& mix) {
  int64_t bytes = 0;
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int R = mix.E * mix.r;
    bytes = static_cast<int64_t>(odd(R) + Mix<T>::scratch(mix.E, R)) * sizeof(acc_t<T>);
  });
  return bytes;
}

}  // namespace

int64_t row_bytes(DType dtype, const OutputGateForward& mix) {
  return bytes<ForwardMix>(dtype, mix);
}
int64_t row_bytes(DType dtype, const OutputGateBackward& mix) {
  return bytes<BackwardMix>(dtype, mix);
}

void launch_mix(DType dtype, const Shrink& p, const OutputGateForward& mix, const ShrinkPlan& plan,
                const Expand& expand, void* stream) {
  launch_between<ForwardMix>("output_gate_forward", dtype, p, mix, plan, expand, stream);
}

void launch_mix(DType dtype, const Shrink& p, const OutputGateBackward& mix, const ShrinkPlan& plan,
                void* stream) {
  launch_behind_shrink<BackwardMix>("output_gate_backward", dtype, p, mix, plan, stream);
}

}  // namespace moelora::cuda
