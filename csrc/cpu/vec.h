// The vector vocabulary of the CPU kernels.  One source, compiled once per ISA level (see
// level.cpp): register width and the few intrinsics follow the compiler's target macros; all else
// is GCC/Clang vector extensions.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/scalar.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define MOELORA_INLINE inline __attribute__((always_inline))
#define MOELORA_UNROLL _Pragma("GCC unroll 16")

namespace moelora {
namespace MOELORA_LEVEL {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
constexpr int kRegisters = 16;
#else
constexpr int kRegisterBytes = 16;
constexpr int kRegisters = 16;
#endif

template <class A>
constexpr int kLanes = kRegisterBytes / sizeof(A);

// A register of accumulators.
template <class A>
struct Register {
  typedef A type __attribute__((vector_size(kRegisterBytes)));
};
template <class A>
using vec = typename Register<A>::type;

template <class A>
MOELORA_INLINE vec<A> splat(A v) {
  return v - vec<A>{};  // not 0 + v: that would turn -0 into +0
}

// Makes the compiler load v once.  GCC folds a load into each of its uses, and three loads of a
// weight instead of one make the load ports the bottleneck of a dot tile.
template <class V>
MOELORA_INLINE V in_register(V v) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(v));
#elif defined(__AVX2__)
  __asm__("" : "+x"(v));
#endif
  return v;
}

// ---- loads and stores of kLanes<A> elements of T, widened to or rounded from the accumulator type

MOELORA_INLINE vec<float> load(const float* p) {
  vec<float> v;
  memcpy(&v, p, sizeof v);
  return v;
}
MOELORA_INLINE vec<double> load(const double* p) {
  vec<double> v;
  memcpy(&v, p, sizeof v);
  return v;
}
MOELORA_INLINE void store(float* p, vec<float> v) { memcpy(p, &v, sizeof v); }
MOELORA_INLINE void store(double* p, vec<double> v) { memcpy(p, &v, sizeof v); }

typedef uint16_t half_words __attribute__((vector_size(kRegisterBytes / 2)));
typedef uint32_t words __attribute__((vector_size(kRegisterBytes)));

MOELORA_INLINE vec<float> load(const BFloat16* p) {
  half_words h;
  memcpy(&h, p, sizeof h);
  return (vec<float>)(__builtin_convertvector(h, words) << 16);
}
MOELORA_INLINE void store(BFloat16* p, vec<float> v) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  memcpy(p, &h, sizeof h);
#else
  const words u = (words)v;
  const words rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
  const words is_nan = (words)((u & 0x7FFFFFFF) > 0x7F800000);
  const half_words h =
      __builtin_convertvector((is_nan & ((u >> 16) | 0x40)) | (~is_nan & rounded), half_words);
  memcpy(p, &h, sizeof h);
#endif
}

MOELORA_INLINE vec<float> load(const Float16* p) {
#if defined(__AVX512F__)
  return (vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vec<float> v;
  for (int l = 0; l < kLanes<float>; ++l) v[l] = to_acc(p[l]);
  return v;
#endif
}
MOELORA_INLINE void store(Float16* p, vec<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int l = 0; l < kLanes<float>; ++l) p[l] = from_acc<Float16>(v[l]);
#endif
}

// The first n < kLanes elements, the rest zero.
template <class T>
MOELORA_INLINE vec<acc_t<T>> load_partial(const T* p, int64_t n) {
  T padded[kLanes<acc_t<T>>] = {};
  memcpy(padded, p, n * sizeof(T));
  return load(padded);
}

// ---- sums across lanes

#if defined(__clang__) || __GNUC__ >= 12
#define MOELORA_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#error "moelora_ops needs GCC 12 or newer, or Clang"
#endif

// Lane sums of neighbours: the first half of the result comes from a, the second from b.
MOELORA_INLINE vec<float> add_pairs(vec<float> a, vec<float> b) {
#if defined(__AVX512F__)
  return MOELORA_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         MOELORA_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif defined(__AVX2__)
  return MOELORA_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14) +
         MOELORA_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
  return MOELORA_SHUFFLE(a, b, 0, 2, 4, 6) + MOELORA_SHUFFLE(a, b, 1, 3, 5, 7);
#endif
}
MOELORA_INLINE vec<double> add_pairs(vec<double> a, vec<double> b) {
#if defined(__AVX512F__)
  return MOELORA_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14) +
         MOELORA_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#elif defined(__AVX2__)
  return MOELORA_SHUFFLE(a, b, 0, 2, 4, 6) + MOELORA_SHUFFLE(a, b, 1, 3, 5, 7);
#else
  return MOELORA_SHUFFLE(a, b, 0, 2) + MOELORA_SHUFFLE(a, b, 1, 3);
#endif
}

// out[i] = sum of the lanes of v[i].  Each sum is the same tree over its own lanes whatever n is,
// so that a token's bits do not depend on the tile it was computed in.
template <int n, class A>
MOELORA_INLINE void lane_sums(const vec<A>* v, A* out) {
  if constexpr (n > kLanes<A>) {
    lane_sums<kLanes<A>, A>(v, out);
    lane_sums<n - kLanes<A>, A>(v + kLanes<A>, out + kLanes<A>);
  } else {
    constexpr int kPadded = n > 8 ? 16 : n > 4 ? 8 : n > 2 ? 4 : n;
    vec<A> t[kPadded];
    MOELORA_UNROLL
    for (int i = 0; i < kPadded; ++i)
      t[i] = i < n ? v[i] : vec<A>{};
    MOELORA_UNROLL
    for (int m = kPadded; m > 1; m /= 2) {
      MOELORA_UNROLL
      for (int i = 0; i < m / 2; ++i)
        t[i] = add_pairs(t[2 * i], t[2 * i + 1]);
    }
    MOELORA_UNROLL
    for (int width = kLanes<A> / kPadded; width > 1; width /= 2)
      t[0] = add_pairs(t[0], t[0]);
    MOELORA_UNROLL
    for (int i = 0; i < n; ++i)
      out[i] = t[0][i];
  }
}

// ---- operands of a dot product along K: how T is loaded and multiplied at this level

template <class T>
struct Dot {
  using A = acc_t<T>;
  using operand = vec<A>;
  static constexpr int kStep = kLanes<A>;
  static MOELORA_INLINE operand load_step(const T* p) { return load(p); }
  static MOELORA_INLINE operand load_tail(const T* p, int64_t n) { return load_partial(p, n); }
  static MOELORA_INLINE vec<A> multiply_add(vec<A> c, operand a, operand b) { return c + a * b; }
};

#if defined(__AVX512BF16__)
template <>
struct Dot<BFloat16> {
  using A = float;
  using operand = __m512bh;
  static constexpr int kStep = 32;
  static MOELORA_INLINE operand load_step(const BFloat16* p) {
    return (__m512bh)_mm512_loadu_si512(p);
  }
  static MOELORA_INLINE operand load_tail(const BFloat16* p, int64_t n) {
    return (__m512bh)_mm512_maskz_loadu_epi16((1u << n) - 1, p);
  }
  static MOELORA_INLINE vec<float> multiply_add(vec<float> c, operand a, operand b) {
    return (vec<float>)_mm512_dpbf16_ps((__m512)c, a, b);
  }
};
#endif

MOELORA_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

}  // namespace MOELORA_LEVEL
}  // namespace moelora
