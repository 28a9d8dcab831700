// The averaged mix behind a shrink: of x forward, of dy backward.  The mathematics is that of
// mix/averaged.h, an element or a weight of a token at a time.
#include "cuda/decode.cuh"
#include "mix/averaged.h"

namespace moelora::cuda {
namespace {

// What a mix keeps of a token beside its sums.
//   weights [pairs];  average, daverage [r]: h and dh
template <class A>
struct Scratch {
  A *weights, *average, *daverage;

  static __host__ __device__ constexpr int size(int pairs, int r) { return odd(pairs + 2 * r); }
  __device__ Scratch(A* scratch, int row, int pairs, int r)
      : weights(scratch + row * size(pairs, r)), average(weights + pairs), daverage(average + r) {}
};

// Column c of [splits, padded(R)]: its place in [splits R], or -1 where zeros go.
__device__ __forceinline__ int unpadded(int c, int R) {
  const int ld = static_cast<int>(padded(R)), inner = c % ld;
  return inner < R ? c / ld * R + inner : -1;
}

template <class A, class ScratchOf>
__device__ __forceinline__ void load_weights(const Averaged& p, int64_t t0, int n,
                                             const ScratchOf& scratch_of) {
  for_each(n, p.pairs(), [&](int row, int q) {
    scratch_of(row).weights[q] = table_value<A>(p.weights, t0 + row, q);
  });
  __syncthreads();
}

template <class T>
struct ForwardMix {
  using A = acc_t<T>;
  AveragedForward p;

  __device__ void save_nothing() { p.hidden = nullptr; }

  // tile [n, pitch]: hidden
  __device__ void operator()(int64_t, int64_t t0, int n, const A* tile, int pitch,
                             A* scratch) const {
    const int r = p.r, R = p.E * r, pairs = p.pairs();
    const auto scratch_of = [&](int row) { return Scratch<A>(scratch, row, pairs, r); };
    load_weights<A>(p, t0, n, scratch_of);
    for_each(n, r, [&](int row, int j) {
      const Scratch<A> s = scratch_of(row);
      weighted_sum(pairs, r, j, j + 1, tile + row * pitch, s.weights, A(1), s.average);
    });
    __syncthreads();

    const int columns = pairs * r, ldm = p.splits * static_cast<int>(padded(R));
    if (p.hidden)
      for_each(n, columns, [&](int row, int c) {
        static_cast<A*>(p.hidden)[(t0 + row) * columns + c] = tile[row * pitch + c];
      });
    for_each(n, ldm, [&](int row, int c) {
      const Scratch<A> s = scratch_of(row);
      const int i = unpadded(c, R);
      const A value = i < 0 ? A(0) : static_cast<A>(p.scale) * s.weights[i / r] * s.average[i % r];
      static_cast<T*>(p.mixed)[(t0 + row) * ldm + c] = static_cast<T>(value);
    });
  }
};

template <class T>
struct BackwardMix {
  using A = acc_t<T>;
  AveragedBackward p;

  // tile [n, pitch]: dH' without the scale
  __device__ void operator()(int64_t, int64_t t0, int n, const A* tile, int pitch,
                             A* scratch) const {
    const int r = p.r, R = p.E * r, pairs = p.pairs(), columns = pairs * r;
    const A scale = static_cast<A>(p.scale);
    const A* hidden = static_cast<const A*>(p.hidden) + t0 * columns;
    const auto scratch_of = [&](int row) { return Scratch<A>(scratch, row, pairs, r); };
    load_weights<A>(p, t0, n, scratch_of);
    for_each(n, r, [&](int row, int j) {
      const Scratch<A> s = scratch_of(row);
      weighted_sum(pairs, r, j, j + 1, hidden + row * columns, s.weights, A(1), s.average);
      weighted_sum(pairs, r, j, j + 1, tile + row * pitch, s.weights, scale, s.daverage);
    });
    __syncthreads();

    if (p.dweights)
      for_each(n, pairs, [&](int row, int q) {
        const Scratch<A> s = scratch_of(row);
        static_cast<A*>(p.dweights)[(t0 + row) * pairs + q] =
            averaged_dweight(r, tile + row * pitch + q * r, hidden + row * columns + q * r,
                             s.average, s.daverage, scale);
      });
    const int ldm = p.splits * static_cast<int>(padded(R));
    for_each(n, ldm, [&](int row, int c) {
      const Scratch<A> s = scratch_of(row);
      const int i = unpadded(c, R);
      const A weight = i < 0 ? A(0) : s.weights[i / r];
      const auto value = [&](const A* average) { return i < 0 ? A(0) : weight * average[i % r]; };
      const int64_t at = (t0 + row) * ldm + c;
      static_cast<T*>(p.dhidden)[at] = static_cast<T>(value(s.daverage));
      if (p.mixed) static_cast<T*>(p.mixed)[at] = static_cast<T>(scale * value(s.average));
    });
  }
};

int64_t bytes(DType dtype, const Averaged& mix) {
  const int64_t size = accumulator_size(dtype);
  return (odd(mix.pairs() * mix.r) + Scratch<float>::size(mix.pairs(), mix.r)) * size;
}

}  // namespace

int64_t row_bytes(DType dtype, const AveragedForward& mix) { return bytes(dtype, mix); }
int64_t row_bytes(DType dtype, const AveragedBackward& mix) { return bytes(dtype, mix); }

void launch_mix(DType dtype, const Shrink& p, const AveragedForward& mix, const ShrinkPlan& plan,
                const Expand& expand, void* stream) {
  launch_between<ForwardMix>("averaged_forward", dtype, p, mix, plan, expand, stream);
}

void launch_mix(DType dtype, const Shrink& p, const AveragedBackward& mix, const ShrinkPlan& plan,
                void* stream) {
  launch_behind_shrink<BackwardMix>("averaged_backward", dtype, p, mix, plan, stream);
}

}  // namespace moelora::cuda
