// The CUDA kernels as the bindings see them: plain structs of pointers, and launchers that take a
// stream.  Neither CUDA's headers nor torch's are needed to include this.
//
// Letters: T tokens, K in_features, N out_features, E experts, r rank, R = E r, k top-k; A the
// accumulator of an element type (float, or double for double).  Strides count elements; last
// dimensions are contiguous.  Launchers throw std::runtime_error with the kernel's name.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "mix/cosines.h"
#include "mix/gated.h"
#include "mix/grid.h"
#include "mix/host_device.h"
#include "mix/output_gate.h"
#include "mix/row_map.h"

namespace moelora::cuda {

// What a launch is planned for, besides shapes.
struct Device {
  int multiprocessors;
  int shared_bytes;  // most of shared memory that one block can have
  int capability;    // compute capability, ten times its number

  // Whether so many blocks give nine in ten multiprocessors as many as they can run at once.
  bool filled_by(int64_t blocks, int at_once = 1) const {
    return 10 * blocks >= 9 * int64_t{at_once} * multiprocessors;
  }
};
Device current_device();

// Skinny rows that one product meets: the experts' and, below them, others that see no dropout,
// such as a router's, or the experts' biases.
struct Rows {
  const void* experts;  // [R, columns], contiguous
  const void* others;   // [extra, columns], contiguous
  int R, r, extra;
  int64_t ld = 0;  // from one of the experts' rows to the next; 0: contiguous

  MOELORA_HD int count() const { return R + extra; }
};

// Dropout of what the experts see; the other rows see all of it.
struct Masks {
  const int64_t* seed;  // [1], read on the device; null without dropout
  double p;
  bool per_expert;
  int first = 0;  // index of the first expert's mask
};

// ---------------------------------------------------------------- the products

// Products of one shape in one launch: how many, and how many elements apart what they use is.
struct Batch {
  int64_t count = 1;
  int64_t vectors = 0;       // v or y
  int64_t rows = 0;          // the experts', or where an outer product of them goes
  int64_t coefficients = 0;  // h
  int64_t bias = 0;
};

// h[t, c] = <mask(v_t), row_c>.
struct Shrink {
  int64_t T, columns;  // columns of v and the rows: what is summed over
  const void* v;       // [T, columns], ldv
  int64_t ldv;
  Rows rows;
  Masks masks;
  void* partials;  // A [parts, T, batch.count, rows.count()] unless the plan is fused
  Batch batch;

