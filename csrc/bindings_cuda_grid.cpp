// The grid mix on CUDA tensors: MoR1E's experts, one down row times one up row each.

#include "bindings_cuda_dense.h"
#include "bindings_grid.h"

namespace {

using namespace moelora::tensors;
namespace cuda = moelora::cuda;

// What both directions share.
struct GridCall : GridTensors {
  cuda::Rows down, up;  // down: lora_down, and the router behind it

  GridCall(const Tensor& x, const Tensor& lora_down, const Tensor& lora_up, const Tensor& router,
           const Tensor& omega, const Tensor& beta, bool diagonal)
      : GridTensors(x, lora_down, lora_up, router, omega, beta, diagonal),
        down(rows_of(GridTensors::down, 1, GridTensors::router)),
        up(rows_of(GridTensors::up, 1)) {}

  void fill(cuda::Grid& mix, const Tensor& x, const Tensor& omega, const Tensor& beta,
            const OptionalTensor& intuition, const OptionalTensor& row_map, double token_scale,
            double task_scale) const {
    mix.shape = shape;
    mix.omega = read(omega);
    mix.beta = read(beta);
    mix.token_scale = token_scale;
    mix.task_scale = task_scale;
    if (intuition) mix.intuition = table_of(*intuition, row_map, x, gates, "intuition");
  }
};

Tensor grid_forward(const Tensor& x, const Tensor& lora_down, const Tensor& lora_up,
                    const Tensor& router, const Tensor& omega, const Tensor& beta,
                    const OptionalTensor& intuition, const OptionalTensor& row_map,
                    const OptionalTensor& bias, const Tensor& y, double token_scale,
                    double task_scale, bool diagonal, bool accumulate) {
  const GridCall c(x, lora_down, lora_up, router, omega, beta, diagonal);
  cuda::GridForward mix = {};
  c.fill(mix, x, omega, beta, intuition, row_map, token_scale, task_scale);
  const Outputs out = outputs_like(y, x, c.N, "y");
  const Start start = {read_like(bias, x, {c.N}, "bias"), accumulate};

  const Call call(x);
  Tensor hidden = call.empty({c.T, c.hidden_columns()}, accumulator_of(x));
  if (c.T == 0) return hidden;
  mix.hidden = data<void>(hidden);
  run_forward(call, dtype_of(x), shrink_of(c.tokens, c.down), mix,
              expand_of(out, c.up, nullptr, start));
  return hidden;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> grid_backward(
    const Tensor& dy, const Tensor& x, const Tensor& lora_down, const Tensor& lora_up,
    const Tensor& router, const Tensor& omega, const Tensor& beta, const OptionalTensor& intuition,
    const OptionalTensor& row_map, const Tensor& hidden, const Tensor& dx, double token_scale,
    double task_scale, bool diagonal, bool accumulate, bool need_dx, bool need_dparams,
    bool need_dintuition) {
  const GridCall c(x, lora_down, lora_up, router, omega, beta, diagonal);
  cuda::GridBackward mix = {};
  c.fill(mix, x, omega, beta, intuition, row_map, token_scale, task_scale);
  const Vectors dys = vectors_like(dy, x, c.N, "dy");
  mix.hidden = read_saved(hidden, x, {c.T, c.hidden_columns()}, "hidden");
  std::optional<Outputs> out;
  if (need_dx) out = outputs_like(dx, x, c.K, "dx");

  const Call call(x);
  const moelora::DType dtype = dtype_of(x);
  need_dintuition = need_dintuition && intuition;
  Tensor dlora_down = gradient_like(call, lora_down, need_dparams);
  Tensor dlora_up = gradient_like(call, lora_up, need_dparams);
  Tensor drouter = gradient_like(call, router, need_dparams);
  Tensor domega = gradient_like(call, omega, need_dparams);
  Tensor dbeta = gradient_like(call, beta, need_dparams);
  Tensor dintuition =
      call.empty({need_dintuition ? intuition->size(0) : 0, c.gates}, accumulator_of(x));
  if (c.T == 0) {
    set_zero(call, {&dlora_down, &dlora_up, &drouter, &domega, &dbeta, &dintuition});
    return {dlora_down, dlora_up, drouter, domega, dbeta, dintuition};
  }

  const bool shared = need_dintuition && is_shared(mix.intuition);
  cuda::Outer outer = {};
  outer.T = c.T;
  if (need_dparams) {
    outer.products[0] = outer_of(dys, c.up);
    outer.products[1] = outer_of(c.tokens, c.down);
    outer.sums[0] = sums_of_all(c.T, 2, 2, true, 1);
  }
  if (shared) outer.sums[1] = sums_of(mix.intuition);
  set_outputs(outer, accumulator_of(x),
              {&dlora_up, &dlora_down, &drouter, &domega, &dbeta, shared ? &dintuition : nullptr});

  cuda::Shrink shrink = shrink_of(dys, c.up);
  Workspace workspace;
  const cuda::ShrinkPlan plan = plan_mix(workspace, dtype, shrink, mix);
  const int64_t size = element_size(x), wide = accumulator_size(x);
  workspace.reserve(need_dx || need_dparams ? c.T * pitch(c.down) : 0, size, &mix.dhidden);
  workspace.reserve(need_dparams ? c.T * pitch(c.up) : 0, size, &mix.mixed);
  workspace.reserve(need_dparams ? c.T * 2 : 0, wide, &mix.dscalars);
  workspace.reserve(shared ? c.T * c.gates : 0, wide, &mix.dintuition);
  plan_outer(workspace, dtype, outer);
  workspace.allocate(call);
  if (need_dintuition && !shared) mix.dintuition = data<void>(dintuition);
  cuda::launch_mix(dtype, shrink, mix, plan, call.stream());

  if (out)
    cuda::launch_expand(dtype, expand_of(*out, c.down, mix.dhidden, {nullptr, accumulate}),
                        call.stream());
  outer.products[0].h = mix.mixed;
  outer.products[1].h = mix.dhidden;
  outer.sums[0].values = mix.dscalars;
  outer.sums[1].values = mix.dintuition;
  cuda::launch_outer(dtype, outer, call.stream());
  return {dlora_down, dlora_up, drouter, domega, dbeta, dintuition};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moelora_ops_cuda, MOELORA_CUDA_KEY, m) {
  m.impl("grid_forward", TORCH_BOX(&grid_forward));
  m.impl("grid_backward", TORCH_BOX(&grid_backward));
}
