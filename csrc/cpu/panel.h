// Panels: one column block of stacked rows, copied so that it is contiguous in L1, and the register
// tiles that multiply it.  Rows in place sit at a power-of-two pitch and all fall into the same L1
// sets: the copy makes expand 2.5 times faster and costs a few microseconds.
#pragma once

#include "cpu/vec.h"

namespace moelora {
namespace MOELORA_LEVEL {

// Entries whose terms are summed one after the other; a token of more adds up the sums of such
// runs, or a few thousand rows would err several times as much as experts that are added one by
// one.
constexpr int kRunEntries = 128;

// Rows widened to the accumulator type; one entry is one row.
template <class T>
struct WidePanel {
  using A = acc_t<T>;
  using word = A;     // how a coefficient is stored
  using element = A;  // what the panel is made of
  static constexpr int kRowsPerEntry = 1;
  static constexpr int kVectors = kRegisters == 32 ? 4 : 8;
  static constexpr int kColumns = kVectors * kLanes<A>;
  static constexpr int kEntry = kColumns;  // elements per entry
  // Tile of several tokens: 6 x 4 registers of 32, or 6 x 2 of 16.
  static constexpr int kTileTokens = 6;
  static constexpr int kTileVectors = kRegisters == 32 ? 4 : 2;

  // Copies `columns` <= kColumns columns of the entry's rows, zero beyond.
  static MOELORA_INLINE void fill(const T* const* rows, int64_t c, int64_t columns, A* out) {
    const T* row = rows[0];
    int64_t i = 0;
    if (row)
      for (; i + kLanes<A> <= columns; i += kLanes<A>) store(out + i, load(row + c + i));
    for (; i < kColumns; ++i) out[i] = row && i < columns ? to_acc(row[c + i]) : A(0);
  }
  // Coefficients h[0..n) of one expert's rows as words.
  static MOELORA_INLINE void pack(const A* h, int n, word* out) { memcpy(out, h, n * sizeof(A)); }

  // sums += the terms of one run, which begins at an entry.
  template <int kTokens, int kWidth>
  static MOELORA_INLINE void add_run(vec<A> (&sums)[kTokens][kWidth], int begin, int n,
                                     const int32_t* entry, const word* h, int64_t ldh,
                                     const A* panel) {
    const int end = n - begin < kRunEntries ? n : begin + kRunEntries;
    for (int p = begin; p < end; ++p) {
      const A* row = panel + static_cast<int64_t>(entry ? entry[p] : p) * kEntry;
      MOELORA_UNROLL
      for (int v = 0; v < kWidth; ++v) {
        const vec<A> r =
            kTokens > 1 ? in_register(load(row + v * kLanes<A>)) : load(row + v * kLanes<A>);
        MOELORA_UNROLL
        for (int i = 0; i < kTokens; ++i)
          sums[i][v] = sums[i][v] + in_register(splat(h[i * ldh + p])) * r;
      }
    }
  }

  template <int kTokens, int kWidth>
  static __attribute__((noinline)) void add_more_runs(vec<A> (&total)[kTokens][kWidth], int n,
                                                      const int32_t* entry, const word* h,
                                                      int64_t ldh, const A* panel) {
    for (int begin = kRunEntries; begin < n; begin += kRunEntries) {
      vec<A> part[kTokens][kWidth] = {};
      add_run(part, begin, n, entry, h, ldh, panel);
      MOELORA_UNROLL
      for (int i = 0; i < kTokens; ++i) MOELORA_UNROLL
        for (int v = 0; v < kWidth; ++v) total[i][v] = total[i][v] + part[i][v];
    }
  }

