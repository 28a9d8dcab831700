// Shrink: out[t, j] = <x_t, w_j> for a few skinny rows w.  Dot form: both operands are contiguous
// along K, one register accumulates each (token, row) pair over the whole of K, lanes are summed
// once at the end.  Nothing is packed.  Every pair is summed in an order that depends on K only.
#pragma once

#include "cpu/vec.h"

namespace moelora {
namespace MOELORA_LEVEL {

template <class T, int kTokens, int kRows>
MOELORA_INLINE void dot_tile(const T* const* x, const T* w, int64_t ldw, int64_t K, acc_t<T>* out,
                             int64_t ldo) {
  using A = acc_t<T>;
  using D = Dot<T>;
  vec<A> sums[kTokens][kRows] = {};
  const T* rows[kTokens];
  MOELORA_UNROLL
  for (int i = 0; i < kTokens; ++i)
    rows[i] = x[i];
  // Two bases keep the eight row addresses within what an addressing mode can scale.
  const T* upper = w + 4 * ldw;
  auto row = [&](int j) { return j < 4 ? w + j * ldw : upper + (j - 4) * ldw; };

  int64_t c = 0;
  for (; c + D::kStep <= K; c += D::kStep) {
    typename D::operand xs[kTokens];
    MOELORA_UNROLL
    for (int i = 0; i < kTokens; ++i)
      xs[i] = D::load_step(rows[i] + c);
    MOELORA_UNROLL
    for (int j = 0; j < kRows; ++j) {
      const auto ws = in_register(D::load_step(row(j) + c));
      MOELORA_UNROLL
      for (int i = 0; i < kTokens; ++i)
        sums[i][j] = D::multiply_add(sums[i][j], xs[i], ws);
    }
  }
  if (c < K) {
    typename D::operand xs[kTokens];
    MOELORA_UNROLL
    for (int i = 0; i < kTokens; ++i)
      xs[i] = D::load_tail(rows[i] + c, K - c);
    MOELORA_UNROLL
    for (int j = 0; j < kRows; ++j) {
      const auto ws = D::load_tail(row(j) + c, K - c);
      MOELORA_UNROLL
      for (int i = 0; i < kTokens; ++i)
        sums[i][j] = D::multiply_add(sums[i][j], xs[i], ws);
    }
  }
  MOELORA_UNROLL
  for (int i = 0; i < kTokens; ++i)
    lane_sums<kRows, A>(sums[i], out + i * ldo);
}

// Tokens per tile: three tokens of eight rows fill 24 of 32 registers, three of four 12 of 16.
constexpr int kDotTokens = 3;
constexpr int kDotRows = kRegisters == 32 ? 8 : 4;

template <class T, int kRows>
MOELORA_INLINE void dot_tokens(int n, const T* const* x, const T* w, int64_t ldw, int64_t K,
                               acc_t<T>* out, int64_t ldo) {
  if (n == 3) dot_tile<T, 3, kRows>(x, w, ldw, K, out, ldo);
  if (n == 2) dot_tile<T, 2, kRows>(x, w, ldw, K, out, ldo);
  if (n == 1) dot_tile<T, 1, kRows>(x, w, ldw, K, out, ldo);
}

// out[i, j] = <x[i], w row j>, i < n, j < rows.
//   x   pointers to n rows of K elements
//   w   [rows, K], ldw elements between rows
//   out [n, rows], ldo elements between rows
template <class T>
void shrink(int64_t n, const T* const* x, const T* w, int64_t ldw, int64_t rows, int64_t K,
            acc_t<T>* out, int64_t ldo) {
  if (rows == 1) {  // rank-1 experts: the roles swap, eight tokens share one row
    for (; n >= 8; n -= 8, x += 8, out += 8 * ldo) dot_tile<T, 8, 1>(x, w, 0, K, out, ldo);
    for (; n >= 2; n -= 2, x += 2, out += 2 * ldo) dot_tile<T, 2, 1>(x, w, 0, K, out, ldo);
    if (n) dot_tile<T, 1, 1>(x, w, 0, K, out, ldo);
    return;
  }
  // A tile's token rows stay in L1 while the weight rows walk by.
  for (; n > 0; n -= kDotTokens, x += kDotTokens, out += kDotTokens * ldo) {
    const int tokens = static_cast<int>(n < kDotTokens ? n : kDotTokens);
    int64_t j = 0;
    for (; j + kDotRows <= rows; j += kDotRows)
      dot_tokens<T, kDotRows>(tokens, x, w + j * ldw, ldw, K, out + j, ldo);
    for (; j + 4 <= rows; j += 4) dot_tokens<T, 4>(tokens, x, w + j * ldw, ldw, K, out + j, ldo);
    for (; j + 2 <= rows; j += 2) dot_tokens<T, 2>(tokens, x, w + j * ldw, ldw, K, out + j, ldo);
    if (j < rows) dot_tokens<T, 1>(tokens, x, w + j * ldw, ldw, K, out + j, ldo);
  }
}

}  // namespace MOELORA_LEVEL
}  // namespace moelora
