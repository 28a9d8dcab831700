// The grid mix on CPU tensors: MoR1E's experts, one down row times one up row each.

#include "bindings_dense.h"
#include "bindings_grid.h"

namespace {

using namespace moelora::tensors;

double scalar_of(const Tensor& t) {
  double value = 0;
  with_element(dtype_of(t), [&](auto element) {
    value = moelora::to_acc(*static_cast<const decltype(element)*>(t.const_data_ptr()));
  });
  return value;
}

// What both directions share.
struct GridCall : GridTensors {
  double omega, beta;
  moelora::Grid mix{};

  GridCall(const Tensor& x, const Tensor& lora_down, const Tensor& lora_up, const Tensor& routers,
           const Tensor& raw_omega, const Tensor& raw_beta, const OptionalTensor& intuition,
           const OptionalTensor& row_map, double token_scale, double task_scale, bool diagonal)
      : GridTensors(x, lora_down, lora_up, routers, raw_omega, raw_beta, diagonal),
        omega(scalar_of(raw_omega)),
        beta(scalar_of(raw_beta)) {
    mix.shape = shape;
    const auto scales = moelora::grid_scales(omega, beta, token_scale, task_scale);
    mix.token_scale = scales.token, mix.task_scale = scales.task, mix.output_scale = scales.output;
    if (intuition) {
      STD_TORCH_CHECK(intuition->dim() == 2, "intuition: wanted 2 dimensions");
      mix.external = read_wide(intuition, x, {intuition->size(0), gates}, "intuition");
    }
    mix.row = intuition ? checked_row_map(row_map, intuition->size(0), T) : RowMap{nullptr, 1};
  }
};

Tensor grid_forward(const Tensor& x, const Tensor& lora_down, const Tensor& lora_up,
                    const Tensor& router, const Tensor& omega, const Tensor& beta,
                    const OptionalTensor& intuition, const OptionalTensor& row_map,
                    const OptionalTensor& bias, const Tensor& y, double token_scale,
                    double task_scale, bool diagonal, bool accumulate) {
  GridCall c(x, lora_down, lora_up, router, omega, beta, intuition, row_map, token_scale,
             task_scale, diagonal);
  Tensor hidden = empty_wide({c.T, c.mix.hidden_columns()}, x);
  Tensor mixed = empty_wide({c.T, c.r2}, x);
  c.mix.hidden = data<void>(hidden);
  c.mix.mixed = data<void>(mixed);
  const Outputs out = outputs_like(y, x, c.N, "y");
  const Start start = {read_like(bias, x, {c.N}, "bias"), accumulate};
  run_forward(x, &DenseKernels::grid, c.mix,
              {shrink_of(c.tokens, {c.down, c.router}, c.mix.hidden)},
              {expand_of(out, {c.up}, c.mix.mixed, start)});
  return hidden;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> grid_backward(
    const Tensor& dy, const Tensor& x, const Tensor& lora_down, const Tensor& lora_up,
    const Tensor& router, const Tensor& omega, const Tensor& beta, const OptionalTensor& intuition,
    const OptionalTensor& row_map, const Tensor& hidden, const Tensor& dx, double token_scale,
    double task_scale, bool diagonal, bool accumulate, bool need_dx, bool need_dparams,
    bool need_dintuition) {
  GridCall c(x, lora_down, lora_up, router, omega, beta, intuition, row_map, token_scale,
             task_scale, diagonal);
  need_dintuition = need_dintuition && intuition;
  const Vectors dys = vectors_like(dy, x, c.N, "dy");
  c.mix.hidden = read_saved(hidden, x, {c.T, c.mix.hidden_columns()}, "hidden");
  Tensor mixed = empty_wide({c.T, c.r2}, x);
  Tensor dhidden = empty_wide({c.T, c.mix.hidden_columns()}, x);
  Tensor dscales = empty_wide({c.T, 3}, x);
  Tensor shares = empty_wide({need_dintuition ? c.T : 0, c.gates}, x);
  c.mix.dmixed = c.mix.mixed = data<void>(mixed);
  c.mix.dhidden = data<void>(dhidden);
  c.mix.dscales = data<void>(dscales);
  if (need_dintuition) c.mix.dexternal = data<void>(shares);

  Tensor dlora_down = gradient_like(lora_down, need_dparams);
  Tensor dlora_up = gradient_like(lora_up, need_dparams);
  Tensor drouter = gradient_like(router, need_dparams);
  Tensor domega = gradient_like(omega, need_dparams), dbeta = gradient_like(beta, need_dparams);
  std::vector<DenseExpand> expands;
  if (need_dx)
    expands.push_back(expand_of(outputs_like(dx, x, c.K, "dx"), {c.down, c.router}, c.mix.dhidden,
                                {nullptr, accumulate}));
  std::vector<DenseOuter> outers;
  if (need_dparams) {
    const Blocks ddown = {gradient_of(c.down, dlora_down), gradient_of(c.router, drouter)};
    outers = {outer_of(dys, {gradient_of(c.up, dlora_up)}, c.mix.mixed),
              outer_of(c.tokens, ddown, c.mix.dhidden)};
  }
  run_backward(x, &DenseKernels::grid, c.mix, {shrink_of(dys, {c.up}, c.mix.mixed)}, expands,
               outers);

  if (need_dparams) {
    const std::vector<double> sums = column_sums(dscales);  // of a, b, s
    with_element(dtype_of(x), [&](auto element) {
      using T = decltype(element);
      using A = moelora::acc_t<T>;
      const moelora::GridScales<double> d = {sums[0], sums[1], sums[2]};
      *data<T>(domega) = moelora::from_acc<T>(
          static_cast<A>(moelora::grid_domega(c.omega, token_scale, task_scale, d)));
      *data<T>(dbeta) = moelora::from_acc<T>(static_cast<A>(moelora::grid_dbeta(c.beta, d)));
    });
  }
  Tensor dintuition = need_dintuition ? sum_rows(shares, c.mix.row, intuition->size(0)) : shares;
  return {dlora_down, dlora_up, drouter, domega, dbeta, dintuition};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moelora_ops, CPU, m) {
  m.impl("grid_forward", TORCH_BOX(&grid_forward));
  m.impl("grid_backward", TORCH_BOX(&grid_backward));
}