  // y[i, v] = init[i, v] + Σ_p h[i, p] panel[entry[p], v] for kTokens tokens and kVectors registers
  // of columns.
  //   init  what is added last: y itself to accumulate, a bias (ldi = 0), or null for nothing. Last
  //         and not first, as the many small terms lose less against each other than against it.
  //   entry which panel entries; null means 0..n in order
  template <int kTokens, int kWidth>
  static MOELORA_INLINE void tile(int n, const int32_t* entry, const word* h, int64_t ldh,
                                  const A* panel, const T* init, int64_t ldi, T* y, int64_t ldy) {
    vec<A> sums[kTokens][kWidth] = {};
    add_run(sums, 0, n, entry, h, ldh, panel);
    if (n > kRunEntries) {  // apart, so that the sums of few entries keep their registers
      vec<A> total[kTokens][kWidth];
      memcpy(total, sums, sizeof(total));
      add_more_runs(total, n, entry, h, ldh, panel);
      memcpy(sums, total, sizeof(total));
    }
    MOELORA_UNROLL
    for (int i = 0; i < kTokens; ++i) MOELORA_UNROLL
      for (int v = 0; v < kWidth; ++v) {
        if (init) sums[i][v] = sums[i][v] + load(init + i * ldi + v * kLanes<A>);
        store(y + i * ldy + v * kLanes<A>, sums[i][v]);
      }
  }
  // Offset of a register column group inside an entry.
  static constexpr int64_t group(int vector) { return vector * kLanes<A>; }

  // One token whose rows come in `segments` of n entries, each multiplied by a mask before it
  // joins:
  //   y = Σ_g mask[g] ⊙ Σ_p h[g, p] panel[entry[g, p]] + init
  static MOELORA_INLINE void masked_tile(int segments, int n, const int32_t* entry, const word* h,
                                         const A* panel, const A* mask, const T* init, T* y) {
    vec<A> sums[kVectors] = {};
    for (int g = 0; g < segments; ++g, entry += n, h += n, mask += kColumns)
      for (int begin = 0; begin < n; begin += kRunEntries) {
        const int end = n - begin < kRunEntries ? n : begin + kRunEntries;
        vec<A> part[kVectors] = {};
        for (int p = begin; p < end; ++p) {
          const A* row = panel + static_cast<int64_t>(entry[p]) * kEntry;
          MOELORA_UNROLL
          for (int v = 0; v < kVectors; ++v)
            part[v] = part[v] + splat(h[p]) * load(row + group(v));
        }
        MOELORA_UNROLL
        for (int v = 0; v < kVectors; ++v)
          sums[v] = sums[v] + part[v] * load(mask + group(v));
      }
    MOELORA_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      if (init) sums[v] = sums[v] + load(init + group(v));
      store(y + group(v), sums[v]);
    }
  }
};

template <class T>
struct PanelOf {
  using type = WidePanel<T>;
};

#if defined(__AVX512BF16__)
// What unpacking a bf16 register leaves: 32 columns come out as two registers in the order of
// unpacklo/hi, and this permutation puts the converted pair back in place.
MOELORA_INLINE __m512i natural_order() {
  alignas(64) static const uint16_t index[32] = {0,  1,  2,  3,  16, 17, 18, 19, 4,  5,  6,
                                                 7,  20, 21, 22, 23, 8,  9,  10, 11, 24, 25,
                                                 26, 27, 12, 13, 14, 15, 28, 29, 30, 31};
  return _mm512_load_si512(index);
}
MOELORA_INLINE void store_unpacked(BFloat16* p, __m512 low, __m512 high) {
  _mm512_storeu_si512(
      p, _mm512_permutexvar_epi16(natural_order(), (__m512i)_mm512_cvtne2ps_pbh(high, low)));
}
MOELORA_INLINE uint32_t pack_pair(float low, float high) {
  return from_acc<BFloat16>(low).bits |
         (static_cast<uint32_t>(from_acc<BFloat16>(high).bits) << 16);
}

// Two rows interleaved per entry, for vdpbf16ps; y is unpacked and packed in the same order, so
// nothing crosses 128-bit lanes in the loop.
struct PairPanel {
  using A = float;
  using word = uint32_t;
  using element = BFloat16;
  static constexpr int kRowsPerEntry = 2;
  static constexpr int kVectors = 4;  // pairs of registers: 32 columns each
  static constexpr int kColumns = 128;
  static constexpr int kEntry = 256;
  static constexpr int kTileTokens = 6;
  static constexpr int kTileVectors = 2;