  MOELORA_HD int64_t columns_of_h() const { return batch.count * rows.count(); }
};

// Sums over the columns go in segments whose length depends on their number alone; each segment
// has an accumulator of its own, and they are added left to right.  So a token gets the same bits
// from any plan.
constexpr int kMostSegments = 8;
constexpr int kSegmentUnit = 64;  // whole steps of the main loop, whatever the element type
MOELORA_HD int64_t segment_length(int64_t columns) {
  const int64_t unit = int64_t{kMostSegments} * kSegmentUnit;
  return columns <= unit ? kSegmentUnit : (columns + unit - 1) / unit * kSegmentUnit;
}
MOELORA_HD int segments(int64_t columns) {
  const int64_t length = segment_length(columns);
  return columns <= length ? 1 : static_cast<int>((columns + length - 1) / length);
}

// How a shrink and the mix behind it are launched.  Fused is for 16-bit types without dropout,
// where the product is as fast as memory, and few is not for double, which nobody waits for: the
// others spare the compiler their kernels.
struct ShrinkPlan {
  bool fused;      // one launch: a block owns its tokens, for all columns, and mixes them
  bool few;        // the mix goes into the expand behind it, whose blocks do it each by itself
  bool wgmma;      // the product alone through wgmma, see shrink_wgmma.cuh; never with fused
  int warps;       // per block of the product, 16 tokens each
  int parts;       // blocks that share a tile's columns: 1, or one a segment
  int mix_tokens;  // per block of the mix
  int64_t mix_blocks;
  int64_t copies;  // of what is mixed: one, or one for each block that mixes by itself
};

// Column sums of the routing's statistics, which ride along with an expand.
struct Statistics {
  const void* prob_partials;      // A [blocks, E]
  const int32_t* count_partials;  // [blocks, E]
  int64_t blocks;                 // 0: nothing to do
  int E;
  void* prob_sums;  // A [E]
  int64_t* counts;  // [E]; null if not wanted
};

// y[t] = (bias or y[t]) + mask ⊙ Σ_c h[t, c] row_c.  No 1 / (1 - p).
struct Expand {
  int64_t T, columns;
  const void* h;  // [T, padded(rows.count())], ldh; zeros from rows.count() on
  int64_t ldh;
  Rows rows;
  Masks masks;
  const void* bias;  // [columns] or null; only without accumulate
  void* y;           // [T, columns], ldy
  int64_t ldy;
  bool accumulate;  // start from what y holds
  Statistics statistics;
  Batch batch;
};
// How its work is shared out: blocks of so many warps, each with strips of columns and walks of
// tiles of 16 tokens a warp.
struct ExpandPlan {
  int warps, strips;
  int64_t tiles_per_walk;
};
// A pure function of shapes, dtype and device; of a shrink alone, which is neither fused nor few,
// with a mix, or with a mix and an expand.
//   row_bytes  what the mix keeps of one token in shared memory
//   throws std::runtime_error if that is more than a block can have
ShrinkPlan plan_shrink(DType dtype, const Shrink& p, Device device);
ShrinkPlan plan_shrink(DType dtype, const Shrink& p, int64_t row_bytes, Device device);
ShrinkPlan plan_shrink(DType dtype, const Shrink& p, int64_t row_bytes, const Expand& expand,
                       Device device);

// Coefficients come in rows of whole tensor-core steps.
MOELORA_HD int64_t padded(int64_t columns) { return (columns + 15) / 16 * 16; }

// rows_c = Σ_t h[t, c] mask ⊙ v_t.
struct OuterProduct {
  const void* h;  // [T, padded(rows.count())], ldh, as above
  int64_t ldh;
  const void* v;  // [T, columns], ldv
  int64_t ldv, columns;
  Rows rows;  // no pointers: how many, and how far apart they are written
  Masks masks;
  Batch batch;

  MOELORA_HD int64_t size() const { return batch.count * rows.count() * columns; }
};
// out[row] = scale Σ values[t], over the tokens of each row of a table.  A row that the table does
// not have gets nothing.
struct TokenSums {
  const void* values;  // [T, columns], ld
  bool wide;           // A, not the element type
  int64_t ld;
  int columns;
  int64_t rows;
  RowMap row;
  double scale;

  MOELORA_HD int64_t size() const { return rows * columns; }
};
// (token, slot) pairs, as token * k + slot, by expert, then by slot, then by token.
struct Segments {
  int32_t* order;   // [T k]
  int32_t* starts;  // [E k + 1]: where in `order` those of an expert's slot begin; T k
  int E, k;
};
constexpr int kOuterProducts = 2;
constexpr int kTokenSums = 2;
constexpr int kOuterOutputs = 6;
// All gradients that are sums over tokens, in `parts` chunks of them, which are added in order.
struct Outer {
  int64_t T;
  OuterProduct products[kOuterProducts];  // without rows: nothing to do, as without columns below
  TokenSums sums[kTokenSums];
  // With an order: of both products' batches, one for each expert, that has its own tokens, and h a
  // row per pair.
  Segments segments;
  int64_t chunk;  // tokens; of each expert, if there are segments
  int parts;      // ceil(T / chunk)
  int strips;     // of columns, in one block
  // A [parts, size()]: the products and the sums, one after the other.  Null: one part, which goes
  // where it belongs at once.
  void* partials;
  // Where they go, in that order; a row of a product goes to one output.
  struct Output {
    void* to;
    int64_t size;
    bool wide;  // A, not the element type
  } outputs[kOuterOutputs];

