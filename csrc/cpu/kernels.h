// The CPU kernels as the bindings see them: plain structs of pointers and a table of functions per
// element type and ISA level.  No tensor type appears on either side of it.
//
// Letters: T tokens, K in_features, N out_features, E experts, r rank, k top-k; rows = k (grouped)
// or E (stacked) is how many experts of a token have a hidden.  Strides count elements; last
// dimensions are contiguous.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "mix/cosines.h"
#include "mix/gated.h"
#include "mix/grid.h"
#include "mix/output_gate.h"
#include "mix/philox.h"
#include "mix/row_map.h"

namespace moelora {

// What both directions share.  void* is the element type, A its accumulator (float, or double for
// double).
struct Topk {
  int64_t T, K, N;
  int E, r, k;
  bool stacked, renormalize, dropout_per_expert;
  bool accumulate;         // start from what y or dx holds
  double scale;            // alpha / r
  const Dropout* dropout;  // null without dropout
  const void* x;           // [T, K], ldx
  int64_t ldx;
  const void* lora_down;  // [E, r, K]
  const void* lora_up;    // [E, r, N]
  const void* router;     // [E, K]
  void* hidden;           // A [T, rows * r]
  void* logits;           // A [T, E]
  int32_t* selected;      // [T, k]
  void* weights;          // A [T, k]

  int rows() const { return stacked ? E : k; }
};

// Tokens whose probabilities are summed into one row of prob_partials, whatever the number of
// threads.
constexpr int64_t kTokenUnit = 16;
// Tokens that share one pass over the weights in the token phase.
constexpr int64_t kTokenBlock = 64;

struct TopkForward : Topk {
  const void* bias;  // [N] or null
  void* y;           // [T, N], ldy
  int64_t ldy;
  void* prob_partials;  // A [ceil(T / kTokenUnit), E]
};

struct TopkBackward : Topk {
  const void* dy;  // [T, N], lddy
  int64_t lddy;
  const void* dprob_sums;  // A [E] or null
  void* dx;                // [T, K] or null if not wanted, lddx
  int64_t lddx;
  void* dlora_down;  // like the parameters, or all null if not wanted
  void* dlora_up;
  void* drouter;
  void* dhidden;  // A workspace [T, rows * (r + 1)]: dH, and in slot r the router's share if it is
                  // sparse
  void* hidden_out;  // A workspace [T, rows * r]: H' = scale w H
  void* dlogits;     // A workspace [T, E] if dense_router()

  // The router's gradient touches every expert, not only the selected ones.
  bool dense_router() const { return !renormalize || dprob_sums || dropout || stacked; }
};

// ---------------------------------------------------------------- dense mixes: every row of every
// expert meets every token, as three products and a mix between them.

// A matrix of skinny rows [count, columns]; ld elements between rows.
struct RowBlock {
  const void* rows;
  int64_t count, ld;
};
constexpr int kRowBlocks = 2;

// What the three products share: token rows v, or outputs y, against up to two blocks of rows,
// whose coefficients lie one block after the other in a row of `h`.
struct Dense {
  int64_t T, C;                 // tokens, columns
  RowBlock blocks[kRowBlocks];  // an absent one has count 0
  void* h;                      // A [T, rows()], ldh
  int64_t ldh;
  const Dropout* dropout;  // null; otherwise one mask per token and column (expert 0)

  int64_t rows() const { return blocks[0].count + blocks[1].count; }
};
struct DenseShrink : Dense {  // h[t, j] = <dropout(v_t), row_j>
  const void* v;              // [T, C], ldv
  int64_t ldv;
};
struct DenseExpand : Dense {  // y[t] (+)= dropout mask ⊙ Σ_j h[t, j] row_j; no 1 / (1 - p)
  void* y;                    // [T, C], ldy
  int64_t ldy;
  const void* bias;  // [C] or null; only without accumulate
  bool accumulate;   // start from what y holds
};
struct DenseOuter : Dense {  // row_j[c] = Σ_t h[t, j] dropout mask ⊙ v_t[c]; blocks are written
  const void* v;             // [T, C], ldv
  int64_t ldv;
};

// The mixes of T tokens in rank space.  A: accumulator type of the tensors.  hidden and, backward,
// dhidden are [T, hidden_columns()]; mixed and dmixed [T, mixed_columns()]; dmixed may be the same
// memory as mixed.
struct Gated {
  int E, r;
  Activation activation;
  double scale;
  const void* down_bias;  // A [E, r] or null; forward adds it to hidden in place
  bool up_bias;           // mixed has E more columns
  const void* weights;    // A [rows, E]
  RowMap row;
  void *hidden, *mixed;
  const void* dmixed;
  void* dhidden;
  double dhidden_scale;  // what dhidden is multiplied by besides: 1 / (1 - dropout)
  void* dweights;        // A [T, E] or null

  int hidden_columns() const { return E * r; }
  int mixed_columns() const { return E * (r + (up_bias ? 1 : 0)); }
};
struct Grid {
  GridShape shape;
  double token_scale, task_scale, output_scale;  // a, b, s
  const void* external;                          // A [rows, gates] or null
  RowMap row;
  void *hidden, *mixed;  // hidden: [r1 | gates]
  const void* dmixed;
  void* dhidden;
  void* dscales;    // A [T, 3]
  void* dexternal;  // A [T, gates] or null

  int hidden_columns() const { return shape.r1 + shape.gates(); }
  int mixed_columns() const { return shape.r2; }
};
struct Averaged {
  int pairs, r;  // pairs: splits times experts
  double scale;
  const void* weights;  // A [rows, pairs]
  RowMap row;
  void *hidden, *mixed;
  const void* dmixed;
  void* dhidden;
  void* dweights;  // A [T, pairs] or null

