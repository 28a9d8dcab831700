// The frozen linear itself.  For a handful of tokens in dot form, at the speed of reading the
// weight once; beyond, through packed panels, at the speed of the multiply-adds:
//
//   sums[j, l] = Σ_k panel[k, l] row_j[k]     l a lane: a token of the forward, a column of the
//                                             backward product
//
// A panel holds up to kPanelVectors registers of lanes per step and stays in L2.  Rows are read
// where they lie, one broadcast word per step: rows of the weight forward, of dy backward.  What is
// packed is so the smaller side: a block of tokens, or a strip of columns.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/panel.h"
#include "cpu/scratch.h"
#include "cpu/shrink.h"

namespace moelora {
namespace MOELORA_LEVEL {

// Steps whose products are summed in registers.  Each such sum starts from zero, and the sums are
// added up: one accumulator over thousands of products would err more than the library's.
constexpr int64_t kSumSteps = 256;

// ---------------------------------------------------------------- words: what one step multiplies

// One element of T, widened.
template <class T>
struct Word {
  using A = acc_t<T>;
  using word = A;        // how the panel stores it
  using lanes = vec<A>;  // a register of them
  static constexpr int kElements = 1;
  static constexpr int64_t kLinearSteps = kSumSteps;
  static MOELORA_INLINE lanes broadcast(const T* row, int64_t k) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<T, Float16>)
      return (lanes)_mm512_cvtph_ps(_mm256_set1_epi16(static_cast<short>(row[k].bits)));
#elif defined(__F16C__)
    if constexpr (std::is_same_v<T, Float16>)
      return (lanes)_mm256_cvtph_ps(_mm_set1_epi16(static_cast<short>(row[k].bits)));
#endif
    return splat(to_acc(row[k]));
  }
  static MOELORA_INLINE lanes broadcast_last(const T* row, int64_t k) { return broadcast(row, k); }
  static MOELORA_INLINE vec<A> multiply_add(vec<A> c, lanes a, lanes b) { return c + a * b; }
  // Backward panels: registers of columns [c, c + kLanes) of row k.
  static constexpr int kGroup = 1;  // registers that one load fills
  static MOELORA_INLINE void load_columns(const T* row, const T*, int64_t columns, word* out) {
    store(out, columns >= kLanes<A> ? load(row) : load_partial(row, std::max<int64_t>(columns, 0)));
  }
  static MOELORA_INLINE void store_columns(T* y, const A* sums) { store(y, load(sums)); }
};

#if defined(__AVX512BF16__)
// Two elements side by side, for vdpbf16ps.
template <>
struct Word<BFloat16> {
  using A = float;
  using word = uint32_t;
  using lanes = __m512bh;
  static constexpr int kElements = 2;
  // Rounding y errs more than long sums; but what is summed at a time has to stay in L2.
  static constexpr int64_t kLinearSteps = 2048;
  static MOELORA_INLINE lanes broadcast(const BFloat16* row, int64_t k) {
    uint32_t pair;
    memcpy(&pair, row + 2 * k, sizeof pair);
    return (lanes)_mm512_set1_epi32(static_cast<int>(pair));
  }
  static MOELORA_INLINE lanes broadcast_last(const BFloat16* row, int64_t k) {
    return (lanes)_mm512_set1_epi32(row[2 * k].bits);
  }
  static MOELORA_INLINE vec<float> multiply_add(vec<float> c, lanes a, lanes b) {
    return (vec<float>)_mm512_dpbf16_ps((__m512)c, a, b);
  }
  // 32 columns of two rows fill two registers, in the order that unpacking leaves.
  static constexpr int kGroup = 2;
  static MOELORA_INLINE void load_columns(const BFloat16* row, const BFloat16* next,
                                          int64_t columns, word* out) {
    const __mmask32 mask = columns >= 32 ? ~0u : columns <= 0 ? 0u : (1u << columns) - 1;
    const __m512i a = _mm512_maskz_loadu_epi16(mask, row);
    const __m512i b = next ? _mm512_maskz_loadu_epi16(mask, next) : __m512i{};
    _mm512_storeu_si512(out, _mm512_unpacklo_epi16(a, b));
    _mm512_storeu_si512(out + 16, _mm512_unpackhi_epi16(a, b));
  }
  static MOELORA_INLINE void store_columns(BFloat16* y, const float* sums) {
    store_unpacked(y, (__m512)load(sums), (__m512)load(sums + 16));
  }
};
#endif

