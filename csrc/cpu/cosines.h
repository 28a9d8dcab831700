// The cosines of PEMT's task sparsity loss on the CPU: row norms, the row mathematics, and the
// gradients of f that need no product.
#pragma once

#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu/vec.h"
#include "mix/cosines.h"

namespace moelora {
namespace MOELORA_LEVEL {

// Σ v², in as many sums as four registers have lanes.
template <class T>
acc_t<T> sum_of_squares(const T* v, int64_t n) {
  using A = acc_t<T>;
  constexpr int kSums = 4;
  vec<A> sums[kSums] = {};
  int64_t c = 0;
  for (; c + kSums * kLanes<A> <= n; c += kSums * kLanes<A>) {
    MOELORA_UNROLL
    for (int i = 0; i < kSums; ++i) {
      const vec<A> part = load(v + c + i * kLanes<A>);
      sums[i] += part * part;
    }
  }
  for (; c < n; c += kLanes<A>) {
    const int64_t rest = n - c;
    const vec<A> part = rest < kLanes<A> ? load_partial(v + c, rest) : load(v + c);
    sums[0] += part * part;
  }
  const vec<A> total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  A sum;
  lane_sums<1, A>(&total, &sum);
  return sum;
}

// out = v + coefficient w; v may be null.
template <class T>
void add_scaled(const T* v, acc_t<T> coefficient, const T* w, int64_t n, T* out) {
  using A = acc_t<T>;
  int64_t c = 0;
  for (; c + kLanes<A> <= n; c += kLanes<A>)
    store(out + c, (v ? load(v + c) : vec<A>{}) + splat(coefficient) * load(w + c));
  for (; c < n; ++c) out[c] = from_acc<T>((v ? to_acc(v[c]) : A(0)) + coefficient * to_acc(w[c]));
}

template <class T>
struct CosineKernels {
  using A = acc_t<T>;

  static const A* in(const void* p, int64_t offset) { return static_cast<const A*>(p) + offset; }
  static A* out(void* p, int64_t offset) { return static_cast<A*>(p) + offset; }

  static void forward(const CosinesForward& p, int64_t t0, int64_t t1) {
    static thread_local Scratch<A> scratch;
    A* rotated = scratch.take(p.r);
    const int64_t R = int64_t{p.E} * p.r;
    for (int64_t t = t0; t < t1; ++t) {
      const A f_norm = std::sqrt(sum_of_squares(static_cast<const T*>(p.f) + t * p.ldf, p.N));
      *out(p.f_norm, t) = f_norm;
      cosines_row(p.E, p.r, in(p.factors, 0), in(p.scales, 0), f_norm, in(p.seen, t * R),
                  in(p.hidden, t * R), out(p.cosines, t * p.E), out(p.norms, t * p.E), rotated);
    }
  }
  static void backward(const CosinesBackward& p, int64_t t0, int64_t t1) {
    static thread_local Scratch<A> scratch;
    A* turned = scratch.take(p.r);
    const int64_t R = int64_t{p.E} * p.r;
    for (int64_t t = t0; t < t1; ++t) {
      const A along = cosines_backward_row(
          p.E, p.r, in(p.factors, 0), in(p.scales, 0), *in(p.f_norm, t), in(p.seen, t * R),
          in(p.hidden, t * R), in(p.cosines, t * p.E), in(p.norms, t * p.E),
          in(p.dcosines, t * p.E), out(p.dseen, t * R), out(p.dhidden, t * R), turned);
      add_scaled(p.df_given ? static_cast<const T*>(p.df_given) + t * p.lddf : nullptr, along,
                 static_cast<const T*>(p.f) + t * p.ldf, p.N, static_cast<T*>(p.df) + t * p.N);
    }
  }
};

}  // namespace MOELORA_LEVEL
}  // namespace moelora
