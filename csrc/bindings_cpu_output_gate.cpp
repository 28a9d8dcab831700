// The output-gated mix on CPU tensors: MoLE's gate on the experts' outputs, in rank space.

#include "bindings_dense.h"
#include "bindings_output_gate.h"

namespace {

using namespace moelora::tensors;

// `count` matrices [rows, columns] in an accumulator's type, transposed.
Tensor transposed(const Tensor& matrices, int64_t count, int64_t rows, int64_t columns) {
  Tensor out = empty({count, columns, rows}, matrices.scalar_type());
  with_accumulator(matrices, [&](auto element) {
    using A = decltype(element);
    const A* from = static_cast<const A*>(matrices.const_data_ptr());
    A* to = data<A>(out);
    for (int64_t m = 0; m < count; ++m, from += rows * columns, to += rows * columns)
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) to[j * rows + i] = from[i * columns + j];
  });
  return out;
}

// What both directions share.
struct OutputGateCall {
  Experts e;
  Tensor projection_t, factors_t;
  moelora::OutputGating mix{};

  OutputGateCall(const Tensor& x, const Tensor& lora_down, const Tensor& lora_up,
                 const Tensor& projection, const Tensor& factors, const OptionalTensor& means,
                 const Tensor& scales, const Tensor& tau, const OptionalTensor& mask,
                 int64_t normalization, bool mask_input)
      : e(experts_of(x, lora_down, lora_up)), projection_t(projection), factors_t(factors) {
    const void* t =
        read_gate(mix, e, projection, factors, means, scales, tau, mask, normalization, mask_input);
    with_accumulator(tau,
                     [&](auto element) { mix.tau = *static_cast<const decltype(element)*>(t); });
    projection_t = transposed(projection, 1, mix.input_columns(), e.E);
    factors_t = transposed(factors, e.E, e.r, e.r);
    mix.projection_t = read(projection_t);
    mix.factors_t = read(factors_t);
  }
};

std::tuple<Tensor, Tensor> output_gate_forward(
    const Tensor& x, const Tensor& lora_down, const Tensor& lora_up, const Tensor& projection,
    const Tensor& factors, const OptionalTensor& means, const Tensor& scales, const Tensor& tau,
    const OptionalTensor& mask, const OptionalTensor& bias, const Tensor& y, int64_t normalization,
    bool mask_input, bool accumulate) {
  OutputGateCall c(x, lora_down, lora_up, projection, factors, means, scales, tau, mask,
                   normalization, mask_input);
  const Experts& e = c.e;
  Tensor hidden = empty_wide({e.T, e.E * e.r}, x), mixed = empty_wide({e.T, e.E * e.r}, x);
  Tensor gates = empty_wide({e.T, e.E}, x);
  c.mix.hidden = data<void>(hidden);
  c.mix.mixed = data<void>(mixed);
  c.mix.gates = data<void>(gates);
  const Outputs out = outputs_like(y, x, e.N, "y");
  const Start start = {read_like(bias, x, {e.N}, "bias"), accumulate};
  run_forward(x, &DenseKernels::output_gate, c.mix, {shrink_of(e.tokens, {e.down}, c.mix.hidden)},
              {expand_of(out, {e.up}, c.mix.mixed, start)});
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
  OutputGateCall c(dx, lora_down, lora_up, projection, factors, means, scales, tau, mask,
                   normalization, mask_input);
  const Experts& e = c.e;
  const Vectors dys = vectors_like(dy, dx, e.N, "dy");
  c.mix.hidden = read_saved(hidden, dx, {e.T, e.E * e.r}, "hidden");
  c.mix.gates = read_saved(gates, dx, {e.T, e.E}, "gates");
  c.mix.dgates = read_wide(dgates, dx, {e.T, e.E}, "dgates");
  Tensor dmixed = empty_wide({e.T, e.E * e.r}, dx), dhidden = empty_wide({e.T, e.E * e.r}, dx);
  Tensor normalized = empty_wide({e.T, c.mix.input_columns()}, dx);
  Tensor dlogits = empty_wide({e.T, e.E}, dx), dtaus = empty_wide({e.T, 1}, dx);
  c.mix.dmixed = data<void>(dmixed);
  c.mix.dhidden = data<void>(dhidden);
  c.mix.normalized = data<void>(normalized);
  c.mix.dlogits = data<void>(dlogits);
  c.mix.dtau = data<void>(dtaus);
  std::vector<DenseExpand> expands;
  if (need_dx)
    expands.push_back(
        expand_of(outputs_like(dx, dx, e.K, "dx"), {e.down}, c.mix.dhidden, {nullptr, accumulate}));
  run_backward(dx, &DenseKernels::output_gate, c.mix, {shrink_of(dys, {e.up}, data<void>(dmixed))},
               expands, {});
  const std::vector<double> sum = column_sums(dtaus);
  Tensor dtau = empty_wide({1}, dx);
  with_accumulator(dtau, [&](auto element) {
    using A = decltype(element);
    *data<A>(dtau) = static_cast<A>(sum[0]);
  });
  return {normalized, dlogits, dtau};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moelora_ops, CPU, m) {
  m.impl("output_gate_forward", TORCH_BOX(&output_gate_forward));
  m.impl("output_gate_backward", TORCH_BOX(&output_gate_backward));
}