// Words that hold so many terms.
template <class T>
constexpr int64_t steps_of(int64_t terms) {
  return (terms + Word<T>::kElements - 1) / Word<T>::kElements;
}

template <class T>
MOELORA_INLINE typename Word<T>::lanes load_lanes(const typename Word<T>::word* p) {
  typename Word<T>::lanes v;
  memcpy(&v, p, sizeof v);
  return v;
}

// Up to so many tokens the dot form is faster than panels of tokens (K, N of 576 to 4096, Zen 4,
// two threads).
template <class T>
constexpr int64_t kSmallLinearTokens = Word<T>::kElements == 2 ? 8 : 12;

// ---------------------------------------------------------------- the product

// Registers of lanes beside each other, and rows that meet them: 4 x 6 of 32 registers, 2 x 6
// of 16.
constexpr int kPanelVectors = kRegisters == 32 ? 4 : 2;
template <int kVectors>
constexpr int kPanelRows = kVectors == kPanelVectors ? 6 : 8;
// Rows of sums that are finished at a time: whole tiles of either kind, and in L1.
constexpr int kChunkRows = 96;

// sums[j, v] (+)= Σ_{k0 <= k < k1} panel[k, v] rows[j][k], for kPanelRows rows.
//   next  the rows after these, on their way into L2 meanwhile
template <class T, int kVectors>
MOELORA_INLINE void panel_tile(const typename Word<T>::word* panel, const T* const* rows,
                               const T* const* next, int64_t k0, int64_t k1, bool odd,
                               bool accumulate, acc_t<T>* sums) {
  using A = acc_t<T>;
  using W = Word<T>;
  constexpr int kRows = kPanelRows<kVectors>, kLane = kLanes<A>;
  constexpr int64_t kLine = 64 / sizeof(typename W::word);
  vec<A> acc[kRows][kVectors] = {};
  const T* row[kRows];
  MOELORA_UNROLL
  for (int j = 0; j < kRows; ++j)
    row[j] = rows[j];
  const auto step = [&](int64_t k, const auto& broadcast) __attribute__((always_inline)) {
    typename W::lanes p[kVectors];
    MOELORA_UNROLL
    for (int v = 0; v < kVectors; ++v)
      p[v] = load_lanes<T>(panel + (k * kVectors + v) * kLane);
    MOELORA_UNROLL
    for (int j = 0; j < kRows; ++j) {
      const auto w = in_register(broadcast(row[j], k));
      MOELORA_UNROLL
      for (int v = 0; v < kVectors; ++v)
        acc[j][v] = W::multiply_add(acc[j][v], p[v], w);
    }
  };
  const auto whole = [](const T* r, int64_t k) __attribute__((always_inline)) {
    return W::broadcast(r, k);
  };
  const int64_t end = odd ? k1 - 1 : k1;
  int64_t k = k0;
  for (; k + kLine <= end; k += kLine) {
    for (int j = 0; j < kRows; ++j) __builtin_prefetch(next[j] + k * W::kElements, 0, 2);
    _Pragma("GCC unroll 2") for (int i = 0; i < kLine; ++i) step(k + i, whole);
  }
  for (; k < end; ++k) step(k, whole);
  if (odd)
    step(
        k, [](const T* r, int64_t last)
               __attribute__((always_inline)) { return W::broadcast_last(r, last); });
  MOELORA_UNROLL
  for (int j = 0; j < kRows; ++j) MOELORA_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      A* at = sums + (j * kVectors + v) * kLane;
      store(at, accumulate ? load(at) + acc[j][v] : acc[j][v]);
    }
}

