// The output_gate operators of moelora_ops/ops.py on CUDA tensors: MoLE's gate on the experts'
// outputs, in rank space.

#include "bindings_cuda_dense.h"
#include "bindings_output_gate.h"

namespace {

using namespace moelora::tensors;
namespace cuda = moelora::cuda;

std::tuple<Tensor, Tensor> output_gate_forward(
    const Tensor& x, const Tensor& lora_down, const Tensor& lora_up, const Tensor& projection,
    const Tensor& factors, const OptionalTensor& means, const Tensor& scales, const Tensor& tau,
    const OptionalTensor& mask, const OptionalTensor& bias, const Tensor& y, int64_t normalization,
    bool mask_input, bool accumulate) {
  const Experts e = experts_of(x, lora_down, lora_up);
  cuda::OutputGateForward mix = {};
  mix.tau =
      read_gate(mix, e, projection, factors, means, scales, tau, mask, normalization, mask_input);
  const Outputs out = outputs_like(y, x, e.N, "y");
  const Start start = {read_like(bias, x, {e.N}, "bias"), accumulate};

  const Call call(x);
  Tensor hidden = call.empty({e.T, e.E * e.r}, accumulator_of(x));
  Tensor gates = call.empty({e.T, e.E}, accumulator_of(x));
  if (e.T == 0) return {hidden, gates};
  mix.hidden = data<void>(hidden);
  mix.gates = data<void>(gates);
  run_forward(call, dtype_of(x), shrink_of(e.tokens, rows_of(e.down, e.r)), mix,
              expand_of(out, rows_of(e.up, e.r), nullptr, start));
  return {hidden, gates};
}

std::tuple<Tensor, Tensor, Tensor> output_gate_backward(
    const Tensor& dy, const OptionalTensor& dgates, const Tensor& lora_down, const Tensor& lora_up,
    const Tensor& projection, const Tensor& factors, const OptionalTensor& means,
    const Tensor& scales, const Tensor& tau, const OptionalTensor& mask, const Tensor& hidden,
    const Tensor& gates, const Tensor& dx, int64_t normalization, bool mask_input, bool accumulate,
    bool need_dx) {
  // dx stands in for x, which frozen experts do not need: it has its shape even if it is not
  // wanted.
  const Experts e = experts_of(dx, lora_down, lora_up, "dx");
  cuda::OutputGateBackward mix = {};
  mix.tau =
      read_gate(mix, e, projection, factors, means, scales, tau, mask, normalization, mask_input);
  const Vectors dys = vectors_like(dy, dx, e.N, "dy");
  mix.hidden = read_saved(hidden, dx, {e.T, e.E * e.r}, "hidden");
  mix.gates = read_saved(gates, dx, {e.T, e.E}, "gates");
  mix.dgates = read_wide(dgates, dx, {e.T, e.E}, "dgates");

  const Call call(dx);
  const moelora::DType dtype = dtype_of(dx);
  Tensor normalized = call.empty({e.T, mix.input_columns()}, accumulator_of(dx));
  Tensor dlogits = call.empty({e.T, e.E}, accumulator_of(dx));
  Tensor dtau = call.empty({1}, accumulator_of(dx));
  if (e.T == 0) {
    set_zero(call, {&dtau});
    return {normalized, dlogits, dtau};
  }
  mix.normalized = data<void>(normalized);
  mix.dlogits = data<void>(dlogits);
  cuda::Outer outer = {};
  outer.T = e.T;
  outer.sums[0] = sums_of_all(e.T, 1, 1, true, 1);
  set_outputs(outer, accumulator_of(dx), {&dtau});

  const cuda::Rows down = rows_of(e.down, e.r);
  cuda::Shrink shrink = shrink_of(dys, rows_of(e.up, e.r));
  Workspace workspace;
  const cuda::ShrinkPlan plan = plan_mix(workspace, dtype, shrink, mix);
  workspace.reserve(e.T, element_size(dtau), &mix.dtau);
  workspace.reserve(need_dx ? e.T * pitch(down) : 0, element_size(dx), &mix.dhidden);
  plan_outer(workspace, dtype, outer);
  workspace.allocate(call);
  cuda::launch_mix(dtype, shrink, mix, plan, call.stream());
  if (need_dx)
    cuda::launch_expand(dtype,
                        expand_of(outputs_of(dx, "dx"), down, mix.dhidden, {nullptr, accumulate}),
                        call.stream());
  outer.sums[0].values = mix.dtau;
  cuda::launch_outer(dtype, outer, call.stream());
  return {normalized, dlogits, dtau};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moelora_ops_cuda, MOELORA_CUDA_KEY, m) {
  m.impl("output_gate_forward", TORCH_BOX(&output_gate_forward));
  m.impl("output_gate_backward", TORCH_BOX(&output_gate_backward));
}
