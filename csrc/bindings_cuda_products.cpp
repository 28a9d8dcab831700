// The products alone on CUDA tensors: shrink, expand, outer.

#include "bindings_cuda_dense.h"

namespace {

using namespace moelora::tensors;
namespace cuda = moelora::cuda;

// Coefficients h [T, R] in the accumulator's type, as expand and outer read them.
void* rounded(const Call& call, Workspace& workspace, const Tensor& v, int64_t T, int R,
              const void* h) {
  void* to = nullptr;
  workspace.reserve(T * cuda::padded(R), element_size(v), &to);
  workspace.allocate(call);
  if (to) cuda::launch_round(dtype_of(v), T, R, h, to, call.stream());
  return to;
}

Tensor shrink(const Tensor& v, const Tensor& rows) {
  const Vectors tokens = vectors_of(v, "x");
  const RowBlock block = block_of(rows, v);
  const Call call(v);
  Tensor h = call.empty(coefficients_of(v, block.count), accumulator_of(v));
  if (h.numel() == 0) return h;
  cuda::Shrink p = shrink_of(tokens, rows_of(block, block.count));
  const moelora::DType dtype = dtype_of(v);
  const cuda::ShrinkPlan plan = cuda::plan_shrink(dtype, p, cuda::current_device());
  Workspace workspace;
  workspace.reserve(plan.parts > 1 ? plan.parts * h.numel() : 0, accumulator_size(v), &p.partials);
  workspace.allocate(call);
  cuda::launch_shrink(dtype, p, plan, data<void>(h), call.stream());
  return h;
}

void expand(const Tensor& h, const Tensor& rows, const Tensor& y, bool accumulate) {
  const Outputs out = outputs_of(y, "y");
  const RowBlock block = block_of(rows, y);
  const void* coefficients = read_wide(h, y, coefficients_of(y, block.count), "hidden");
  const Call call(y);
  if (y.numel() == 0) return;
  const cuda::Rows experts = rows_of(block, block.count);
  Workspace workspace;
  const void* low = rounded(call, workspace, y, out.T, experts.R, coefficients);
  cuda::launch_expand(dtype_of(y), expand_of(out, experts, low, {nullptr, accumulate}),
                      call.stream());
}

Tensor outer(const Tensor& h, const Tensor& v) {
  const Vectors tokens = vectors_of(v, "x");
  STD_TORCH_CHECK(h.dim() == v.dim(), "hidden: wanted as many dimensions as x");
  const int64_t R = h.size(h.dim() - 1);
  const void* coefficients = read_wide(h, v, coefficients_of(v, R), "hidden");
  const Call call(v);
  Tensor rows = call.empty({R, tokens.columns}, v.scalar_type());
  if (rows.numel() == 0) return rows;
  if (tokens.T == 0) {
    set_zero(call, {&rows});
    return rows;
  }
  cuda::Outer p = {};
  p.T = tokens.T;
  p.products[0] = outer_of(tokens, rows_of({nullptr, R, tokens.columns}, R));
  set_outputs(p, accumulator_of(v), {&rows});
  Workspace workspace, low;
  plan_outer(workspace, dtype_of(v), p);
  workspace.allocate(call);
  p.products[0].h = rounded(call, low, v, p.T, static_cast<int>(R), coefficients);
  cuda::launch_outer(dtype_of(v), p, call.stream());
  return rows;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moelora_ops_cuda, MOELORA_CUDA_KEY, m) {
  m.impl("shrink", TORCH_BOX(&shrink));
  m.impl("expand", TORCH_BOX(&expand));
  m.impl("outer", TORCH_BOX(&outer));
}
