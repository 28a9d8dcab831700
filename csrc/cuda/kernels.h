// The CUDA kernels as the bindings see them: plain structs of pointers, and launchers that take a
// stream.  Neither CUDA's headers nor torch's are needed to include this.
//
// Letters: T tokens, K in_features, N out_features, E experts, r rank, R = E r, k top-k; A the
// accumulator of an element type (float, or double for double).  Strides count elements; last
// dimensions are contiguous.  Launchers throw std::runtime_error with the kernel's name.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "mix/host_device.h"

namespace moelora::cuda {

// What a launch is planned for, besides shapes.
struct Device {
  int multiprocessors;
  int shared_bytes;  // most of shared memory that one block can have
};
Device current_device();

// Skinny rows that one product meets: the experts' and, below them, the router's.
struct Rows {
  const void* experts;  // [R, columns], contiguous
  const void* router;   // [routed, columns], contiguous
  int R, r, routed;

  MOELORA_HD int count() const { return R + routed; }
};

// Dropout of what the experts see; the router sees all of it.
struct Masks {
  const int64_t* seed;  // [1], read on the device; null without dropout
  double p;
  bool per_expert;
};

// ---------------------------------------------------------------- the products

// h[t, c] = <mask(v_t), row_c>.
struct Shrink {
  int64_t T, columns;  // columns of v and the rows: what is summed over
  const void* v;       // [T, columns], ldv
  int64_t ldv;
  Rows rows;
  Masks masks;
  void* partials;  // A [parts, T, rows.count()] unless the plan is fused
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
// where the product is as fast as memory; the others spare the compiler their kernels.
struct ShrinkPlan {
  bool fused;      // one launch: a block owns its tokens, for all columns, and mixes them
  int warps;       // per block of the product, 16 tokens each
  int parts;       // blocks that share a tile's columns: 1, or one a segment
  int mix_tokens;  // per block of the mix
  int64_t mix_blocks;
};
// A pure function of shapes, dtype and device.
//   row_bytes  what the mix keeps of one token in shared memory
//   throws std::runtime_error if that is more than a block can have
ShrinkPlan plan_shrink(DType dtype, const Shrink& p, int64_t row_bytes, Device device);

// Column sums of the routing's statistics, which ride along with an expand.
struct Statistics {
  const void* prob_partials;      // A [blocks, E]
  const int32_t* count_partials;  // [blocks, E]
  int64_t blocks;                 // 0: nothing to do
  int E;
  void* prob_sums;  // A [E]
  int64_t* counts;  // [E]
};

// y[t] = (bias or y[t]) + mask ⊙ Σ_c h[t, c] row_c.  No 1 / (1 - p).
struct Expand {
  int64_t T, columns;
  const void* h;  // [T, ldh] with zeros from rows.count() on
  int64_t ldh;    // padded(rows.count())
  Rows rows;
  Masks masks;
  const void* bias;  // [columns] or null; only without accumulate
  void* y;           // [T, columns], ldy
  int64_t ldy;
  bool accumulate;  // start from what y holds
  Statistics statistics;
};
// Coefficients come in rows of whole tensor-core steps.
MOELORA_HD int64_t padded(int64_t columns) { return (columns + 15) / 16 * 16; }

// rows_c = Σ_t h[t, c] mask ⊙ v_t.
struct OuterProduct {
  const void* h;  // [T, ldh], as above
  int64_t ldh;
  const void* v;  // [T, columns], ldv
  int64_t ldv, columns;
  Rows rows;  // no pointers: how many
  Masks masks;

  MOELORA_HD int64_t size() const { return rows.count() * columns; }
};
constexpr int kOuterProducts = 2;
constexpr int kOuterOutputs = 3;
// All parameter gradients: tokens in `parts` chunks, whose sums are added in order.
struct Outer {
  int64_t T;
  OuterProduct products[kOuterProducts];
  int64_t chunk;   // tokens
  int parts;       // ceil(T / chunk)
  void* partials;  // A [parts, size()]: the products, one after the other
  // Where the sums go, in that order.
  struct Output {
    void* rows;
    int64_t size;
  } outputs[kOuterOutputs];

  MOELORA_HD int64_t size() const { return products[0].size() + products[1].size(); }
};
// Sets chunk and parts.
void plan_outer(DType dtype, Device device, Outer& outer);

void launch_expand(DType dtype, const Expand& p, void* stream);
void launch_outer(DType dtype, const Outer& p, void* stream);  // two launches
void set_zero(void* data, int64_t bytes, void* stream);

// ---------------------------------------------------------------- the topk mix

struct Topk {
  int E, r, k;
  bool stacked;  // hidden has all experts, not the selected ones
  bool renormalize;
  double scale, inv_keep;
  void* hidden;       // A [T, kept() * r]
  void* logits;       // A [T, E]
  void* weights;      // A [T, k]
  int32_t* selected;  // [T, k]
  void* mixed;        // [T, padded(R)]: H'; null if not wanted

  MOELORA_HD int kept() const { return stacked ? E : k; }
};
struct TopkForward : Topk {
  void* prob_partials;      // A [mix_blocks, E]
  int32_t* count_partials;  // [mix_blocks, E]
};
struct TopkBackward : Topk {
  const void* dprob_sums;  // A [E] or null
  void* gradients;         // [T, padded(R + E)]: dH | dlogits | zeros
};
int64_t topk_row_bytes(DType dtype, const Topk& mix, int rows);

// From x to H': one launch, or two.
void launch_topk_forward(DType dtype, const Shrink& p, const TopkForward& mix,
                         const ShrinkPlan& plan, void* stream);
// From dy to the coefficients of every gradient.
void launch_topk_backward(DType dtype, const Shrink& p, const TopkBackward& mix,
                          const ShrinkPlan& plan, void* stream);

}  // namespace moelora::cuda
