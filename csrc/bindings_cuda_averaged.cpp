// The averaged operators of moelora_ops/ops.py on CUDA tensors: experts whose factors are averaged,
// not their outputs; with weights per sequence by merging the factors first.

#include "bindings_cuda_dense.h"

namespace {

using namespace moelora::tensors;
namespace cuda = moelora::cuda;

// What both directions share.
struct AveragedCall {
  Experts e;
  int64_t splits;
  double scale;
  cuda::Table weights;  // [rows, splits E]

  AveragedCall(const Tensor& x, const Tensor& lora_down, const Tensor& lora_up, const Tensor& table,
               const OptionalTensor& row_map, int64_t splits, double scale, bool merged)
      : e(experts_of(x, lora_down, lora_up)), splits(splits), scale(scale) {
    check_splits(splits, e.K, e.N);
    weights = table_of(table, row_map, x, splits * e.E, "weights");
    STD_TORCH_CHECK(!merged || !row_map,
                    "row_map: sequences lie one after the other if they are merged");
  }
  int64_t hidden_columns() const { return weights.columns * e.r; }
  void fill(cuda::Averaged& mix) const {
    mix.E = static_cast<int>(e.E), mix.r = static_cast<int>(e.r);
    mix.splits = static_cast<int>(splits);
    mix.scale = scale;
    mix.weights = weights;
  }
};

// ---------------------------------------------------------------- weights per token

// Segment q of the features meets the same segment of every expert's rows, and has columns of h of
// its own.
template <class Product>
Product in_segments(Product p, int64_t splits) {
  const int64_t whole = p.columns, own = whole / splits;
  p.columns = own;
  p.rows.ld = whole;
  p.batch = {splits, own, own, pitch(p.rows), own};
  if constexpr (requires { p.ldh; }) p.ldh *= splits;
  return p;
}

Tensor forward(const AveragedCall& c, const Outputs& y, const Start& start) {
  const Experts& e = c.e;
  const Call call(e.x);
  Tensor hidden = call.empty({e.T, c.hidden_columns()}, accumulator_of(e.x));
  if (e.T == 0) return hidden;
  cuda::AveragedForward mix = {};
  c.fill(mix);
  mix.hidden = data<void>(hidden);
  run_forward(call, dtype_of(e.x), in_segments(shrink_of(e.tokens, rows_of(e.down, e.r)), c.splits),
              mix, in_segments(expand_of(y, rows_of(e.up, e.r), nullptr, start), c.splits));
  return hidden;
}

// What is wanted beside the experts' gradients; dx is null if it is not.
struct Wanted {
  const Outputs* dx;
  bool accumulate, dparams, dweights;
};
using Gradients = std::tuple<Tensor, Tensor, Tensor>;  // of the factors and of the weights

Gradients backward(const AveragedCall& c, const Vectors& dy, const Tensor& hidden,
                   const Wanted& wanted, const Call& call, const Gradients& gradients) {
  const Experts& e = c.e;
  const moelora::DType dtype = dtype_of(e.x);
  const auto& [ddown, dup, dweights] = gradients;
  cuda::AveragedBackward mix = {};
  c.fill(mix);
  mix.hidden = read_saved(hidden, e.x, {e.T, c.hidden_columns()}, "hidden");

  const cuda::Rows down = rows_of(e.down, e.r), up = rows_of(e.up, e.r);
  const bool summed = wanted.dweights && is_shared(c.weights);
  cuda::Outer outer = {};
  outer.T = e.T;
  if (wanted.dparams) {
    outer.products[0] = in_segments(outer_of(dy, up), c.splits);
    outer.products[1] = in_segments(outer_of(e.tokens, down), c.splits);
  }
  if (summed) outer.sums[0] = sums_of(c.weights);
  const Tensor nothing = call.empty({0}, accumulator_of(e.x));
  set_outputs(outer, accumulator_of(e.x), {&dup, &ddown, summed ? &dweights : &nothing});

  cuda::Shrink shrink = in_segments(shrink_of(dy, up), c.splits);
  Workspace workspace;
  const cuda::ShrinkPlan plan = plan_mix(workspace, dtype, shrink, mix);
  const int64_t size = element_size(e.x), columns = c.splits * pitch(down);
  workspace.reserve(e.T * columns, size, &mix.dhidden);
  workspace.reserve(wanted.dparams ? e.T * columns : 0, size, &mix.mixed);
  workspace.reserve(summed ? e.T * c.weights.columns : 0, accumulator_size(e.x), &mix.dweights);
  plan_outer(workspace, dtype, outer);
  workspace.allocate(call);
  if (wanted.dweights && !summed) mix.dweights = data<void>(dweights);
  cuda::launch_mix(dtype, shrink, mix, plan, call.stream());
  if (wanted.dx)
    cuda::launch_expand(
        dtype,
        in_segments(expand_of(*wanted.dx, down, mix.dhidden, {nullptr, wanted.accumulate}),
                    c.splits),
        call.stream());
  outer.products[0].h = mix.mixed;
  outer.products[1].h = mix.dhidden;
  outer.sums[0].values = mix.dweights;
  cuda::launch_outer(dtype, outer, call.stream());
  return gradients;
}

// ---------------------------------------------------------------- weights per sequence

// Each row of the table has factors [r, columns] of its own, and a run of tokens that meet them.
template <class Product>
Product in_runs(Product p, const cuda::Table& table, int64_t ld) {
  const int64_t length = table.row.tokens_per_row;
  if constexpr (requires { p.T; }) p.T = length;
  p.batch = {table.rows, length * ld, p.rows.R * p.columns, length * pitch(p.rows), 0};
  return p;
}

class MergedCall {
 public:
  cuda::Merged factors;