  int hidden_columns() const { return pairs * r; }
  int mixed_columns() const { return pairs * r; }
};
struct OutputGating {
  int E, r;
  Normalization normalization;
  double tau, width;  // width: N
  // A, see mix/output_gate.h
  const void *projection, *projection_t, *factors, *factors_t, *means, *scales;
  const uint8_t* mask;  // [E] or null
  bool mask_input;
  void *hidden, *mixed;
  void* gates;  // A [T, E]
  const void* dmixed;
  const void* dgates;  // A [T, E] or null
  void* dhidden;
  void* normalized;  // A [T, input_columns()]
  void* dlogits;     // A [T, E]
  void* dtau;        // A [T]

  int hidden_columns() const { return E * r; }
  int mixed_columns() const { return E * r; }
  int input_columns() const { return E * r + (normalization == Normalization::kLayerNorm ? 1 : 0); }
};

// The frozen linear: y_t = weight x_t + bias over K terms, or backward y_t = weightᵀ x_t over N
// terms.
struct Linear {
  int64_t T, terms;
  const void* x;  // [T, terms], ldx
  int64_t ldx;
  const void* weight;  // [N, K], ldw
  int64_t ldw;
  const void* bias;  // [N] or null; forward only
  void* y;           // [T, N] or [T, K], ldy
  int64_t ldy;
};
// Tokens of a block of `linear`, and columns of a strip of `linear_backward`, at the widest level:
// threads share work in such pieces.
constexpr int64_t kLinearBlock = 64;

// Forward and backward of one mix for tokens [t0, t1).
template <class M>
struct MixKernels {
  void (*forward)(const M&, int64_t t0, int64_t t1);
  void (*backward)(const M&, int64_t t0, int64_t t1);
};

struct DenseKernels {
  // Rows [r0, r1) of all blocks, for tokens [t0, t1).
  void (*shrink)(const DenseShrink&, int64_t t0, int64_t t1, int64_t r0, int64_t r1);
  void (*expand)(const DenseExpand&, int64_t t0, int64_t t1, int64_t c0, int64_t c1);
  void (*outer)(const DenseOuter&, int64_t c0, int64_t c1);
  void (*outer_wide)(const DenseOuter&, int64_t c0, int64_t c1);  // writes A
  // n elements to the accumulator's type and back.
  void (*widen)(const void* from, int64_t n, void* to);
  void (*round)(const void* from, int64_t n, void* to);
  MixKernels<Gated> gated;
  MixKernels<Grid> grid;
  MixKernels<Averaged> averaged;
  MixKernels<OutputGating> output_gate;
};

struct Kernels {
  DenseKernels dense;
  // Forward, token phase: logits, routing and hidden of tokens [t0, t1), t0 a multiple of
  // kTokenUnit.
  void (*topk_tokens)(const TopkForward&, int64_t t0, int64_t t1);
  // Forward, expand for tokens [t0, t1) and columns [c0, c1).
  void (*topk_expand)(const TopkForward&, int64_t t0, int64_t t1, int64_t c0, int64_t c1);
  // The token phase for a handful of tokens, split so that threads share one token: logits of
  // experts [e0, e1); routing of all tokens; then units of hidden, topk_hidden_units() in all.
  void (*topk_logits)(const TopkForward&, int64_t e0, int64_t e1);
  void (*topk_route)(const TopkForward&, int64_t t0, int64_t t1);
  void (*topk_hidden)(const TopkForward&, int64_t u0, int64_t u1);
  // Backward, token phase: dH', the mix backward and dx of tokens [t0, t1).
  void (*topk_backward_tokens)(const TopkBackward&, int64_t t0, int64_t t1);
  // Backward, column phase: dlora_down and drouter for columns [c0, c1) of K; dlora_up for columns
  // of N.
  void (*topk_backward_down)(const TopkBackward&, int64_t c0, int64_t c1);
  void (*topk_backward_up)(const TopkBackward&, int64_t c0, int64_t c1);
  // The frozen linear: tokens [t0, t1) and outputs [n0, n1), or backward columns [c0, c1); all of
  // up to small_linear_tokens tokens.
  void (*linear)(const Linear&, int64_t t0, int64_t t1, int64_t n0, int64_t n1);
  void (*linear_backward)(const Linear&, int64_t t0, int64_t t1, int64_t c0, int64_t c1);
  void (*small_linear)(const Linear&, int64_t n0, int64_t n1);
  int64_t small_linear_tokens;  // for more, `linear` is faster
  // Tokens [t0, t1).
  void (*cosines)(const CosinesForward&, int64_t t0, int64_t t1);
  void (*cosines_backward)(const CosinesBackward&, int64_t t0, int64_t t1);
};

// Rows of hidden that one unit of topk_hidden computes.
constexpr int kHiddenUnitRows = 8;
inline int64_t topk_hidden_units(const Topk& p) {
  const int64_t per_expert = (p.r + kHiddenUnitRows - 1) / kHiddenUnitRows;
  return p.stacked ? p.E * per_expert : p.T * p.k * per_expert;
}

// The kernels of the level that runs here.
const Kernels& kernels(DType dtype);
const char* isa_level();         // the level that runs: environment MOELORA_CPU_ISA or the best one
const char* isa_levels_built();  // comma-separated, best first
const char* cpu_vendor();        // "amd", "intel" or "other"

}  // namespace moelora
