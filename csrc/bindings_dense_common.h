// What the bindings of the dense mixes share on every device: reading tensors, with the checks that
// keep kernels inside their memory.
#pragma once

#include "bindings_common.h"

namespace moelora::tensors {

using moelora::RowBlock;
using moelora::RowMap;
using OptionalTensor = std::optional<Tensor>;

// A tensor in the accumulator type of x, contiguous and of the given shape; null if absent.
inline const void* read_wide(const OptionalTensor& t, const Tensor& x,
                             const std::vector<int64_t>& shape, const char* name) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == accumulator_of(x), name, ": wanted the accumulator's dtype");
  STD_TORCH_CHECK(shape_of(*t) == shape, name, ": has a shape that does not fit the others");
  check_contiguous(*t, name);
  return t->const_data_ptr();
}
// One that forward has saved, for structs whose pointers forward writes through.
inline void* read_saved(const Tensor& t, const Tensor& x, const std::vector<int64_t>& shape,
                        const char* name) {
  return const_cast<void*>(read_wide(t, x, shape, name));
}
// A parameter in x's dtype, contiguous and of the given shape; null if absent.
inline const void* read_like(const OptionalTensor& t, const Tensor& x,
                             const std::vector<int64_t>& shape, const char* name) {
  if (!t) return nullptr;
  check_like(*t, x, shape, name);
  check_contiguous(*t, name);
  return t->const_data_ptr();
}

// Bytes of an element in the accumulator type of x.
inline int64_t accumulator_size(const Tensor& x) { return accumulator_size(dtype_of(x)); }

// Token vectors [T, columns] that are read: x, or dy.
struct Vectors {
  int64_t T, columns, ld;
  const void* at;
};
inline Vectors vectors_of(const Tensor& t, const char* name) {
  const Rows rows = rows_of(t, name);
  return {rows.count, t.size(t.dim() - 1), rows.stride, read(t)};
}
// Token vectors that are written in place: y, or dx.
struct Outputs {
  int64_t T, columns, ld;
  void* at;
};
inline Outputs outputs_of(const Tensor& t, const char* name) {
  const Rows rows = rows_of(t, name);
  return {rows.count, t.size(t.dim() - 1), rows.stride, data<void>(t)};
}
// Both of a tensor that has to be as x, with another number of columns.
inline void check_columns(const Tensor& t, const Tensor& x, int64_t columns, const char* name) {
  std::vector<int64_t> shape = shape_of(x);
  shape.back() = columns;
  check_like(t, x, shape, name);
}
inline Vectors vectors_like(const Tensor& t, const Tensor& x, int64_t columns, const char* name) {
  check_columns(t, x, columns, name);
  return vectors_of(t, name);
}
inline Outputs outputs_like(const Tensor& t, const Tensor& x, int64_t columns, const char* name) {
  check_columns(t, x, columns, name);
  return outputs_of(t, name);
}

// Rows [R, columns] that meet the vectors of `like`.
inline RowBlock block_of(const Tensor& rows, const Tensor& like) {
  const int64_t columns = like.size(like.dim() - 1);
  STD_TORCH_CHECK(rows.dim() == 2 && columns == rows.size(1), "rows: wanted [R, ", columns, "]");
  return {read_like(rows, like, shape_of(rows), "rows"), rows.size(0), columns};
}

// The shape of the coefficients [..., R] of vectors [..., columns].
inline std::vector<int64_t> coefficients_of(const Tensor& vectors, int64_t R) {
  std::vector<int64_t> shape = shape_of(vectors);
  shape.back() = R;
  return shape;
}

// What an expand adds to: the output itself, or a bias [columns] or nothing.
struct Start {
  const void* bias;
  bool accumulate;
};

// The experts of one call: x [T, K], lora_down [E, r, K], lora_up [E, r, N].
struct Experts {
  const Tensor &x, &lora_down, &lora_up;
  int64_t T{}, K{}, N{}, E{}, r{};
  Vectors tokens{};       // x
  RowBlock down{}, up{};  // E r rows each
};
inline Experts experts_of(const Tensor& x, const Tensor& lora_down, const Tensor& lora_up,
                          const char* name = "x") {
  STD_TORCH_CHECK(lora_down.dim() == 3 && lora_up.dim() == 3,
                  "lora_down, lora_up: wanted 3 dimensions");
  Experts e{x, lora_down, lora_up};
  e.tokens = vectors_of(x, name);
  e.T = e.tokens.T, e.K = lora_down.size(2), e.N = lora_up.size(2);
  e.E = lora_down.size(0), e.r = lora_down.size(1);
  STD_TORCH_CHECK(e.tokens.columns == e.K, name, ": wanted last dimension ", e.K);
  e.down = {read_like(lora_down, x, {e.E, e.r, e.K}, "lora_down"), e.E * e.r, e.K};
  e.up = {read_like(lora_up, x, {e.E, e.r, e.N}, "lora_up"), e.E * e.r, e.N};
  return e;
}

// That features fall into so many equal segments on either side.
inline void check_splits(int64_t splits, int64_t K, int64_t N) {
  STD_TORCH_CHECK(splits > 0 && K % splits == 0 && N % splits == 0,
                  "splits: wanted a divisor of in_features and out_features, got ", splits);
}

// Which row of a table [rows, columns] a token reads.  A map's values are not looked at.
inline RowMap row_map_of(const OptionalTensor& map, int64_t rows, int64_t T) {
  if (!map) {
    STD_TORCH_CHECK(T == 0 || (rows > 0 && T % rows == 0),
                    "weights: wanted a number of rows that divides the tokens, or a row_map");
    return {nullptr, T == 0 ? 1 : T / rows};
  }
  STD_TORCH_CHECK(map->scalar_type() == ScalarType::Int && map->numel() == T,
                  "row_map: wanted one int32 per token");
  check_contiguous(*map, "row_map");
  return {static_cast<const int32_t*>(map->const_data_ptr()), 1};
}

}  // namespace moelora::tensors
