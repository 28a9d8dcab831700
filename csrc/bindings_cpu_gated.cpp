// The gated mix on CPU tensors: experts with given weights.

#include "bindings_dense.h"

namespace {

using namespace moelora::tensors;

// What both directions share.
struct GatedCall {
  Experts e;
  Blocks up;  // lora_up, and the biases behind it
  std::optional<Dropout> dropout;
  moelora::Gated mix{};

  GatedCall(const Tensor& x, const Tensor& lora_down, const Tensor& lora_up,
            const OptionalTensor& up_bias, const Tensor& weights, const OptionalTensor& row_map,
            const OptionalTensor& seed, double scale, int64_t activation, double probability)
      : e(experts_of(x, lora_down, lora_up)), up{e.up}, dropout(make_dropout(seed, probability)) {
    STD_TORCH_CHECK(0 <= activation && activation < moelora::kActivations,
                    "activation: is no activation");
    STD_TORCH_CHECK(weights.dim() == 2, "weights: wanted 2 dimensions");
    mix.E = static_cast<int>(e.E), mix.r = static_cast<int>(e.r);
    mix.activation = static_cast<moelora::Activation>(activation);
    mix.scale = scale;
    mix.weights = read_wide(weights, x, {weights.size(0), e.E}, "weights");
    mix.row = checked_row_map(row_map, weights.size(0), e.T);
    if (up_bias) up.second = {read_like(up_bias, x, {e.E, e.N}, "up_bias"), e.E, e.N};
    mix.up_bias = up_bias.has_value();
    mix.dhidden_scale = dropout ? dropout->inv_keep : 1;
  }
  const Dropout* masks() const { return dropout ? &*dropout : nullptr; }
};

Tensor gated_forward(const Tensor& x, const Tensor& lora_down, const OptionalTensor& down_bias,
                     const Tensor& lora_up, const OptionalTensor& up_bias, const Tensor& weights,
                     const OptionalTensor& row_map, const OptionalTensor& bias,
                     const OptionalTensor& seed, const Tensor& y, double scale, int64_t activation,
                     double dropout, bool accumulate) {
  GatedCall c(x, lora_down, lora_up, up_bias, weights, row_map, seed, scale, activation, dropout);
  const Experts& e = c.e;
  Tensor hidden = empty_wide({e.T, e.E * e.r}, x);
  Tensor workspace = empty_wide({e.T * c.mix.mixed_columns() + e.E * e.r}, x);
  c.mix.hidden = data<void>(hidden);
  c.mix.mixed = data<void>(workspace);
  if (down_bias) {
    const void* from = read_like(down_bias, x, {e.E, e.r}, "down_bias");
    with_element(dtype_of(x), [&](auto element) {
      using T = decltype(element);
      auto* to = data<moelora::acc_t<T>>(workspace) + e.T * c.mix.mixed_columns();
      for (int64_t j = 0; j < e.E * e.r; ++j)
        to[j] = moelora::to_acc(static_cast<const T*>(from)[j]);
      c.mix.down_bias = to;
    });
  }
  const Outputs out = outputs_like(y, x, e.N, "y");
  const Start start = {read_like(bias, x, {e.N}, "bias"), accumulate};
  run_forward(x, &DenseKernels::gated, c.mix,
              {shrink_of(e.tokens, {e.down}, c.mix.hidden, c.masks())},
              {expand_of(out, c.up, c.mix.mixed, start)});
  return hidden;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_backward(
    const Tensor& dy, const Tensor& x, const Tensor& lora_down, const OptionalTensor& down_bias,
    const Tensor& lora_up, const OptionalTensor& up_bias, const Tensor& weights,
    const OptionalTensor& row_map, const OptionalTensor& seed, const Tensor& hidden,
    const Tensor& dx, double scale, int64_t activation, double dropout, bool accumulate,
    bool need_dx, bool need_dparams, bool need_dweights) {
  GatedCall c(x, lora_down, lora_up, up_bias, weights, row_map, seed, scale, activation, dropout);
  const Experts& e = c.e;
  const Vectors dys = vectors_like(dy, x, e.N, "dy");
  c.mix.hidden = read_saved(hidden, x, {e.T, e.E * e.r}, "hidden");
  // dmixed, overwritten by mixed; then dhidden.
  Tensor mixed = empty_wide({e.T, c.mix.mixed_columns()}, x);
  Tensor dhidden = empty_wide({e.T, e.E * e.r}, x);
  Tensor shares = empty_wide({need_dweights ? e.T : 0, e.E}, x);
  c.mix.dmixed = data<void>(mixed);
  c.mix.dhidden = data<void>(dhidden);
  if (need_dweights) c.mix.dweights = data<void>(shares);
  if (need_dparams) c.mix.mixed = data<void>(mixed);

  Tensor dlora_down = gradient_like(lora_down, need_dparams);
  Tensor dlora_up = gradient_like(lora_up, need_dparams);
  Tensor ddown_bias = gradient_like(down_bias, x, need_dparams);
  Tensor dup_bias = gradient_like(up_bias, x, need_dparams);
  std::vector<DenseExpand> expands;
  if (need_dx)
    expands.push_back(expand_of(outputs_like(dx, x, e.K, "dx"), {e.down}, c.mix.dhidden,
                                {nullptr, accumulate}, c.masks()));
  std::vector<DenseOuter> outers;
  if (need_dparams) {
    const Blocks dup = {gradient_of(c.up.first, dlora_up), gradient_of(c.up.second, dup_bias)};
    outers = {outer_of(dys, dup, c.mix.mixed),
              outer_of(e.tokens, {gradient_of(e.down, dlora_down)}, c.mix.dhidden, c.masks())};
  }
  run_backward(x, &DenseKernels::gated, c.mix, {shrink_of(dys, c.up, data<void>(mixed))}, expands,
               outers);

  if (need_dparams && down_bias) {
    const std::vector<double> sums = column_sums(dhidden);
    with_element(dtype_of(x), [&](auto element) {
      using T = decltype(element);
      for (size_t j = 0; j < sums.size(); ++j)
        data<T>(ddown_bias)[j] =
            moelora::from_acc<T>(static_cast<moelora::acc_t<T>>(sums[j] / c.mix.dhidden_scale));
    });
  }
  Tensor dweights = need_dweights ? sum_rows(shares, c.mix.row, weights.size(0)) : shares;
  return {dlora_down, ddown_bias, dlora_up, dup_bias, dweights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moelora_ops, CPU, m) {
  m.impl("gated_forward", TORCH_BOX(&gated_forward));
  m.impl("gated_backward", TORCH_BOX(&gated_backward));
}
