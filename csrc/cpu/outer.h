// Outer: out[i, c] = Σ_q coefficient[q][i] v[q][c] over gathered token rows.  Registers hold a tile
// of output rows by columns over a block of tokens; blocks are summed in order, so the bits depend
// on the tokens only and not on the threads, which split the columns.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/scratch.h"
#include "cpu/vec.h"

namespace moelora {
namespace MOELORA_LEVEL {

// Two registers of columns by up to nine output rows (an expert of rank 8 and its router row) or
// six.
constexpr int kOuterRows = kRegisters == 32 ? 9 : 6;

// How token rows and their coefficients enter the tile.
template <class T>
struct OuterTile {
  using A = acc_t<T>;
  using word = A;
  static constexpr int kTokensPerStep = 1;
  static constexpr int kColumns = 2 * kLanes<A>;

  static MOELORA_INLINE void pack(const A* const* coefficient, int64_t n, int first, int rows,
                                  word* out) {
    for (int64_t q = 0; q < n; ++q, out += rows)
      memcpy(out, coefficient[q] + first, rows * sizeof(A));
  }
  template <int kRows>
  static MOELORA_INLINE void run(int64_t steps, const T* const* v, const word* h, int64_t c, A* out,
                                 int64_t ldo) {
    vec<A> low[kRows] = {}, high[kRows] = {};
    for (int64_t q = 0; q < steps; ++q, h += kRows) {
      const T* row = v[q] + c;
      const vec<A> l = load(row), u = load(row + kLanes<A>);
      // Rows are a page apart, which no hardware prefetcher follows: fetch their next tile.
      for (size_t b = 0; b < kColumns * sizeof(T); b += 64)
        prefetch(reinterpret_cast<const char*>(row + kColumns) + b);
      MOELORA_UNROLL
      for (int i = 0; i < kRows; ++i) {
        low[i] = low[i] + splat(h[i]) * l;
        high[i] = high[i] + splat(h[i]) * u;
      }
    }
    MOELORA_UNROLL
    for (int i = 0; i < kRows; ++i) {
      store(out + i * ldo, load(out + i * ldo) + low[i]);
      store(out + i * ldo + kLanes<A>, load(out + i * ldo + kLanes<A>) + high[i]);
    }
  }
};

#if defined(__AVX512BF16__)
// Pairs of tokens, interleaved on the fly for vdpbf16ps.
template <>
struct OuterTile<BFloat16> {
  using A = float;
  using word = uint32_t;
  static constexpr int kTokensPerStep = 2;
  static constexpr int kColumns = 32;