  MergedCall(const AveragedCall& c, Workspace& workspace)
      : factors{static_cast<int>(c.e.E),
                static_cast<int>(c.e.r),
                static_cast<int>(c.splits),
                c.weights.rows,
                c.scale,
                c.weights.values,
                {c.e.down.rows, nullptr, c.e.K},
                {c.e.up.rows, nullptr, c.e.N}},
        c(c),
        dtype(dtype_of(c.e.x)) {
    const int64_t size = element_size(c.e.x);
    workspace.reserve(factors.rows * c.e.r * c.e.K, size, &factors.down.merged);
    workspace.reserve(factors.rows * c.e.r * c.e.N, size, &factors.up.merged);
  }
  // Of one row of the table.
  cuda::Rows down() const { return rows_of(factors.down); }
  cuda::Rows up() const { return rows_of(factors.up); }

  void merge(const Call& call) const { cuda::launch_merge(dtype, factors, call.stream()); }
  void shrink(const Call& call, const Vectors& v, const cuda::Rows& rows,
              const cuda::MergedHidden& to) const {
    const cuda::Shrink p = in_runs(shrink_of(v, rows), c.weights, v.ld);
    cuda::ShrinkPlan plan = cuda::plan_shrink(dtype, p, cuda::current_device());
    plan.parts = 1;  // adding parts would take another launch
    cuda::launch_merged_shrink(dtype, p, plan, to, call.stream());
  }
  void expand(const Call& call, const Outputs& y, const cuda::Rows& rows, const void* h,
              const Start& start) const {
    cuda::launch_expand(dtype, in_runs(expand_of(y, rows, h, start), c.weights, y.ld),
                        call.stream());
  }
  cuda::OuterProduct outer(const Vectors& v, const cuda::Rows& rows) const {
    return in_runs(outer_of(v, rows), c.weights, v.ld);
  }

 private:
  const AveragedCall& c;
  moelora::DType dtype;