  static MOELORA_INLINE void fill(const BFloat16* const* rows, int64_t c, int64_t columns,
                                  BFloat16* out) {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t left = columns - 32 * v;
      const __mmask32 mask = left >= 32 ? ~0u : left <= 0 ? 0u : (1u << left) - 1;
      const __m512i a = rows[0] ? _mm512_maskz_loadu_epi16(mask, rows[0] + c + 32 * v) : __m512i{};
      const __m512i b = rows[1] ? _mm512_maskz_loadu_epi16(mask, rows[1] + c + 32 * v) : __m512i{};
      _mm512_storeu_si512(out + 64 * v, _mm512_unpacklo_epi16(a, b));
      _mm512_storeu_si512(out + 64 * v + 32, _mm512_unpackhi_epi16(a, b));
    }
  }
  static MOELORA_INLINE void pack(const float* h, int n, word* out) {
    int i = 0;
    for (; i + 16 <= n; i += 16)
      _mm256_storeu_si256((__m256i*)(out + i / 2),
                          (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(h + i)));
    if (i < n) {
      const __m512 rest = _mm512_maskz_loadu_ps((1u << (n - i)) - 1, h + i);
      _mm256_mask_storeu_epi32(out + i / 2, (1u << ((n - i + 1) / 2)) - 1,
                               (__m256i)_mm512_cvtneps_pbh(rest));
    }
  }
  static constexpr int64_t group(int vector) { return 64 * vector; }

  template <int kTokens, int kWidth>
  static MOELORA_INLINE void tile(int n, const int32_t* entry, const word* h, int64_t ldh,
                                  const BFloat16* panel, const BFloat16* init, int64_t ldi,
                                  BFloat16* y, int64_t ldy) {
    __m512 low[kTokens][kWidth] = {}, high[kTokens][kWidth] = {};
    for (int p = 0; p < n; ++p) {
      const BFloat16* row = panel + static_cast<int64_t>(entry ? entry[p] : p) * kEntry;
      MOELORA_UNROLL
      for (int v = 0; v < kWidth; ++v) {
        __m512bh l = (__m512bh)_mm512_loadu_si512(row + 64 * v);
        __m512bh u = (__m512bh)_mm512_loadu_si512(row + 64 * v + 32);
        if (kTokens > 1) l = in_register(l), u = in_register(u);
        MOELORA_UNROLL
        for (int i = 0; i < kTokens; ++i) {
          const __m512bh c = in_register((__m512bh)_mm512_set1_epi32(h[i * ldh + p]));
          low[i][v] = _mm512_dpbf16_ps(low[i][v], c, l);
          high[i][v] = _mm512_dpbf16_ps(high[i][v], c, u);
        }
      }
    }
    MOELORA_UNROLL
    for (int i = 0; i < kTokens; ++i) MOELORA_UNROLL
      for (int v = 0; v < kWidth; ++v) {
        if (init) {
          const __m512i q = _mm512_loadu_si512(init + i * ldi + 32 * v);
          const __m512i zero = _mm512_setzero_si512();
          low[i][v] = low[i][v] + (__m512)_mm512_unpacklo_epi16(zero, q);
          high[i][v] = high[i][v] + (__m512)_mm512_unpackhi_epi16(zero, q);
        }
        store_unpacked(y + i * ldy + 32 * v, low[i][v], high[i][v]);
      }
  }
};

template <>
struct PanelOf<BFloat16> {
  using type = PairPanel;
};
#endif

}  // namespace MOELORA_LEVEL
}  // namespace moelora
