// What the operators of the dense mixes on CUDA tensors share: products of tensors, and tables.
// Arguments were validated in Python; what is checked here would corrupt memory.
#pragma once

#include "bindings_cuda_common.h"
#include "bindings_dense_common.h"

namespace moelora::tensors {

// ---------------------------------------------------------------- products

// An expert's rows, and others below them that see no dropout.
inline cuda::Rows rows_of(const RowBlock& experts, int64_t r, const RowBlock& others = {}) {
  return {experts.rows, others.rows, static_cast<int>(experts.count), static_cast<int>(r),
          static_cast<int>(others.count)};
}
inline int64_t pitch(const cuda::Rows& rows) { return cuda::padded(rows.count()); }

inline cuda::Shrink shrink_of(const Vectors& v, const cuda::Rows& rows,
                              const cuda::Masks& masks = {}) {
  return {v.T, v.columns, v.at, v.ld, rows, masks, nullptr};
}
//   h  [T, pitch(rows)], or null where a mix provides it
inline cuda::Expand expand_of(const Outputs& y, const cuda::Rows& rows, const void* h,
                              const Start& start, const cuda::Masks& masks = {}) {
  return {y.T,        y.columns, h,    pitch(rows),      rows, masks,
          start.bias, y.at,      y.ld, start.accumulate, {}};
}
// Whoever has the coefficients sets h.
inline cuda::OuterProduct outer_of(const Vectors& v, const cuda::Rows& rows,
                                   const cuda::Masks& masks = {}) {
  return {nullptr, pitch(rows), v.at, v.ld, v.columns, rows, masks};
}

// Shrink, mix and expand, from x to y.
template <class Mix>
void run_forward(const Call& call, DType dtype, cuda::Shrink shrink, Mix mix,
                 const cuda::Expand& expand) {
  Workspace workspace;
  const cuda::ShrinkPlan plan = plan_mix(workspace, dtype, shrink, mix, expand);
  workspace.allocate(call);
  cuda::launch_mix(dtype, shrink, mix, plan, expand, call.stream());
}

// ---------------------------------------------------------------- tables

// A tensor [rows, columns] in the accumulator's type, and which of its rows a token reads.
inline cuda::Table table_of(const Tensor& t, const OptionalTensor& map, const Tensor& x,
                            int64_t columns, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2, name, ": wanted 2 dimensions");
  return {read_wide(t, x, {t.size(0), columns}, name), t.size(0), static_cast<int>(columns),
          row_map_of(map, t.size(0), rows_of(x, "x").count)};
}
// Whether tokens share rows, so that a table's gradient is a sum of what each token adds.
inline bool is_shared(const cuda::Table& table) {
  return table.row.map || table.row.tokens_per_row != 1;
}
// Its gradient; whoever has the tokens' shares A [T, columns] sets values.
inline cuda::TokenSums sums_of(const cuda::Table& table) {
  return {nullptr, true, table.columns, table.columns, table.rows, table.row, 1};
}
// Sums over all tokens of values [T, ld], of which the first columns count.
inline cuda::TokenSums sums_of_all(int64_t T, int columns, int64_t ld, bool wide, double scale) {
  return {nullptr, wide, ld, columns, 1, {nullptr, T}, scale};
}

// ---------------------------------------------------------------- gradients

// Uninitialised and like `t`, or empty if it is not wanted.
inline Tensor gradient_like(const Call& call, const Tensor& t, bool wanted) {
  return call.empty(wanted ? shape_of(t) : std::vector<int64_t>{0}, t.scalar_type());
}
inline Tensor gradient_like(const Call& call, const OptionalTensor& t, const Tensor& x,
                            bool wanted) {
  return t ? gradient_like(call, *t, wanted) : gradient_like(call, x, false);
}

}  // namespace moelora::tensors