// sums [kChunkRows, kVectors lanes] of rows [j0, j1), of which row(j) gives the address.
template <class T, int kVectors, class Row>
void panel_chunk(const typename Word<T>::word* panel, int64_t terms, int64_t sum_steps, int64_t j0,
                 int64_t j1, const Row& row, acc_t<T>* sums) {
  using W = Word<T>;
  constexpr int kRows = kPanelRows<kVectors>;
  const int64_t steps = steps_of<T>(terms);
  const bool odd = terms % W::kElements != 0;
  int64_t k = 0;
  do {  // without any terms too, for sums that are zero
    const int64_t end = std::min(steps, k + sum_steps);
    for (int64_t j = j0; j < j1; j += kRows) {
      // Beyond the last row it is computed again; nobody reads that.
      const T *rows[kRows], *next[kRows];
      for (int i = 0; i < kRows; ++i) {
        rows[i] = row(std::min(j + i, j1 - 1));
        next[i] = row(std::min(j + kRows + i, j1 - 1));
      }
      panel_tile<T, kVectors>(panel, rows, next, k, end, odd && end == steps, k > 0,
                              sums + (j - j0) * kVectors * kLanes<acc_t<T>>);
    }
    k = end;
  } while (k < steps);
}

// The same for any number of rows: done(sums, j0, j1) for each chunk.
template <class T, int kVectors, class Row, class Done>
MOELORA_INLINE void panel_rows(const typename Word<T>::word* panel, int64_t terms,
                               int64_t sum_steps, int64_t j0, int64_t j1, const Row& row,
                               const Done& done) {
  alignas(64) acc_t<T> sums[kChunkRows * kVectors * kLanes<acc_t<T>>];
  for (int64_t j = j0; j < j1; j += kChunkRows) {
    const int64_t end = std::min(j1, j + kChunkRows);
    panel_chunk<T, kVectors>(panel, terms, sum_steps, j, end, row, sums);
    done(sums, j, end);
  }
}

// ---------------------------------------------------------------- forward: a panel of tokens

#if defined(__AVX512F__)
// Transposes 16 registers of 16 words.
MOELORA_INLINE void transpose(__m512i* r) {
  __m512i t[16];
  MOELORA_UNROLL
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  MOELORA_UNROLL
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  MOELORA_UNROLL
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  MOELORA_UNROLL
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}
#endif

template <class T>
MOELORA_INLINE typename Word<T>::word word_of(const T* row, int64_t k, int64_t terms) {
  if constexpr (Word<T>::kElements == 2)
    return row[2 * k].bits |
           (2 * k + 1 < terms ? static_cast<uint32_t>(row[2 * k + 1].bits) << 16 : 0u);
  else
    return to_acc(row[k]);
}

template <class T>
typename Word<T>::word* take_panel(int64_t terms, int vectors) {
  static thread_local Scratch<typename Word<T>::word> panels;
  return panels.take(std::max<int64_t>(1, steps_of<T>(terms)) * vectors * kLanes<acc_t<T>>);
}

// panel[k, lane] = word k of row(lane), for lanes [0, n); zero beyond.
template <class T, int kVectors, class Row>
void pack_tokens(int64_t n, int64_t terms, const Row& row, typename Word<T>::word* panel) {
  using W = Word<T>;
  constexpr int kLane = kLanes<acc_t<T>>;
  const int64_t steps = steps_of<T>(terms);
  for (int v = 0; v < kVectors; ++v) {
    int64_t k = 0;
#if defined(__AVX512F__)
    if constexpr (kLane == 16)
      for (; (k + 16) * W::kElements <= terms; k += 16) {
        __m512i r[16];
        for (int i = 0; i < 16; ++i) {
          const int64_t lane = v * 16 + i;
          if (lane >= n)
            r[i] = _mm512_setzero_si512();
          else if constexpr (W::kElements == 2)
            r[i] = _mm512_loadu_si512(row(lane) + 2 * k);
          else
            r[i] = (__m512i)load(row(lane) + k);
        }
        transpose(r);
        for (int i = 0; i < 16; ++i)
          _mm512_storeu_si512(panel + ((k + i) * kVectors + v) * 16, r[i]);
      }
#endif
    for (; k < steps; ++k)
      for (int i = 0; i < kLane; ++i) {
        const int64_t lane = v * kLane + i;
        panel[(k * kVectors + v) * kLane + i] =
            lane < n ? word_of(row(lane), k, terms) : typename W::word(0);
      }
  }
}