  MOELORA_HD int64_t size() const {
    return products[0].size() + products[1].size() + sums[0].size() + sums[1].size();
  }
};
// Sets chunk, parts and strips.
void plan_outer(DType dtype, Device device, Outer& outer);

// The product alone, one launch or, if parts have to be added, two: sums A [T, rows.count()].
void launch_shrink(DType dtype, const Shrink& p, const ShrinkPlan& plan, void* sums, void* stream);
void launch_expand(DType dtype, const Expand& p, void* stream);
// All of it, in one launch or, if there are parts, two; or the first of the two.
void launch_outer(DType dtype, const Outer& p, void* stream);
void launch_outer_parts(DType dtype, const Outer& p, void* stream);
// Coefficients as expand and outer read them: from A [T, columns] to [T, padded(columns)].
void launch_round(DType dtype, int64_t T, int columns, const void* from, void* to, void* stream);
// Of its columns, for each product: how many blocks share a tile of tokens.
int64_t expand_strips(DType dtype, const Expand& p);
void set_zero(void* data, int64_t bytes, void* stream);

// ---------------------------------------------------------------- the mixes
//
// For the struct of each direction there are
//   row_bytes   what the mix keeps of one token in shared memory
//   launch_mix  a shrink and the mix of its sums, in the launches of the plan; forward, from x to
//               y, with the expand of what is mixed, whose h it sets
// Forward, mixed has plan.copies such tensors.

// Values that tokens read by the row: A [rows, columns].  A row that does not exist reads as NaN.
struct Table {
  const void* values;
  int64_t rows;
  int columns;
  RowMap row;
};

struct Topk {
  int E, r, k;
  bool renormalize;
  double scale, inv_keep;
  void* hidden;       // A [T, R]
  void* logits;       // A [T, E]
  void* weights;      // A [T, k]
  int32_t* selected;  // [T, k]
  void* mixed;        // [T, padded(R)]: H'; null if not wanted
};
struct TopkForward : Topk {
  void* prob_partials;      // A [mix_blocks, E], or of few tokens [1, E]
  int32_t* count_partials;  // the same
};
struct TopkBackward : Topk {
  const void* dprob_sums;  // A [E] or null
  void* gradients;         // [T, padded(R + E)]: dH | dlogits | zeros
};
int64_t row_bytes(DType dtype, const TopkForward& mix);
int64_t row_bytes(DType dtype, const TopkBackward& mix);
void launch_mix(DType dtype, const Shrink& p, const TopkForward& mix, const ShrinkPlan& plan,
                const Expand& expand, void* stream);
void launch_mix(DType dtype, const Shrink& p, const TopkBackward& mix, const ShrinkPlan& plan,
                void* stream);

// The same mix by segments: an expert meets the tokens that chose it.  hidden and H' are those of a
// token's k experts, and rows.R of each product is r, for E experts one after the other.

// From x to the choices, by the router's rows alone; count_partials are [mix_blocks, k, E].
struct TopkRouting : TopkForward {};
int64_t row_bytes(DType dtype, const TopkRouting& mix);
void launch_mix(DType dtype, const Shrink& p, const TopkRouting& mix, const ShrinkPlan& plan,
                void* stream);
// From the choices to segments and to counts [E].
void launch_sort(const TopkRouting& p, int64_t T, const ShrinkPlan& plan, const Segments& segments,
                 int64_t* counts, void* stream);

// The sums of a shrink by segments.
struct SegmentSums {
  void* hidden;  // A [T, k, r]: inv_keep times them
  double inv_keep;
  void* mixed;          // [T, k, padded(r)]: hidden times scale and weights; null if not wanted
  const void* weights;  // A [T, k]
  double scale;
};
void launch_shrink_segments(DType dtype, const Shrink& p, const Segments& segments,
                            const SegmentSums& to, void* stream);
// A launch for each slot: the first writes the tokens of y as p says, the others add to them.
//   p.h  the first slot's coefficients;  h [T, k, padded(r)], of the other slots
void launch_expand_segments(DType dtype, const Expand& p, const Segments& segments, const void* h,
                            void* stream);

struct GroupedBackward : Topk {  // hidden A [T, k, r], mixed [T, k, padded(r)]
  const void* dprob_sums;        // A [E] or null
  void* dhidden;                 // [T, k, padded(r)]
  void* first;                   // [T, padded(r + E)]: dhidden of the first slot | dlogits; or null
  void* dlogits;                 // [T, padded(E)] or null
};
//   dmixed  A [T, k, r]: a shrink of dy
void launch_mix(DType dtype, int64_t T, const void* dmixed, const GroupedBackward& mix,
                void* stream);

struct Gated {
  int E, r;
  Activation activation;
  bool up_bias;  // mixed has E more columns
  double scale, inv_keep;
  Table weights;
  void* hidden;  // A [T, R]: H before φ, with the biases
  void* mixed;   // [T, padded(mixed_columns())]: H' and what multiplies the up biases

