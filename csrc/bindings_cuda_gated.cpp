// The gated mix on CUDA tensors: experts with given weights.

#include "bindings_cuda_dense.h"

namespace {

using namespace moelora::tensors;
namespace cuda = moelora::cuda;

// What both directions share.
struct GatedCall {
  Experts e;
  cuda::Masks masks;
  cuda::Rows down, up;  // up: lora_up, and the biases behind it

  GatedCall(const Tensor& x, const Tensor& lora_down, const Tensor& lora_up,
            const OptionalTensor& up_bias, const OptionalTensor& seed, double dropout)
      : e(experts_of(x, lora_down, lora_up)), masks(make_masks(seed, dropout, false)) {
    RowBlock biases = {};
    if (up_bias) biases = {read_like(up_bias, x, {e.E, e.N}, "up_bias"), e.E, e.N};
    down = rows_of(e.down, e.r);
    up = rows_of(e.up, e.r, biases);
  }

  void fill(cuda::Gated& mix, const Tensor& weights, const OptionalTensor& row_map, double scale,
            int64_t activation, double dropout) const {
    STD_TORCH_CHECK(0 <= activation && activation < moelora::kActivations,
                    "activation: is no activation");
    mix.E = static_cast<int>(e.E);
    mix.r = static_cast<int>(e.r);
    mix.activation = static_cast<moelora::Activation>(activation);
    mix.up_bias = up.extra > 0;
    mix.scale = scale;
    mix.inv_keep = 1 / (1 - dropout);
    mix.weights = table_of(weights, row_map, e.x, e.E, "weights");
  }
};

Tensor gated_forward(const Tensor& x, const Tensor& lora_down, const OptionalTensor& down_bias,
                     const Tensor& lora_up, const OptionalTensor& up_bias, const Tensor& weights,
                     const OptionalTensor& row_map, const OptionalTensor& bias,
                     const OptionalTensor& seed, const Tensor& y, double scale, int64_t activation,
                     double dropout, bool accumulate) {
  const GatedCall c(x, lora_down, lora_up, up_bias, seed, dropout);
  const Experts& e = c.e;
  cuda::GatedForward mix = {};
  c.fill(mix, weights, row_map, scale, activation, dropout);
  mix.down_bias = read_like(down_bias, x, {e.E, e.r}, "down_bias");
  const Outputs out = outputs_like(y, x, e.N, "y");
  const Start start = {read_like(bias, x, {e.N}, "bias"), accumulate};

  const Call call(x);
  Tensor hidden = call.empty({e.T, e.E * e.r}, accumulator_of(x));
  if (e.T == 0) return hidden;
  mix.hidden = data<void>(hidden);
  run_forward(call, dtype_of(x), shrink_of(e.tokens, c.down, c.masks), mix,
              expand_of(out, c.up, nullptr, start));
  return hidden;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_backward(
    const Tensor& dy, const Tensor& x, const Tensor& lora_down, const OptionalTensor& down_bias,
    const Tensor& lora_up, const OptionalTensor& up_bias, const Tensor& weights,
    const OptionalTensor& row_map, const OptionalTensor& seed, const Tensor& hidden,
    const Tensor& dx, double scale, int64_t activation, double dropout, bool accumulate,
    bool need_dx, bool need_dparams, bool need_dweights) {
  const GatedCall c(x, lora_down, lora_up, up_bias, seed, dropout);
  const Experts& e = c.e;
  cuda::GatedBackward mix = {};
  c.fill(mix, weights, row_map, scale, activation, dropout);
  const Vectors dys = vectors_like(dy, x, e.N, "dy");
  mix.hidden = read_saved(hidden, x, {e.T, e.E * e.r}, "hidden");
  std::optional<Outputs> out;
  if (need_dx) out = outputs_like(dx, x, e.K, "dx");

  const Call call(x);
  const moelora::DType dtype = dtype_of(x);
  Tensor dlora_down = gradient_like(call, lora_down, need_dparams);
  Tensor dlora_up = gradient_like(call, lora_up, need_dparams);
  Tensor ddown_bias = gradient_like(call, down_bias, x, need_dparams);
  Tensor dup_bias = gradient_like(call, up_bias, x, need_dparams);
  Tensor dweights = call.empty({need_dweights ? weights.size(0) : 0, e.E}, weights.scalar_type());
  if (e.T == 0) {
    set_zero(call, {&dlora_down, &ddown_bias, &dlora_up, &dup_bias, &dweights});
    return {dlora_down, ddown_bias, dlora_up, dup_bias, dweights};
  }

  const bool shared = need_dweights && is_shared(mix.weights);
  cuda::Outer outer = {};
  outer.T = e.T;
  if (need_dparams) {
    outer.products[0] = outer_of(dys, c.up);
    outer.products[1] = outer_of(e.tokens, c.down, c.masks);
    if (down_bias)
      outer.sums[0] = sums_of_all(e.T, c.down.R, pitch(c.down), false, 1 / mix.inv_keep);
  }
  if (shared) outer.sums[1] = sums_of(mix.weights);
  set_outputs(outer, accumulator_of(x),
              {&dlora_up, &dup_bias, &dlora_down, &ddown_bias, shared ? &dweights : nullptr});

  // Only the weights' gradient asks for <dy, up bias>.
  cuda::Shrink shrink = shrink_of(dys, need_dweights ? c.up : rows_of(e.up, e.r));
  Workspace workspace;
  const cuda::ShrinkPlan plan = plan_mix(workspace, dtype, shrink, mix);
  const int64_t size = element_size(x);
  workspace.reserve(need_dx || need_dparams ? e.T * pitch(c.down) : 0, size, &mix.dhidden);
  workspace.reserve(need_dparams ? e.T * pitch(c.up) : 0, size, &mix.mixed);
  workspace.reserve(shared ? e.T * e.E : 0, accumulator_size(x), &mix.dweights);
  plan_outer(workspace, dtype, outer);
  workspace.allocate(call);
  if (need_dweights && !shared) mix.dweights = data<void>(dweights);
  cuda::launch_mix(dtype, shrink, mix, plan, call.stream());

  if (out)
    cuda::launch_expand(dtype, expand_of(*out, c.down, mix.dhidden, {nullptr, accumulate}, c.masks),
                        call.stream());
  outer.products[0].h = mix.mixed;
  outer.products[1].h = mix.dhidden;
  outer.sums[0].values = mix.dhidden;
  outer.sums[1].values = mix.dweights;
  cuda::launch_outer(dtype, outer, call.stream());
  return {dlora_down, ddown_bias, dlora_up, dup_bias, dweights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moelora_ops_cuda, MOELORA_CUDA_KEY, m) {
  m.impl("gated_forward", TORCH_BOX(&gated_forward));
  m.impl("gated_backward", TORCH_BOX(&gated_backward));
}