  cuda::Rows rows_of(const cuda::Merged::Factor& factor) const {
    return {factor.merged, nullptr, factors.r, factors.r, 0};
  }
};

Tensor merged_forward(const AveragedCall& c, const Outputs& y, const Start& start) {
  const Experts& e = c.e;
  const Call call(e.x);
  Tensor hidden = call.empty({e.T, e.r}, accumulator_of(e.x));
  if (e.T == 0) return hidden;
  const moelora::DType dtype = dtype_of(e.x);
  Workspace workspace;
  MergedCall merged(c, workspace);
  cuda::Shrink shrink = in_runs(shrink_of(e.tokens, merged.down()), c.weights, e.tokens.ld);
  const cuda::Expand expand = in_runs(expand_of(y, merged.up(), nullptr, start), c.weights, y.ld);
  const cuda::ShrinkPlan plan =
      cuda::plan_merged(dtype, merged.factors, shrink, expand, cuda::current_device());
  cuda::MergedHidden to = {data<void>(hidden), nullptr, nullptr};
  workspace.reserve(plan.few ? plan.parts * e.T * e.r : 0, accumulator_size(dtype),
                    &shrink.partials);
  workspace.reserve(plan.copies * e.T * expand.ldh, element_size(dtype), &to.low);
  workspace.allocate(call);
  cuda::launch_merged(dtype, merged.factors, shrink, to, plan, expand, call.stream());
  return hidden;
}

Gradients merged_backward(const AveragedCall& c, const Vectors& dy, const Tensor& hidden,
                          const Wanted& wanted, const Call& call, const Gradients& gradients) {
  const Experts& e = c.e;
  const moelora::DType dtype = dtype_of(e.x);
  const auto& [ddown, dup, dweights] = gradients;
  const bool outer_wanted = wanted.dparams || wanted.dweights;
  cuda::MergedHidden to = {read_saved(hidden, e.x, {e.T, e.r}, "hidden"), nullptr, nullptr};
  const int64_t columns = cuda::padded(e.r), size = element_size(e.x);
  Workspace workspace;
  MergedCall merged(c, workspace);
  workspace.reserve(e.T * columns, size, &to.dhidden);
  workspace.reserve(outer_wanted ? e.T * columns : 0, size, &to.low);
  cuda::Outer outer = {};
  outer.T = c.weights.row.tokens_per_row;
  if (outer_wanted) {
    outer.products[0] = merged.outer(dy, merged.up());
    outer.products[1] = merged.outer(e.tokens, merged.down());
  }
  plan_outer(workspace, dtype, outer);
  workspace.allocate(call);

  merged.merge(call);
  merged.shrink(call, dy, merged.up(), to);
  if (wanted.dx)
    merged.expand(call, *wanted.dx, merged.down(), to.dhidden, {nullptr, wanted.accumulate});
  if (!outer_wanted) return gradients;
  outer.products[0].h = to.low;
  outer.products[1].h = to.dhidden;
  cuda::launch_outer_parts(dtype, outer, call.stream());
  const auto pointer = [](const Tensor& t) { return t.numel() ? data<void>(t) : nullptr; };
  cuda::launch_unmerge(dtype,
                       {merged.factors, outer.parts, outer.partials, pointer(dup), pointer(ddown),
                        pointer(dweights)},
                       call.stream());
  return gradients;
}

// ---------------------------------------------------------------- operators

Tensor averaged_forward(const Tensor& x, const Tensor& lora_down, const Tensor& lora_up,
                        const Tensor& weights, const OptionalTensor& row_map,
                        const OptionalTensor& bias, const Tensor& y, int64_t splits, double scale,
                        bool merged, bool accumulate) {
  const AveragedCall c(x, lora_down, lora_up, weights, row_map, splits, scale, merged);
  const Outputs out = outputs_like(y, x, c.e.N, "y");
  const Start start = {read_like(bias, x, {c.e.N}, "bias"), accumulate};
  return merged ? merged_forward(c, out, start) : forward(c, out, start);
}

Gradients averaged_backward(const Tensor& dy, const Tensor& x, const Tensor& lora_down,
                            const Tensor& lora_up, const Tensor& weights,
                            const OptionalTensor& row_map, const Tensor& hidden, const Tensor& dx,
                            int64_t splits, double scale, bool merged, bool accumulate,
                            bool need_dx, bool need_dparams, bool need_dweights) {
  const AveragedCall c(x, lora_down, lora_up, weights, row_map, splits, scale, merged);
  const Vectors dys = vectors_like(dy, x, c.e.N, "dy");
  std::optional<Outputs> dxs;
  if (need_dx) dxs = outputs_like(dx, x, c.e.K, "dx");

  const Call call(x);
  const Gradients gradients = {
      gradient_like(call, lora_down, need_dparams), gradient_like(call, lora_up, need_dparams),
      call.empty({need_dweights ? c.weights.rows : 0, c.weights.columns}, accumulator_of(x))};
  if (c.e.T == 0) {
    const auto& [ddown, dup, dweights] = gradients;
    set_zero(call, {&ddown, &dup, &dweights});
    return gradients;
  }
  const Wanted wanted = {dxs ? &*dxs : nullptr, accumulate, need_dparams, need_dweights};
  return merged ? merged_backward(c, dys, hidden, wanted, call, gradients)
                : backward(c, dys, hidden, wanted, call, gradients);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moelora_ops_cuda, MOELORA_CUDA_KEY, m) {
  m.impl("averaged_forward", TORCH_BOX(&averaged_forward));
  m.impl("averaged_backward", TORCH_BOX(&averaged_backward));
}
