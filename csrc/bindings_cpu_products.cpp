// The products alone on CPU tensors: shrink, expand, outer.

#include "bindings_dense.h"

namespace {

using namespace moelora::tensors;

Tensor shrink(const Tensor& v, const Tensor& rows) {
  const Vectors tokens = vectors_of(v, "x");
  const RowBlock block = block_of(rows, v);
  Tensor h = empty_wide(coefficients_of(v, block.count), v);
  const DenseShrink p = shrink_of(tokens, {block}, data<void>(h));
  const DenseKernels& kernels = moelora::kernels(dtype_of(v)).dense;
  if (p.T < kSmallT)
    split(p.T ? block.count : 0, kRowUnit,
          [&](int64_t r0, int64_t r1) { kernels.shrink(p, 0, p.T, r0, r1); });
  else
    split(p.T, kTokenUnit,
          [&](int64_t t0, int64_t t1) { kernels.shrink(p, t0, t1, 0, block.count); });
  return h;
}

void expand(const Tensor& h, const Tensor& rows, const Tensor& y, bool accumulate) {
  const Outputs out = outputs_of(y, "y");
  const RowBlock block = block_of(rows, y);
  void* coefficients = read_saved(h, y, coefficients_of(y, block.count), "hidden");
  const DenseExpand p = expand_of(out, {block}, coefficients, {nullptr, accumulate});
  const DenseKernels& kernels = moelora::kernels(dtype_of(y)).dense;
  if (p.T > kColumnSplitT)
    split(p.T, kTokenUnit, [&](int64_t t0, int64_t t1) { kernels.expand(p, t0, t1, 0, p.C); });
  else
    split(p.T ? p.C : 0, kColumnUnit,
          [&](int64_t c0, int64_t c1) { kernels.expand(p, 0, p.T, c0, c1); });
}

Tensor outer(const Tensor& h, const Tensor& v) {
  const Vectors tokens = vectors_of(v, "x");
  STD_TORCH_CHECK(h.dim() == v.dim(), "hidden: wanted as many dimensions as x");
  const int64_t R = h.size(h.dim() - 1);
  void* coefficients = read_saved(h, v, coefficients_of(v, R), "hidden");
  Tensor rows = empty({R, tokens.columns}, v.scalar_type());
  const DenseOuter p = outer_of(tokens, {{read(rows), R, tokens.columns}}, coefficients);
  const DenseKernels& kernels = moelora::kernels(dtype_of(v)).dense;
  split(tokens.columns, kColumnUnit, [&](int64_t c0, int64_t c1) { kernels.outer(p, c0, c1); });
  return rows;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moelora_ops, CPU, m) {
  m.impl("shrink", TORCH_BOX(&shrink));
  m.impl("expand", TORCH_BOX(&expand));
  m.impl("outer", TORCH_BOX(&outer));
}
