// The grid mix behind a shrink: of x forward, of dy backward.  The mathematics of a token is that
// of mix/grid.h, a thread a token; what goes in and out, a warp a token.
#include "cuda/decode.cuh"
#include "mix/grid.h"

namespace moelora::cuda {
namespace {

template <class T>
struct Scalars {
  using A = acc_t<T>;
  A omega, beta, token_scale, task_scale;

  __device__ explicit Scalars(const Grid& p)
      : omega(static_cast<A>(*static_cast<const T*>(p.omega))),
        beta(static_cast<A>(*static_cast<const T*>(p.beta))),
        token_scale(static_cast<A>(p.token_scale)),
        task_scale(static_cast<A>(p.task_scale)) {}
  __device__ GridScales<A> scales() const {
    return grid_scales(omega, beta, token_scale, task_scale);
  }
};

// out [T, padded(columns)] of n tokens from t0 on; from(row) [columns]
template <class T, class From>
__device__ __forceinline__ void store_rows(void* out, int64_t t0, int n, int columns,
                                           const From& from) {
  using A = acc_t<T>;
  const int ld = static_cast<int>(padded(columns));
  for_each(n, ld, [&](int row, int c) {
    static_cast<T*>(out)[(t0 + row) * ld + c] = static_cast<T>(c < columns ? from(row)[c] : A(0));
  });
}

template <class T>
struct ForwardMix {
  using A = acc_t<T>;
  GridForward p;

  // external [gates], mixed [r2]
  static __host__ __device__ int scratch_size(GridShape shape) {
    return odd(shape.gates() + shape.r2);
  }

  __device__ void save_nothing() { p.hidden = nullptr; }

  // tile [n, pitch]: hidden | logits
  __device__ void operator()(int64_t, int64_t t0, int n, A* tile, int pitch, A* scratch) const {
    const GridShape shape = p.shape;
    const int gates = shape.gates(), columns = p.hidden_columns(), size = scratch_size(shape);
    if (p.hidden)
      for_each(n, columns, [&](int row, int c) {
        static_cast<A*>(p.hidden)[(t0 + row) * columns + c] = tile[row * pitch + c];
      });
    const bool external = p.intuition.values;
    if (external)
      for_each(n, gates, [&](int row, int g) {
        scratch[row * size + g] = table_value<A>(p.intuition, t0 + row, g);
      });
    __syncthreads();

    const GridScales<A> scales = Scalars<T>(p).scales();
    for (int row = threadIdx.x; row < n; row += blockDim.x) {
      A *hidden = tile + row * pitch, *logits = hidden + shape.r1, *own = scratch + row * size;
      grid_forward_row(shape, hidden, logits, external ? own : nullptr, scales, logits,
                       own + gates);
    }
    __syncthreads();
    store_rows<T>(p.mixed, t0, n, shape.r2, [&](int row) { return scratch + row * size + gates; });
  }
};

template <class T>
struct BackwardMix {
  using A = acc_t<T>;
  GridBackward p;

  // What is kept of a token beside dH'; hidden and logits, and external, become their gradients.
  struct Row {
    A *hidden, *logits, *external, *probs, *dgate, *mixed;
    __device__ Row(A* at, GridShape shape)
        : hidden(at),
          logits(hidden + shape.r1),
          external(logits + shape.gates()),
          probs(external + shape.gates()),
          dgate(probs + shape.gates()),
          mixed(dgate + shape.gates()) {}
  };
  static __host__ __device__ int scratch_size(GridShape shape) {
    return odd(shape.r1 + 4 * shape.gates() + shape.r2);
  }

  // tile [n, pitch]: dH'
  __device__ void operator()(int64_t, int64_t t0, int n, const A* tile, int pitch,
                             A* scratch) const {
    const GridShape shape = p.shape;
    const int gates = shape.gates(), columns = p.hidden_columns();
    const auto row_of = [&](int row) { return Row(scratch + row * scratch_size(shape), shape); };
    const bool external = p.intuition.values;
    for_each(n, columns, [&](int row, int c) {
      row_of(row).hidden[c] = static_cast<const A*>(p.hidden)[(t0 + row) * columns + c];
    });
    if (external)
      for_each(n, gates, [&](int row, int g) {
        row_of(row).external[g] = table_value<A>(p.intuition, t0 + row, g);
      });
    __syncthreads();

    const Scalars<T> scalars(p);
    const GridScales<A> scales = scalars.scales();
    for (int row = threadIdx.x; row < n; row += blockDim.x) {
      const Row r = row_of(row);
      GridScales<A> d;
      grid_backward_row(shape, r.hidden, r.logits, external ? r.external : nullptr, scales,
                        tile + row * pitch, r.hidden, r.logits, r.mixed, &d,
                        p.dintuition ? r.external : nullptr, r.probs, r.dgate);
      if (p.dscalars) {
        A* out = static_cast<A*>(p.dscalars) + 2 * (t0 + row);
        out[0] = grid_domega(scalars.omega, scalars.token_scale, scalars.task_scale, d);
        out[1] = grid_dbeta(scalars.beta, d);
      }
    }
    __syncthreads();
    if (p.dhidden)
      store_rows<T>(p.dhidden, t0, n, columns, [&](int row) { return row_of(row).hidden; });
    if (p.mixed)
      store_rows<T>(p.mixed, t0, n, shape.r2, [&](int row) { return row_of(row).mixed; });
    if (p.dintuition)
      for_each(n, gates, [&](int row, int g) {
        static_cast<A*>(p.dintuition)[(t0 + row) * gates + g] = row_of(row).external[g];
      });
  }
};

}  // namespace

int64_t row_bytes(DType dtype, const GridForward& mix) {
  const int64_t size = accumulator_size(dtype);
  return (odd(mix.hidden_columns()) + ForwardMix<float>::scratch_size(mix.shape)) * size;
}
int64_t row_bytes(DType dtype, const GridBackward& mix) {
  const int64_t size = accumulator_size(dtype);
  return (odd(mix.shape.r2) + BackwardMix<float>::scratch_size(mix.shape)) * size;
}

void launch_mix(DType dtype, const Shrink& p, const GridForward& mix, const ShrinkPlan& plan,
                const Expand& expand, void* stream) {
  launch_between<ForwardMix>("grid_forward", dtype, p, mix, plan, expand, stream);
}

void launch_mix(DType dtype, const Shrink& p, const GridBackward& mix, const ShrinkPlan& plan,
                void* stream) {
  launch_behind_shrink<BackwardMix>("grid_backward", dtype, p, mix, plan, stream);
}

}  // namespace moelora::cuda