  MOELORA_HD int mixed_columns() const { return E * (r + (up_bias ? 1 : 0)); }
};
struct GatedForward : Gated {
  const void* down_bias;  // [R] or null
};
struct GatedBackward : Gated {  // mixed: null if not wanted
  void* dhidden;                // [T, padded(R)] or null
  void* dweights;               // A [T, E]: each token's share; or null
};
int64_t row_bytes(DType dtype, const GatedForward& mix);
int64_t row_bytes(DType dtype, const GatedBackward& mix);
void launch_mix(DType dtype, const Shrink& p, const GatedForward& mix, const ShrinkPlan& plan,
                const Expand& expand, void* stream);
void launch_mix(DType dtype, const Shrink& p, const GatedBackward& mix, const ShrinkPlan& plan,
                void* stream);

struct Grid {
  GridShape shape;
  const void *omega, *beta;  // [1], before σ(100 ·)
  double token_scale, task_scale;
  Table intuition;  // without values: none
  void* hidden;     // A [T, hidden_columns()]: hidden, logits
  void* mixed;      // [T, padded(r2)]: H'

  MOELORA_HD int hidden_columns() const { return shape.r1 + shape.gates(); }
};
struct GridForward : Grid {};
struct GridBackward : Grid {  // mixed: null if not wanted
  void* dhidden;              // [T, padded(hidden_columns())] or null
  void* dscalars;             // A [T, 2]: each token's share of domega and dbeta; or null
  void* dintuition;           // A [T, gates]: each token's share; or null
};
int64_t row_bytes(DType dtype, const GridForward& mix);
int64_t row_bytes(DType dtype, const GridBackward& mix);
void launch_mix(DType dtype, const Shrink& p, const GridForward& mix, const ShrinkPlan& plan,
                const Expand& expand, void* stream);
void launch_mix(DType dtype, const Shrink& p, const GridBackward& mix, const ShrinkPlan& plan,
                void* stream);

struct Averaged {
  int E, r, splits;  // of the features, each with weights of its own
  double scale;
  Table weights;  // splits E columns
  void* hidden;   // A [T, splits R]
  void* mixed;    // [T, splits, padded(R)]: H'