// y[lane, j] = sums[j, lane] + bias[j], for rows [j0, j1) and lanes [0, n).  O: T or its
// accumulator.
template <class T, int kVectors, class O>
void store_tokens(const acc_t<T>* sums, int64_t n, int64_t j0, int64_t j1, const T* bias, O* y,
                  int64_t ldy) {
  using A = acc_t<T>;
  constexpr int kLane = kLanes<A>, kPitch = kVectors * kLane;
  int64_t j = j0;
#if defined(__AVX512F__)
  if constexpr (kLane == 16)
    for (; j + 16 <= j1; j += 16) {
      const vec<float> add = bias ? load(bias + j) : vec<float>{};
      for (int v = 0; v * 16 < n; ++v) {
        __m512i r[16];
        for (int i = 0; i < 16; ++i)
          r[i] = _mm512_loadu_si512(sums + (j - j0 + i) * kPitch + v * 16);
        transpose(r);
        for (int i = 0; i < 16 && v * 16 + i < n; ++i)
          store(y + (v * 16 + i) * ldy + j, (vec<float>)r[i] + add);
      }
    }
#endif
  for (; j < j1; ++j) {
    const A add = bias ? to_acc(bias[j]) : A(0);
    for (int64_t lane = 0; lane < n; ++lane)
      y[lane * ldy + j] = from_acc<O>(sums[(j - j0) * kPitch + lane] + add);
  }
}

template <class T, int kVectors>
void linear_block(const Linear& p, int64_t t0, int64_t t1, int64_t n0, int64_t n1) {
  const T *x = static_cast<const T*>(p.x) + t0 * p.ldx, *weight = static_cast<const T*>(p.weight);
  auto* panel = take_panel<T>(p.terms, kVectors);
  pack_tokens<T, kVectors>(t1 - t0, p.terms, [&](int64_t i) { return x + i * p.ldx; }, panel);
  panel_rows<T, kVectors>(
      panel, p.terms, Word<T>::kLinearSteps, n0, n1, [&](int64_t j) { return weight + j * p.ldw; },
      [&](const acc_t<T>* sums, int64_t j0, int64_t j1) {
        store_tokens<T, kVectors>(sums, t1 - t0, j0, j1, static_cast<const T*>(p.bias),
                                  static_cast<T*>(p.y) + t0 * p.ldy, p.ldy);
      });
}

// Calls f with an integral constant, the vectors that hold `lanes` lanes.
template <class A, class F>
MOELORA_INLINE void with_vectors(int64_t lanes, const F& f) {
  if (lanes <= kLanes<A>) return f(std::integral_constant<int, 1>());
  if (kPanelVectors == 2 || lanes <= 2 * kLanes<A>) return f(std::integral_constant<int, 2>());
  if constexpr (kPanelVectors == 4) {
    if (lanes <= 3 * kLanes<A>) return f(std::integral_constant<int, 3>());
    f(std::integral_constant<int, 4>());
  }
}

