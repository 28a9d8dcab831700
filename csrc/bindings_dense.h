// What the operators of the dense mixes share (schemas: moelora_ops/ops.py): three products and the
// mix between them, see cpu/kernels.h, on tensors.  Arguments were validated in Python; what is
// checked here would corrupt memory.
#pragma once

#include "bindings_dense_common.h"
#include "cpu/scalar.h"

namespace moelora::tensors {

using moelora::Dense;
using moelora::DenseExpand;
using moelora::DenseKernels;
using moelora::DenseOuter;
using moelora::DenseShrink;
using moelora::kTokenUnit;

// Rows of a product that one thread takes at least.
constexpr int64_t kRowUnit = 8;

// ---------------------------------------------------------------- reading and allocating

// Calls f with a value of the element type.
template <class F>
void with_element(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32: return f(float());
    case DType::kBFloat16: return f(BFloat16());
    case DType::kFloat16: return f(Float16());
    case DType::kFloat64: return f(double());
  }
}
// The same for a tensor in an accumulator's type.
template <class F>
void with_accumulator(const Tensor& t, const F& f) {
  t.scalar_type() == ScalarType::Double ? f(double()) : f(float());
}

// Uninitialised, in the accumulator type of x.
inline Tensor empty_wide(const std::vector<int64_t>& shape, const Tensor& x) {
  return empty(shape, accumulator_of(x));
}
// Uninitialised and like `t`, or empty if it is not wanted.
inline Tensor gradient_like(const Tensor& t, bool wanted) {
  return empty(wanted ? shape_of(t) : std::vector<int64_t>{0}, t.scalar_type());
}
inline Tensor gradient_like(const OptionalTensor& t, const Tensor& x, bool wanted) {
  return t ? gradient_like(*t, wanted) : gradient_like(x, false);
}

// ---------------------------------------------------------------- products

// The rows that a product meets, in one block or two.
struct Blocks {
  RowBlock first, second{};
  int64_t count() const { return first.count + second.count; }
};
// Where the gradient of a block goes.
inline RowBlock gradient_of(const RowBlock& block, const Tensor& gradient) {
  return {read(gradient), block.count, block.ld};
}

// h holds the coefficients [T, rows.count()]; whoever lays them out otherwise sets ldh.
template <class V>
Dense product_of(const V& v, const Blocks& rows, void* h, const Dropout* dropout) {
  return {v.T, v.columns, {rows.first, rows.second}, h, rows.count(), dropout};
}
inline DenseShrink shrink_of(const Vectors& v, const Blocks& rows, void* h,
                             const Dropout* dropout = nullptr) {
  return {product_of(v, rows, h, dropout), v.at, v.ld};
}
inline DenseExpand expand_of(const Outputs& y, const Blocks& rows, void* h, const Start& start,
                             const Dropout* dropout = nullptr) {
  return {product_of(y, rows, h, dropout), y.at, y.ld, start.bias, start.accumulate};
}
inline DenseOuter outer_of(const Vectors& v, const Blocks& rows, void* h,
                           const Dropout* dropout = nullptr) {
  return {product_of(v, rows, h, dropout), v.at, v.ld};
}

// ---------------------------------------------------------------- running

// x to hidden to mixed to y; the lists hold one product per window of columns.
template <class Mix>
void run_forward(const Tensor& x, MixKernels<Mix> DenseKernels::*mix_kernels, const Mix& mix,
                 const std::vector<DenseShrink>& shrinks, const std::vector<DenseExpand>& expands) {
  const DenseKernels& kernels = moelora::kernels(dtype_of(x)).dense;
  const int64_t T = shrinks[0].T;
  if (T == 0) return;
  if (T < kSmallT) {
    for (const DenseShrink& p : shrinks)
      split(p.rows(), T * p.rows() * p.C > kSerialProducts ? kRowUnit : p.rows(),
            [&](int64_t r0, int64_t r1) { kernels.shrink(p, 0, T, r0, r1); });
    (kernels.*mix_kernels).forward(mix, 0, T);
  } else {
    split(T, kTokenUnit, [&](int64_t t0, int64_t t1) {
      for (const DenseShrink& p : shrinks) kernels.shrink(p, t0, t1, 0, p.rows());
      (kernels.*mix_kernels).forward(mix, t0, t1);
      if (T > kColumnSplitT)
        for (const DenseExpand& p : expands) kernels.expand(p, t0, t1, 0, p.C);
    });
    if (T > kColumnSplitT) return;
  }
  for (const DenseExpand& p : expands)
    split(p.C, kColumnUnit, [&](int64_t c0, int64_t c1) { kernels.expand(p, 0, T, c0, c1); });
}

// dy to dmixed to dhidden to dx, then the weights' gradients.
template <class Mix>
void run_backward(const Tensor& x, MixKernels<Mix> DenseKernels::*mix_kernels, const Mix& mix,
                  const std::vector<DenseShrink>& shrinks, const std::vector<DenseExpand>& expands,
                  const std::vector<DenseOuter>& outers) {
  const DenseKernels& kernels = moelora::kernels(dtype_of(x)).dense;
  split(shrinks[0].T, kTokenUnit, [&](int64_t t0, int64_t t1) {
    for (const DenseShrink& p : shrinks) kernels.shrink(p, t0, t1, 0, p.rows());
    (kernels.*mix_kernels).backward(mix, t0, t1);
    for (const DenseExpand& p : expands) kernels.expand(p, t0, t1, 0, p.C);
  });
  for (const DenseOuter& p : outers)
    split(p.C, kColumnUnit, [&](int64_t c0, int64_t c1) { kernels.outer(p, c0, c1); });
}

// ---------------------------------------------------------------- tables of weights

// row_map_of, with the map's values checked.
inline RowMap checked_row_map(const OptionalTensor& map, int64_t rows, int64_t T) {
  const RowMap row = row_map_of(map, rows, T);
  for (int64_t t = 0; row.map && t < T; ++t)
    STD_TORCH_CHECK(0 <= row(t) && row(t) < rows, "row_map: wanted values in [0, ", rows, "), got ",
                    row(t), " at ", t);
  return row;
}

// dweights [rows, n] from each token's share [T, n], in the order of the tokens.
inline Tensor sum_rows(const Tensor& shares, const RowMap& row, int64_t rows) {
  const int64_t T = shares.size(0), n = shares.size(1);
  if (!row.map && row.tokens_per_row == 1 && rows == T) return shares;
  Tensor out = empty({rows, n}, shares.scalar_type());
  with_accumulator(shares, [&](auto element) {
    using A = decltype(element);
    std::vector<double> sums(rows * n);  // long sums of few numbers
    const A* share = static_cast<const A*>(shares.const_data_ptr());
    for (int64_t t = 0; t < T; ++t)
      for (int64_t j = 0; j < n; ++j) sums[row(t) * n + j] += share[t * n + j];
    std::copy(sums.begin(), sums.end(), data<A>(out));
  });
  return out;
}

// The sums over the tokens of their shares [T, n].
inline std::vector<double> column_sums(const Tensor& shares) {
  const int64_t T = shares.size(0), n = shares.size(1);
  std::vector<double> sums(n);
  with_accumulator(shares, [&](auto element) {
    const auto* share = static_cast<const decltype(element)*>(shares.const_data_ptr());
    for (int64_t t = 0; t < T; ++t)
      for (int64_t j = 0; j < n; ++j) sums[j] += share[t * n + j];
  });
  return sums;
}

}  // namespace moelora::tensors