  MOELORA_HD int pairs() const { return splits * E; }
};
struct AveragedForward : Averaged {};
struct AveragedBackward : Averaged {  // mixed: null if not wanted
  void* dhidden;                      // [T, splits, padded(R)]
  void* dweights;                     // A [T, splits E]: each token's share; or null
};
// The factors of the experts, merged for each row of a table: A = Σ_e w_e A_e, B = s Σ_e w_e B_e.
struct Merged {
  int E, r, splits;
  int64_t rows;  // of the table
  double scale;
  const void* weights;  // A [rows, splits E]
  struct Factor {
    const void* experts;  // [E, r, columns]
    void* merged;         // [rows, r, columns]
    int64_t columns;
  } down, up;
};
void launch_merge(DType dtype, const Merged& p, void* stream);
// Of a shrink by the merged factors, with the expand behind it.  Of few tokens blocks merge what
// they meet by themselves, and the copies are those of low.
ShrinkPlan plan_merged(DType dtype, const Merged& factors, const Shrink& p, const Expand& expand,
                       Device device);

// hidden of the tokens of all rows, which meet the merged factor of theirs.
struct MergedHidden {
  void* hidden;   // A [T, r]: the product, if dhidden is null; else what forward has saved
  void* dhidden;  // [T, padded(r)] or null: the product
  void* low;      // [T, padded(r)]: hidden
};
void launch_merged_shrink(DType dtype, const Shrink& p, const ShrinkPlan& plan,
                          const MergedHidden& to, void* stream);
// From x to y, with the merging, in the launches of the plan, which low has the copies of.  Sets
// the experts of both products and h.
void launch_merged(DType dtype, const Merged& factors, Shrink shrink, const MergedHidden& to,
                   const ShrinkPlan& plan, Expand expand, void* stream);

// From the gradients of the merged factors to those of the experts and of the weights.
struct Unmerge {
  Merged factors;
  int parts;              // chunks of tokens, to be added
  const void* gradients;  // A [parts, rows, r, columns of up and then of down]
  void *dup, *ddown;      // [E, r, columns]; null if not wanted
  void* dweights;         // A [rows, splits E]; null if not wanted
};
void launch_unmerge(DType dtype, const Unmerge& p, void* stream);

int64_t row_bytes(DType dtype, const AveragedForward& mix);
int64_t row_bytes(DType dtype, const AveragedBackward& mix);
void launch_mix(DType dtype, const Shrink& p, const AveragedForward& mix, const ShrinkPlan& plan,
                const Expand& expand, void* stream);
void launch_mix(DType dtype, const Shrink& p, const AveragedBackward& mix, const ShrinkPlan& plan,
                void* stream);

struct OutputGating {
  int E, r;
  Normalization normalization;
  double width;  // N
  // A, see mix/output_gate.h; means for kLayerNorm only, mask or null
  const void *projection, *factors, *means, *scales, *tau;
  const uint8_t* mask;
  bool mask_input;
  void* hidden;  // A [T, R]
  void* gates;   // A [T, E]

  MOELORA_HD int input_columns() const {
    return E * r + (normalization == Normalization::kLayerNorm ? 1 : 0);
  }
};
struct OutputGateForward : OutputGating {
  void* mixed;  // [T, padded(R)]: H'
};
struct OutputGateBackward : OutputGating {
  const void* dgates;  // A [T, E] or null: what reaches the gates from elsewhere
  void* normalized;    // A [T, input_columns()]: what P is multiplied by
  void* dlogits;       // A [T, E]
  void* dtau;          // A [T]: each token's share
  void* dhidden;       // [T, padded(R)]; null if not wanted
};
int64_t row_bytes(DType dtype, const OutputGateForward& mix);
int64_t row_bytes(DType dtype, const OutputGateBackward& mix);
void launch_mix(DType dtype, const Shrink& p, const OutputGateForward& mix, const ShrinkPlan& plan,
                const Expand& expand, void* stream);
void launch_mix(DType dtype, const Shrink& p, const OutputGateBackward& mix, const ShrinkPlan& plan,
                void* stream);

void launch_cosines(DType dtype, const CosinesForward& p, void* stream);
void launch_cosines_backward(DType dtype, const CosinesBackward& p, void* stream);

}  // namespace moelora::cuda