  static MOELORA_INLINE void pack(const float* const* coefficient, int64_t n, int first, int rows,
                                  word* out) {
    const __mmask16 mask = (1u << rows) - 1;
    for (int64_t q = 0; q < n; q += 2, out += rows) {
      const __m512 a = _mm512_maskz_loadu_ps(mask, coefficient[q] + first);
      const __m512 b =
          q + 1 < n ? _mm512_maskz_loadu_ps(mask, coefficient[q + 1] + first) : __m512{};
      const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(a));
      const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(b));
      _mm512_mask_storeu_epi32(out, mask, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
  template <int kRows>
  static MOELORA_INLINE void run(int64_t steps, const BFloat16* const* v, const word* h, int64_t c,
                                 float* out, int64_t ldo) {
    __m512 low[kRows] = {}, high[kRows] = {};
    for (int64_t q = 0; q < steps; ++q, h += kRows) {
      const BFloat16 *first = v[2 * q] + c, *second = v[2 * q + 1] + c;
      const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
      const __m512bh l = (__m512bh)_mm512_unpacklo_epi16(a, b);
      const __m512bh u = (__m512bh)_mm512_unpackhi_epi16(a, b);
      prefetch(first + kColumns);
      prefetch(second + kColumns);
      MOELORA_UNROLL
      for (int i = 0; i < kRows; ++i) {
        const __m512bh w = (__m512bh)_mm512_set1_epi32(h[i]);
        low[i] = _mm512_dpbf16_ps(low[i], w, l);
        high[i] = _mm512_dpbf16_ps(high[i], w, u);
      }
    }
    // Column 8 L + j came out of unpacking as lane 4 L + j of low (j < 4) or 4 L + j - 4 of high.
    const __m512i to_low =
        _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i to_high =
        _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    MOELORA_UNROLL
    for (int i = 0; i < kRows; ++i) {
      float* o = out + i * ldo;
      const __m512 first = _mm512_permutex2var_ps(low[i], to_low, high[i]);
      const __m512 second = _mm512_permutex2var_ps(low[i], to_high, high[i]);
      _mm512_storeu_ps(o, _mm512_add_ps(_mm512_loadu_ps(o), first));
      _mm512_storeu_ps(o + 16, _mm512_add_ps(_mm512_loadu_ps(o + 16), second));
    }
  }
};
#endif

template <class T, int kRows = kOuterRows>
MOELORA_INLINE void outer_tile(int rows, int64_t steps, const T* const* v,
                               const typename OuterTile<T>::word* h, int64_t c, acc_t<T>* out,
                               int64_t ldo) {
  if (rows == kRows)
    OuterTile<T>::template run<kRows>(steps, v, h, c, out, ldo);
  else if constexpr (kRows > 1)
    outer_tile<T, kRows - 1>(rows, steps, v, h, c, out, ldo);
}

// out[i, c - c0] += Σ_q coefficient[q][i] v[q][c], i < rows, c in [c0, c1), for one block of n
// gathered rows.
//   v           pointers to n rows; room for one more
//   coefficient pointers to n arrays of `rows` values
//   out         [rows, c1 - c0], ldo elements between rows
template <class T>
void outer(int64_t n, const T** v, const acc_t<T>* const* coefficient, int rows, int64_t c0,
           int64_t c1, acc_t<T>* out, int64_t ldo) {
  using O = OuterTile<T>;
  using A = acc_t<T>;
  static thread_local Scratch<typename O::word> word_scratch;
  static thread_local Scratch<T> tail_scratch;
  static thread_local Scratch<const T*> tail_rows;
  const int64_t steps = (n + O::kTokensPerStep - 1) / O::kTokensPerStep;
  if (O::kTokensPerStep == 2 && n % 2) v[n] = v[n - 1];  // its coefficient is zero

  const int64_t whole = c0 + (c1 - c0) / O::kColumns * O::kColumns;
  const int64_t left = c1 - whole;
  const T** padded = nullptr;
  if (left) {  // a narrow last tile reads padded copies
    T* copy = tail_scratch.take(2 * steps * O::kColumns);
    padded = tail_rows.take(2 * steps);
    for (int64_t q = 0; q < steps * O::kTokensPerStep; ++q) {
      padded[q] = copy + q * O::kColumns;
      memset(static_cast<void*>(copy + q * O::kColumns), 0, O::kColumns * sizeof(T));
      memcpy(copy + q * O::kColumns, v[q] + whole, left * sizeof(T));
    }
  }

  for (int first = 0; first < rows;) {
    const int remaining = rows - first;
    const int count = remaining <= kOuterRows ? remaining : kOuterRows - kOuterRows % 2;
    auto* h = word_scratch.take(steps * count);
    O::pack(coefficient, n, first, count, h);
    A* o = out + first * ldo;
    // Short sums added to long ones err less; beside the rounding of a 16-bit result it does not
    // show.
    constexpr int64_t kSteps = (sizeof(T) < 4 ? 256 : 64) / O::kTokensPerStep;
    for (int64_t c = c0; c < whole; c += O::kColumns)
      for (int64_t q = 0; q < steps; q += kSteps)
        outer_tile<T>(count, std::min(kSteps, steps - q), v + q * O::kTokensPerStep, h + q * count,
                      c, o + (c - c0), ldo);
    if (left) {
      alignas(64) A tail[kOuterRows * O::kColumns] = {};
      for (int64_t q = 0; q < steps; q += kSteps)
        outer_tile<T>(count, std::min(kSteps, steps - q), padded + q * O::kTokensPerStep,
                      h + q * count, 0, tail, O::kColumns);
      for (int i = 0; i < count; ++i)
        for (int64_t j = 0; j < left; ++j) o[i * ldo + whole - c0 + j] += tail[i * O::kColumns + j];
    }
    first += count;
  }
}

// Token rows per block of the outer products: as long as the gathered rows' columns stay in L2.
inline int64_t outer_block(int rows) { return rows <= 2 ? 128 : 256; }

// Weight gradients, columns [c0, c1) of `rows` rows: fill(a, b, sums, lds) adds to the zeroed
// accumulators sums [rows, b - a], which are then rounded to the rows at `destination`.
template <class T, class Fill>
void accumulate_rows(int64_t rows, int64_t c0, int64_t c1, const Fill& fill,
                     T* const* destination) {
  using A = acc_t<T>;
  // A chunk of columns keeps the sums and a block of token rows in L2.
  constexpr int64_t kSums = 1 << 17, kLeast = 128, kMost = 1024;
  const int64_t chunk =
      std::max(kLeast, std::min(kMost, kSums / std::max<int64_t>(rows, 1) / kLeast * kLeast));
  static thread_local Scratch<A> scratch;
  for (int64_t a = c0; a < c1; a += chunk) {
    const int64_t b = std::min(c1, a + chunk), width = b - a;
    A* sums = scratch.take(rows * width);
    std::fill(sums, sums + rows * width, A(0));
    fill(a, b, sums, width);
    for (int64_t i = 0; i < rows; ++i) {
      T* to = destination[i] + a;
      const A* from = sums + i * width;
      int64_t c = 0;
      for (; c + kLanes<A> <= width; c += kLanes<A>) store(to + c, load(from + c));
      for (; c < width; ++c) to[c] = from_acc<T>(from[c]);
    }
  }
}

}  // namespace MOELORA_LEVEL
}  // namespace moelora