// y[t, n] = <x_t, weight_n> + bias_n for tokens [t0, t1) and outputs [n0, n1).
template <class T>
void linear(const Linear& p, int64_t t0, int64_t t1, int64_t n0, int64_t n1) {
  using A = acc_t<T>;
  constexpr int64_t kBlock = kPanelVectors * kLanes<A>;
  // Blocks of equal size: a last one of few tokens would fill few lanes.
  const int64_t blocks = (t1 - t0 + kBlock - 1) / kBlock;
  for (int64_t b = 0, t = t0; b < blocks; ++b) {
    const int64_t vectors = (t1 - t + kLanes<A> - 1) / kLanes<A>, left = blocks - b;
    const int64_t end = std::min(t1, t + (vectors + left - 1) / left * kLanes<A>);
    with_vectors<A>(end - t, [&](auto n) { linear_block<T, n()>(p, t, end, n0, n1); });
    t = end;
  }
}

// ---------------------------------------------------------------- backward: a panel of columns

template <class T, int kVectors>
void linear_backward_strip(const Linear& p, int64_t t0, int64_t t1, int64_t c0, int64_t c1) {
  using A = acc_t<T>;
  using W = Word<T>;
  using word = typename W::word;
  constexpr int kPitch = kVectors * kLanes<A>, kGroupColumns = W::kGroup * kLanes<A>;
  constexpr int64_t kAhead = 8;  // rows of the weight are pages apart, which no prefetcher follows
  const T *x = static_cast<const T*>(p.x), *weight = static_cast<const T*>(p.weight) + c0;
  T* y = static_cast<T*>(p.y) + c0;
  const int64_t steps = steps_of<T>(p.terms), columns = c1 - c0;
  word* panel = take_panel<T>(p.terms, kVectors);
  for (int64_t k = 0; k < steps; ++k) {
    const T* row = weight + k * W::kElements * p.ldw;
    const T* next = k * W::kElements + 1 < p.terms ? row + p.ldw : nullptr;
    if ((k + kAhead) * W::kElements + 1 < p.terms)
      for (int e = 0; e < W::kElements; ++e)
        for (int64_t c = 0; c < columns; c += 64 / sizeof(T))
          prefetch(row + (kAhead * W::kElements + e) * p.ldw + c);
    for (int v = 0; v < kVectors; v += W::kGroup)
      W::load_columns(row + v * kLanes<A>, next ? next + v * kLanes<A> : nullptr,
                      columns - v * kLanes<A>, panel + k * kPitch + v * kLanes<A>);
  }
  panel_rows<T, kVectors>(
      panel, p.terms, W::kLinearSteps, t0, t1, [&](int64_t t) { return x + t * p.ldx; },
      [&](const A* sums, int64_t first, int64_t last) {
        for (int64_t t = first; t < last; ++t)
          for (int v = 0; v < kVectors && v * kLanes<A> < columns; v += W::kGroup) {
            const A* from = sums + (t - first) * kPitch + v * kLanes<A>;
            T* to = y + t * p.ldy + v * kLanes<A>;
            const int64_t left = columns - v * kLanes<A>;
            if (left >= kGroupColumns) {
              W::store_columns(to, from);
            } else {
              T padded[kGroupColumns];
              W::store_columns(padded, from);
              memcpy(to, padded, left * sizeof(T));
            }
          }
      });
}

// y[t, c] = Σ_n x[t, n] weight[n, c] for tokens [t0, t1) and columns [c0, c1).
template <class T>
void linear_backward(const Linear& p, int64_t t0, int64_t t1, int64_t c0, int64_t c1) {
  constexpr int64_t kStrip = kPanelVectors * kLanes<acc_t<T>>;
  for (int64_t c = c0; c < c1; c += kStrip) {
    const int64_t end = std::min(c1, c + kStrip);
    if (2 * (end - c) <= kStrip && kPanelVectors > 2)
      linear_backward_strip<T, 2>(p, t0, t1, c, end);
    else
      linear_backward_strip<T, kPanelVectors>(p, t0, t1, c, end);
  }
}

// ---------------------------------------------------------------- shrinks by many rows

// Whether a shrink by so many rows goes through panels.  Its sums have another order than those in
// dot form, so T may not decide.  Up to 64 rows, and in float32, the dot form is as fast: measured
// with 2048 to 4096 terms.
template <class T>
constexpr bool shrinks_in_panels(int64_t rows) {
  return Word<T>::kElements == 2 && rows > 64;
}

