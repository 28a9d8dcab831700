// Expand: y[t] (+)= Σ_j h[t, j] row_j, vectors along the output columns, one panel of stacked rows
// per column block.  Sparse: each token names its entries.  Dense: all entries, several tokens per
// tile.  Either way a token sums its entries in an order of its own, so its bits do not depend on
// the tile.
#pragma once

#include <algorithm>

#include "cpu/dropout.h"
#include "cpu/panel.h"
#include "cpu/scratch.h"

namespace moelora {
namespace MOELORA_LEVEL {

// Which rows make the panel: kRowsPerEntry pointers per entry, null for padding.
template <class T>
struct RowTable {
  const T* const* rows;
  int64_t entries;
};

// Where a token's sums start and where they go.
template <class T>
struct Output {
  T* y;  // [T, columns]
  int64_t ldy;
  const T* bias;    // [columns] or null; only without accumulate
  bool accumulate;  // start from y instead

  const T* start(int64_t t, int64_t c) const {
    return accumulate ? y + t * ldy + c : bias ? bias + c : nullptr;
  }
  int64_t start_stride() const { return accumulate ? ldy : 0; }
  // Rows are pages apart, which no hardware prefetcher follows.
  void fetch(int64_t t, int64_t c, int64_t columns) const {
    const char* row = reinterpret_cast<const char*>(y + t * ldy + c);
    for (size_t b = 0; b < columns * sizeof(T); b += 64) prefetch(row + b);
  }
};

template <class P, class T>
typename P::element* fill_panel(const RowTable<T>& table, int64_t c, int64_t columns) {
  static thread_local Scratch<typename P::element> scratch;
  auto* panel = scratch.take(table.entries * P::kEntry);
  for (int64_t i = 0; i < table.entries; ++i)
    P::fill(table.rows + i * P::kRowsPerEntry, c, columns, panel + i * P::kEntry);
  return panel;
}

// Runs `tile(start, ldi, y, ldy)` on a whole column block; a narrower last block goes through a
// padded copy.
template <class P, class T, class Tile>
MOELORA_INLINE void on_whole_block(const Output<T>& out, int64_t t, int tokens, int64_t c,
                                   int64_t columns, const Tile& tile) {
  const T* start = out.start(t, c);
  T* y = out.y + t * out.ldy + c;
  if (columns == P::kColumns) {
    tile(start, out.start_stride(), y, out.ldy);
    return;
  }
  alignas(64) T padded[P::kTileTokens * P::kColumns] = {};
  if (start)
    for (int i = 0; i < tokens; ++i)
      memcpy(padded + i * P::kColumns, start + i * out.start_stride(), columns * sizeof(T));
  tile(start ? padded : nullptr, P::kColumns, padded, P::kColumns);
  for (int i = 0; i < tokens; ++i)
    memcpy(y + i * out.ldy, padded + i * P::kColumns, columns * sizeof(T));
}

// Tokens [t0, t1) with `per_token` entries each, columns [c0, c1).
//   entry [t1 - t0, per_token] indices into the table
//   word  [t1 - t0, per_token] coefficients
template <class T>
void expand_sparse(const RowTable<T>& table, int64_t t0, int64_t t1, int64_t c0, int64_t c1,
                   int per_token, const int32_t* entry, const typename PanelOf<T>::type::word* word,
                   const Output<T>& out) {
  using P = typename PanelOf<T>::type;
  constexpr int kAhead = 12;  // tokens whose output is on its way while this one computes
  for (int64_t c = c0; c < c1; c += P::kColumns) {
    const int64_t columns = c1 - c < P::kColumns ? c1 - c : P::kColumns;
    const auto* panel = fill_panel<P>(table, c, columns);
    for (int64_t t = t0; t < t1; ++t) {
      if (t + kAhead < t1) out.fetch(t + kAhead, c, columns);
      const int64_t q = (t - t0) * per_token;
      on_whole_block<P>(out, t, 1, c, columns, [&](const T* start, int64_t ldi, T* y, int64_t ldy) {
        P::template tile<1, P::kVectors>(per_token, entry + q, word + q, 0, panel, start, ldi, y,
                                         ldy);
      });
    }
  }
}

// Every token uses every entry: word [t1 - t0, entries].
template <class T>
void expand_dense(const RowTable<T>& table, int64_t t0, int64_t t1, int64_t c0, int64_t c1,
                  const typename PanelOf<T>::type::word* word, const Output<T>& out) {
  using P = typename PanelOf<T>::type;
  constexpr int kTokens = P::kTileTokens, kWidth = P::kTileVectors;
  // Columns of a register group in y; PairPanel's groups hold two registers of 16.
  constexpr int kGroupColumns = P::kColumns / P::kVectors;
  const int n = static_cast<int>(table.entries);
  for (int64_t c = c0; c < c1; c += P::kColumns) {
    const int64_t columns = c1 - c < P::kColumns ? c1 - c : P::kColumns;
    const auto* panel = fill_panel<P>(table, c, columns);
    for (int64_t t = t0; t < t1;) {
      const int tokens = t1 - t >= kTokens ? kTokens : 1;
      const auto* h = word + (t - t0) * n;
      for (int64_t next = t + tokens; next < std::min(t1, t + 2 * tokens); ++next)
        out.fetch(next, c, columns);
      on_whole_block<P>(
          out, t, tokens, c, columns, [&](const T* start, int64_t ldi, T* y, int64_t ldy) {
            for (int v = 0; v < P::kVectors; v += kWidth) {
              const auto* part = panel + P::group(v);
              const T* from = start ? start + v * kGroupColumns : nullptr;
              T* to = y + v * kGroupColumns;
              if (tokens == kTokens)
                P::template tile<kTokens, kWidth>(n, nullptr, h, n, part, from, ldi, to, ldy);
              else
                P::template tile<1, kWidth>(n, nullptr, h, n, part, from, ldi, to, ldy);
            }
          });
      t += tokens;
    }
  }
}

// Sparse, each token's entries in `segments` equal parts, part g under the mask of expert
// mask_expert[t, g].
template <class T>
void expand_masked(const RowTable<T>& table, int64_t t0, int64_t t1, int64_t c0, int64_t c1,
                   int segments, int per_segment, const int32_t* entry, const acc_t<T>* word,
                   const Dropout& dropout, const int32_t* mask_expert, const Output<T>& out) {
  using P = WidePanel<T>;
  using A = acc_t<T>;
  static thread_local Scratch<A> scratch;
  A* mask = scratch.take(static_cast<int64_t>(segments) * P::kColumns);
  for (int64_t c = c0; c < c1; c += P::kColumns) {
    const int64_t columns = c1 - c < P::kColumns ? c1 - c : P::kColumns;
    const auto* panel = fill_panel<P>(table, c, columns);
    for (int64_t t = t0; t < t1; ++t) {
      for (int g = 0; g < segments; ++g)
        mask_factors<P::kColumns>(dropout, t, mask_expert[(t - t0) * segments + g], c,
                                  mask + g * P::kColumns);
      const int64_t q = (t - t0) * segments * per_segment;
      on_whole_block<P>(out, t, 1, c, columns, [&](const T* start, int64_t, T* y, int64_t) {
        P::masked_tile(segments, per_segment, entry + q, word + q, panel, mask, start, y);
      });
    }
  }
}

}  // namespace MOELORA_LEVEL
}  // namespace moelora
