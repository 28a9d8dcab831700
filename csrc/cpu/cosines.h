// The cosines of PEMT's task sparsity loss on the CPU: row norms, the row mathematics, and the
// gradients of f that need no product.
#pragma once

#include <algorithm>

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

// z = R h of an expert, given Rᵀ [r, r], or another matrix: columns [i, i + kSums registers).  What
// is summed stays in registers, in two chains, since one would wait for its own additions.
template <int kSums, class A>
MOELORA_INLINE void rotate_columns(int r, const A* matrix, const A* h, int i, A* z) {
  vec<A> even[kSums] = {}, odd[kSums] = {};
  const auto add = [&](vec<A>* sums, int j) {
    const vec<A> coefficient = splat(h[j]);
    MOELORA_UNROLL
    for (int s = 0; s < kSums; ++s)
      sums[s] += coefficient * load(matrix + int64_t{j} * r + i + s * kLanes<A>);
  };
  int j = 0;
  for (; j + 2 <= r; j += 2) add(even, j), add(odd, j + 1);
  if (j < r) add(even, j);
  MOELORA_UNROLL
  for (int s = 0; s < kSums; ++s)
    store(z + i + s * kLanes<A>, even[s] + odd[s]);
}
// Of n tokens, rows of E experts.  A matrix meets all tokens before the next does: together they
// are more than the first cache holds.
template <class A>
void rotate_experts(int64_t n, int E, int r, const A* matrices, const A* h, A* z) {
  for (int e = 0; e < E; ++e) {
    const A* matrix = matrices + int64_t{e} * r * r;
    for (int64_t first = e * r; first < n * E * r; first += E * r) {
      int i = 0;
      for (; i + 4 * kLanes<A> <= r; i += 4 * kLanes<A>)
        rotate_columns<4>(r, matrix, h + first, i, z + first);
      for (; i + kLanes<A> <= r; i += kLanes<A>)
        rotate_columns<1>(r, matrix, h + first, i, z + first);
      for (; i < r; ++i) {
        A sum = 0;
        for (int j = 0; j < r; ++j) sum += h[first + j] * matrix[int64_t{j} * r + i];
        z[first + i] = sum;
      }
    }
  }
}

template <class T>
struct CosineKernels {
  using A = acc_t<T>;

  static const A* in(const void* p, int64_t offset) { return static_cast<const A*>(p) + offset; }
  static A* out(void* p, int64_t offset) { return static_cast<A*>(p) + offset; }

  // Calls f(t, products) for tokens [t0, t1), where products [E, r] are the factors times hidden.
  template <class F>
  static void for_tokens(const Cosines& p, int64_t t0, int64_t t1, const F& f) {
    static thread_local Scratch<A> scratch;
    const int64_t R = int64_t{p.E} * p.r;
    A* products = scratch.take(kTokenUnit * R);
    for (int64_t a = t0; a < t1; a += kTokenUnit) {
      const int64_t b = std::min(t1, a + kTokenUnit);
      rotate_experts(b - a, p.E, p.r, in(p.factors, 0), in(p.hidden, a * R), products);
      for (int64_t t = a; t < b; ++t) f(t, static_cast<const A*>(products + (t - a) * R));
    }
  }

  static void forward(const CosinesForward& p, int64_t t0, int64_t t1) {
    const int64_t R = int64_t{p.E} * p.r;
    for_tokens(p, t0, t1, [&](int64_t t, const A* rotated) {
      const A f_norm = std::sqrt(sum_of_squares(static_cast<const T*>(p.f) + t * p.ldf, p.N));
      *out(p.f_norm, t) = f_norm;
      cosines_row(p.E, p.r, in(p.scales, 0), f_norm, in(p.seen, t * R), in(p.hidden, t * R),
                  rotated, out(p.cosines, t * p.E), out(p.norms, t * p.E));
    });
  }
  static void backward(const CosinesBackward& p, int64_t t0, int64_t t1) {
    const int64_t R = int64_t{p.E} * p.r;
    for_tokens(p, t0, t1, [&](int64_t t, const A* turned) {
      const A along = cosines_backward_row(
          p.E, p.r, in(p.scales, 0), *in(p.f_norm, t), in(p.seen, t * R), in(p.hidden, t * R),
          turned, in(p.cosines, t * p.E), in(p.norms, t * p.E), in(p.dcosines, t * p.E),
          out(p.dseen, t * R), out(p.dhidden, t * R));
      add_scaled(p.df_given ? static_cast<const T*>(p.df_given) + t * p.lddf : nullptr, along,
                 static_cast<const T*>(p.f) + t * p.ldf, p.N, static_cast<T*>(p.df) + t * p.N);
    });
  }
};

}  // namespace MOELORA_LEVEL
}  // namespace moelora