// out[i, j] = <x[i], row j> for tokens [0, n), n <= kTokenBlock, and rows [r0, r1).  Lanes are
// tokens, or rows if there are few tokens: a sum has the same order either way.
template <class T>
void shrink_in_panels(int64_t n, const T* const* x, const T* const* rows, int64_t r0, int64_t r1,
                      int64_t terms, acc_t<T>* out, int64_t ldo) {
  using A = acc_t<T>;
  static_assert(kRegisters != 32 || sizeof(A) != 4 || kTokenBlock == kPanelVectors * kLanes<A>);
  const auto token = [&](int64_t i) { return x[i]; };
  if (n > kSmallLinearTokens<T>) {
    with_vectors<A>(n, [&](auto vectors) {
      constexpr int kVectors = vectors();
      auto* panel = take_panel<T>(terms, kVectors);
      pack_tokens<T, kVectors>(n, terms, token, panel);
      panel_rows<T, kVectors>(
          panel, terms, kSumSteps, r0, r1, [&](int64_t j) { return rows[j]; },
          [&](const A* sums, int64_t j0, int64_t j1) {
            store_tokens<T, kVectors, A>(sums, n, j0, j1, nullptr, out, ldo);
          });
    });
    return;
  }
  constexpr int kPitch = kPanelVectors * kLanes<A>;
  auto* panel = take_panel<T>(terms, kPanelVectors);
  for (int64_t r = r0; r < r1; r += kPitch) {
    const int64_t lanes = std::min<int64_t>(kPitch, r1 - r);
    pack_tokens<T, kPanelVectors>(lanes, terms, [&](int64_t i) { return rows[r + i]; }, panel);
    panel_rows<T, kPanelVectors>(
        panel, terms, kSumSteps, 0, n, token, [&](const A* sums, int64_t t0, int64_t t1) {
          for (int64_t t = t0; t < t1; ++t)
            memcpy(out + t * ldo + r, sums + (t - t0) * kPitch, lanes * sizeof(A));
        });
  }
}

// ---------------------------------------------------------------- a handful of tokens

// y[t, n] = <x_t, weight_n> + bias_n for all tokens and outputs [n0, n1): nothing packed, the
// weight is read once.
template <class T>
void small_linear(const Linear& p, int64_t n0, int64_t n1) {
  using A = acc_t<T>;
  const T *x = static_cast<const T*>(p.x), *weight = static_cast<const T*>(p.weight);
  const T* bias = static_cast<const T*>(p.bias);
  T* y = static_cast<T*>(p.y);
  const int64_t K = p.terms;
  const T* rows[4];
  A sums[4 * 4];
  for (int64_t n = n0; n < n1; n += 4) {
    const int width = static_cast<int>(n1 - n < 4 ? n1 - n : 4);
    for (int64_t t = 0; t < p.T; t += 4) {
      const int count = static_cast<int>(p.T - t < 4 ? p.T - t : 4);
      for (int i = 0; i < count; ++i) rows[i] = x + (t + i) * p.ldx;
      if (width == 4 && count == 4) {
        dot_tile<T, 4, 4>(rows, weight + n * p.ldw, p.ldw, K, sums, 4);
      } else if (width == 4) {
        dot_tokens<T, 4>(count, rows, weight + n * p.ldw, p.ldw, K, sums, 4);
      } else {
        for (int j = 0; j < width; ++j)
          for (int i = 0; i < count; ++i)
            dot_tile<T, 1, 1>(rows + i, weight + (n + j) * p.ldw, 0, K, sums + 4 * i + j, 4);
      }
      for (int i = 0; i < count; ++i)
        for (int j = 0; j < width; ++j)
          y[(t + i) * p.ldy + n + j] =
              from_acc<T>(sums[4 * i + j] + (bias ? to_acc(bias[n + j]) : A(0)));
    }
  }
}

}  // namespace MOELORA_LEVEL
}  // namespace moelora
