// The operators of the dense mixes on CPU tensors (schemas: moelora_ops/ops.py): three products and
// the mix between them, see cpu/kernels.h.  Arguments were validated in Python; what is checked
// here would corrupt memory.

#include <cmath>

#include "bindings_common.h"
#include "cpu/scalar.h"

namespace {

using namespace moelora::tensors;
using moelora::Averaged;
using moelora::DenseExpand;
using moelora::DenseKernels;
using moelora::DenseOuter;
using moelora::DenseShrink;
using moelora::Gated;
using moelora::Grid;
using moelora::kTokenUnit;
using moelora::MixKernels;
using moelora::OutputGating;
using moelora::RowBlock;
using moelora::RowMap;
using OptionalTensor = std::optional<Tensor>;

// ---------------------------------------------------------------- running

// Rows of a product that one thread takes at least.
constexpr int64_t kRowUnit = 8;
// Elements that one thread converts at least.
constexpr int64_t kConvertUnit = 1 << 14;

// x to hidden to mixed to y; the lists hold one product per window of columns.
template <class Mix>
void run_forward(const DenseKernels& kernels, const std::vector<DenseShrink>& shrinks,
                 const MixKernels<Mix>& mix_kernels, const Mix& mix,
                 const std::vector<DenseExpand>& expands) {
  const int64_t T = shrinks[0].T;
  if (T == 0) return;
  if (T < kSmallT) {
    for (const DenseShrink& p : shrinks)
      split(p.rows(), T * p.rows() * p.C > kSerialProducts ? kRowUnit : p.rows(),
            [&](int64_t r0, int64_t r1) { kernels.shrink(p, 0, T, r0, r1); });
    mix_kernels.forward(mix, 0, T);
  } else {
    split(T, kTokenUnit, [&](int64_t t0, int64_t t1) {
      for (const DenseShrink& p : shrinks) kernels.shrink(p, t0, t1, 0, p.rows());
      mix_kernels.forward(mix, t0, t1);
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
void run_backward(const DenseKernels& kernels, const std::vector<DenseShrink>& shrinks,
                  const MixKernels<Mix>& mix_kernels, const Mix& mix,
                  const std::vector<DenseExpand>& expands, const std::vector<DenseOuter>& outers) {
  split(shrinks[0].T, kTokenUnit, [&](int64_t t0, int64_t t1) {
    for (const DenseShrink& p : shrinks) kernels.shrink(p, t0, t1, 0, p.rows());
    mix_kernels.backward(mix, t0, t1);
    for (const DenseExpand& p : expands) kernels.expand(p, t0, t1, 0, p.C);
  });
  for (const DenseOuter& p : outers)
    split(p.C, kColumnUnit, [&](int64_t c0, int64_t c1) { kernels.outer(p, c0, c1); });
}

// ---------------------------------------------------------------- checking and pointing

// Calls f with a value of the element type.
template <class F>
void with_element(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32: return f(float());
    case DType::kBFloat16: return f(moelora::BFloat16());
    case DType::kFloat16: return f(moelora::Float16());
    case DType::kFloat64: return f(double());
  }
}

// A tensor in the accumulator type of x, contiguous and of the given shape; null if absent.
const void* read_wide(const OptionalTensor& t, const Tensor& x, const std::vector<int64_t>& shape,
                      const char* name) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == accumulator_of(x), name, ": wanted the accumulator's dtype");
  STD_TORCH_CHECK(shape_of(*t) == shape, name, ": has a shape that does not fit the others");
  check_contiguous(*t, name);
  return t->const_data_ptr();
}

// A parameter in x's dtype, contiguous and of the given shape; null if absent.
const void* read_like(const OptionalTensor& t, const Tensor& x, const std::vector<int64_t>& shape,
                      const char* name) {
  if (!t) return nullptr;
  check_like(*t, x, shape, name);
  check_contiguous(*t, name);
  return t->const_data_ptr();
}

// A table [rows, columns] and which of its rows a token reads.
RowMap row_map_of(const OptionalTensor& map, int64_t rows, int64_t T) {
  if (!map) {
    STD_TORCH_CHECK(T == 0 || (rows > 0 && T % rows == 0),
                    "weights: wanted a number of rows that divides the tokens, or a row_map");
    return {nullptr, T == 0 ? 1 : T / rows};
  }
  STD_TORCH_CHECK(map->scalar_type() == ScalarType::Int && map->numel() == T,
                  "row_map: wanted one int32 per token");
  check_contiguous(*map, "row_map");
  const int32_t* index = static_cast<const int32_t*>(map->const_data_ptr());
  for (int64_t t = 0; t < T; ++t)
    STD_TORCH_CHECK(0 <= index[t] && index[t] < rows, "row_map: wanted values in [0, ", rows,
                    "), got ", index[t], " at ", t);
  return {index, 1};
}

// dweights [rows, n] from each token's share [T, n], in the order of the tokens.
Tensor sum_rows(const Tensor& per_token, const RowMap& row, int64_t rows) {
  const int64_t T = per_token.size(0), n = per_token.size(1);
  if (!row.map && row.tokens_per_row == 1 && rows == T) return per_token;
  Tensor out = empty({rows, n}, per_token.scalar_type());
  with_element(dtype_of(per_token), [&](auto element) {
    using A = decltype(element);
    if constexpr (std::is_floating_point_v<A>) {
      std::vector<double> sums(rows * n);  // long sums of few numbers
      const A* share = static_cast<const A*>(per_token.const_data_ptr());
      for (int64_t t = 0; t < T; ++t)
        for (int64_t j = 0; j < n; ++j) sums[row(t) * n + j] += share[t * n + j];
      std::copy(sums.begin(), sums.end(), data<A>(out));
    }
  });
  return out;
}

// The experts of one call: x [T, K], lora_down [E, r, K], lora_up [E, r, N].
struct Experts {
  int64_t T, K, N, E, r;
  Rows x;
};
Experts experts_of(const Tensor& x, const Tensor& lora_down, const Tensor& lora_up) {
  STD_TORCH_CHECK(lora_down.dim() == 3 && lora_up.dim() == 3,
                  "lora_down, lora_up: wanted 3 dimensions");
  Experts e;
  e.x = rows_of(x, "x");
  e.T = e.x.count;
  e.E = lora_down.size(0), e.r = lora_down.size(1), e.K = lora_down.size(2), e.N = lora_up.size(2);
  STD_TORCH_CHECK(x.size(x.dim() - 1) == e.K, "x: wanted last dimension ", e.K);
  check_like(lora_down, x, {e.E, e.r, e.K}, "lora_down");
  check_like(lora_up, x, {e.E, e.r, e.N}, "lora_up");
  check_contiguous(lora_down, "lora_down");
  check_contiguous(lora_up, "lora_up");
  return e;
}

// y (or dx) [..., columns], written in place.
Rows check_output(const Tensor& y, const Tensor& x, int64_t columns, const char* name) {
  std::vector<int64_t> shape = shape_of(x);
  shape.back() = columns;
  check_like(y, x, shape, name);
  return rows_of(y, name);
}

DenseShrink shrink_of(const Rows& rows, const void* v, int64_t columns, RowBlock first,
                      RowBlock second, void* h, const Dropout* dropout = nullptr) {
  DenseShrink p{};
  p.T = rows.count, p.C = columns;
  p.blocks[0] = first, p.blocks[1] = second;
  p.h = h, p.ldh = first.count + second.count;
  p.dropout = dropout;
  p.v = v, p.ldv = rows.stride;
  return p;
}
DenseExpand expand_of(const Rows& rows, void* y, int64_t columns, RowBlock first, RowBlock second,
                      void* h, const void* bias, bool accumulate,
                      const Dropout* dropout = nullptr) {
  DenseExpand p{};
  p.T = rows.count, p.C = columns;
  p.blocks[0] = first, p.blocks[1] = second;
  p.h = h, p.ldh = first.count + second.count;
  p.dropout = dropout;
  p.y = y, p.ldy = rows.stride;
  p.bias = bias, p.accumulate = accumulate;
  return p;
}
DenseOuter outer_of(const DenseShrink& s, RowBlock first, RowBlock second, void* h) {
  DenseOuter p{};
  p.T = s.T, p.C = s.C;
  p.blocks[0] = first, p.blocks[1] = second;
  p.h = h, p.ldh = s.ldh;
  p.dropout = s.dropout;
  p.v = s.v, p.ldv = s.ldv;
  return p;
}

// An uninitialised tensor like `t`, or an empty one if it is not wanted.
Tensor gradient_like(const Tensor& t, bool wanted) {
  return empty(wanted ? shape_of(t) : std::vector<int64_t>{0}, t.scalar_type());
}
Tensor gradient_like(const OptionalTensor& t, const Tensor& x, bool wanted) {
  return empty(t && wanted ? shape_of(*t) : std::vector<int64_t>{0}, x.scalar_type());
}

// ---------------------------------------------------------------- gated

// What both directions of the gated mix share.
struct GatedCall {
  Experts e;
  Gated mix{};
  std::optional<Dropout> masks;
  RowBlock down, up, up_bias{};
};
GatedCall gated_call(const Tensor& x, const Tensor& lora_down, const Tensor& lora_up,
                     const OptionalTensor& up_bias, const Tensor& weights,
                     const OptionalTensor& row_map, const OptionalTensor& seed, double scale,
                     int64_t activation, double dropout) {
  GatedCall c;
  c.e = experts_of(x, lora_down, lora_up);
  const Experts& e = c.e;
  STD_TORCH_CHECK(0 <= activation && activation < moelora::kActivations,
                  "activation: is no activation");
  STD_TORCH_CHECK(weights.dim() == 2, "weights: wanted 2 dimensions");
  c.mix.E = static_cast<int>(e.E), c.mix.r = static_cast<int>(e.r);
  c.mix.activation = static_cast<moelora::Activation>(activation);
  c.mix.scale = scale;
  c.mix.weights = read_wide(weights, x, {weights.size(0), e.E}, "weights");
  c.mix.row = row_map_of(row_map, weights.size(0), e.T);
  c.down = {read(lora_down), e.E * e.r, e.K};
  c.up = {read(lora_up), e.E * e.r, e.N};
  if (up_bias) c.up_bias = {read_like(up_bias, x, {e.E, e.N}, "up_bias"), e.E, e.N};
  c.mix.up_bias = up_bias.has_value();
  c.masks = make_dropout(seed, dropout);
  c.mix.dhidden_scale = c.masks ? c.masks->inv_keep : 1;
  return c;
}

Tensor gated_forward(const Tensor& x, const Tensor& lora_down, const OptionalTensor& down_bias,
                     const Tensor& lora_up, const OptionalTensor& up_bias, const Tensor& weights,
                     const OptionalTensor& row_map, const OptionalTensor& bias,
                     const OptionalTensor& seed, const Tensor& y, double scale, int64_t activation,
                     double dropout, bool accumulate) {
  GatedCall c = gated_call(x, lora_down, lora_up, up_bias, weights, row_map, seed, scale,
                           activation, dropout);
  const Experts& e = c.e;
  const Dropout* masks = c.masks ? &*c.masks : nullptr;
  const ScalarType wide = accumulator_of(x);
  Tensor hidden = empty({e.T, e.E * e.r}, wide);
  Tensor workspace = empty({e.T * c.mix.mixed_columns() + e.E * e.r}, wide);
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
  const Rows out = check_output(y, x, e.N, "y");
  const moelora::Kernels& kernels = moelora::kernels(dtype_of(x));
  run_forward(kernels.dense, {shrink_of(e.x, read(x), e.K, c.down, {}, c.mix.hidden, masks)},
              kernels.dense.gated, c.mix,
              {expand_of(out, data<void>(y), e.N, c.up, c.up_bias, c.mix.mixed,
                         read_like(bias, x, {e.N}, "bias"), accumulate)});
  return hidden;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_backward(
    const Tensor& dy, const Tensor& x, const Tensor& lora_down, const OptionalTensor& down_bias,
    const Tensor& lora_up, const OptionalTensor& up_bias, const Tensor& weights,
    const OptionalTensor& row_map, const OptionalTensor& seed, const Tensor& hidden,
    const Tensor& dx, double scale, int64_t activation, double dropout, bool accumulate,
    bool need_dx, bool need_dparams, bool need_dweights) {
  GatedCall c = gated_call(x, lora_down, lora_up, up_bias, weights, row_map, seed, scale,
                           activation, dropout);
  const Experts& e = c.e;
  const Dropout* masks = c.masks ? &*c.masks : nullptr;
  const ScalarType wide = accumulator_of(x);
  const Rows dys = check_output(dy, x, e.N, "dy");
  c.mix.hidden = const_cast<void*>(read_wide(hidden, x, {e.T, e.E * e.r}, "hidden"));
  // dmixed, overwritten by mixed; then dhidden.
  Tensor mixed = empty({e.T, c.mix.mixed_columns()}, wide), dhidden = empty({e.T, e.E * e.r}, wide);
  Tensor shares = empty({need_dweights ? e.T : 0, e.E}, wide);
  c.mix.dmixed = data<void>(mixed);
  c.mix.dhidden = data<void>(dhidden);
  if (need_dweights) c.mix.dweights = data<void>(shares);
  if (need_dparams) c.mix.mixed = data<void>(mixed);

  Tensor dlora_down = gradient_like(lora_down, need_dparams);
  Tensor dlora_up = gradient_like(lora_up, need_dparams);
  Tensor ddown_bias = gradient_like(down_bias, x, need_dparams);
  Tensor dup_bias = gradient_like(up_bias, x, need_dparams);
  const DenseShrink of_dy = shrink_of(dys, read(dy), e.N, c.up, c.up_bias, data<void>(mixed));
  std::vector<DenseExpand> expands;
  if (need_dx)
    expands.push_back(expand_of(check_output(dx, x, e.K, "dx"), data<void>(dx), e.K, c.down, {},
                                data<void>(dhidden), nullptr, accumulate, masks));
  std::vector<DenseOuter> outers;
  if (need_dparams) {
    RowBlock dbias = c.up_bias;
    dbias.rows = read(dup_bias);
    outers.push_back(outer_of(of_dy, {read(dlora_up), c.up.count, e.N}, dbias, data<void>(mixed)));
    outers.push_back(outer_of(shrink_of(e.x, read(x), e.K, c.down, {}, nullptr, masks),
                              {read(dlora_down), c.down.count, e.K}, {}, data<void>(dhidden)));
  }
  const moelora::Kernels& kernels = moelora::kernels(dtype_of(x));
  run_backward(kernels.dense, {of_dy}, kernels.dense.gated, c.mix, expands, outers);

  if (need_dparams && down_bias)
    with_element(dtype_of(x), [&](auto element) {
      using T = decltype(element);
      using A = moelora::acc_t<T>;
      const A* share = static_cast<const A*>(dhidden.const_data_ptr());
      for (int64_t j = 0; j < e.E * e.r; ++j) {
        double sum = 0;
        for (int64_t t = 0; t < e.T; ++t) sum += share[t * e.E * e.r + j];
        data<T>(ddown_bias)[j] = moelora::from_acc<T>(static_cast<A>(sum / c.mix.dhidden_scale));
      }
    });
  Tensor dweights = need_dweights ? sum_rows(shares, c.mix.row, weights.size(0)) : shares;
  return {dlora_down, ddown_bias, dlora_up, dup_bias, dweights};
}

// ---------------------------------------------------------------- grid

// The learned scalars ω = σ(100 omega) and β = σ(100 beta), and the derivative of σ(100 ·).
double sharp_sigmoid(double v) { return 1 / (1 + std::exp(-100 * v)); }
double sharp_sigmoid_slope(double v) { return 100 * sharp_sigmoid(v) * sharp_sigmoid(-v); }

double scalar_of(const Tensor& t, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(t.numel() == 1 && t.scalar_type() == x.scalar_type(), name,
                  ": wanted one element of x's dtype");
  double value = 0;
  with_element(dtype_of(x), [&](auto element) {
    value = moelora::to_acc(*static_cast<const decltype(element)*>(t.const_data_ptr()));
  });
  return value;
}

struct GridCall {
  int64_t T, K, N, r1, r2, gates;
  Rows x;
  Grid mix{};
  RowBlock down, router, up;
  double omega, beta;
};
GridCall grid_call(const Tensor& x, const Tensor& lora_down, const Tensor& lora_up,
                   const Tensor& router, const Tensor& omega, const Tensor& beta,
                   const OptionalTensor& intuition, const OptionalTensor& row_map,
                   double token_scale, double task_scale, bool diagonal) {
  STD_TORCH_CHECK(lora_down.dim() == 2 && lora_up.dim() == 2,
                  "lora_down, lora_up: wanted 2 dimensions");
  GridCall c;
  c.x = rows_of(x, "x");
  c.T = c.x.count;
  c.r1 = lora_down.size(0), c.K = lora_down.size(1), c.r2 = lora_up.size(0), c.N = lora_up.size(1);
  STD_TORCH_CHECK(c.r1 > 0 && c.r2 > 0 && (!diagonal || c.r1 == c.r2),
                  "lora_down, lora_up: have ranks that do not fit");
  STD_TORCH_CHECK(x.size(x.dim() - 1) == c.K, "x: wanted last dimension ", c.K);
  c.mix.shape = {static_cast<int>(c.r1), static_cast<int>(c.r2), diagonal};
  c.gates = c.mix.shape.gates();
  c.down = {read_like(lora_down, x, {c.r1, c.K}, "lora_down"), c.r1, c.K};
  c.router = {read_like(router, x, {c.gates, c.K}, "router"), c.gates, c.K};
  c.up = {read_like(lora_up, x, {c.r2, c.N}, "lora_up"), c.r2, c.N};
  c.omega = scalar_of(omega, x, "omega");
  c.beta = scalar_of(beta, x, "beta");
  c.mix.token_scale = token_scale * sharp_sigmoid(c.omega);
  c.mix.task_scale = task_scale * sharp_sigmoid(-c.omega);
  c.mix.output_scale = sharp_sigmoid(c.beta);
  if (intuition) {
    STD_TORCH_CHECK(intuition->dim() == 2, "intuition: wanted 2 dimensions");
    c.mix.external = read_wide(intuition, x, {intuition->size(0), c.gates}, "intuition");
  }
  c.mix.row = intuition ? row_map_of(row_map, intuition->size(0), c.T) : RowMap{nullptr, 1};
  return c;
}

Tensor grid_forward(const Tensor& x, const Tensor& lora_down, const Tensor& lora_up,
                    const Tensor& router, const Tensor& omega, const Tensor& beta,
                    const OptionalTensor& intuition, const OptionalTensor& row_map,
                    const OptionalTensor& bias, const Tensor& y, double token_scale,
                    double task_scale, bool diagonal, bool accumulate) {
  GridCall c = grid_call(x, lora_down, lora_up, router, omega, beta, intuition, row_map,
                         token_scale, task_scale, diagonal);
  const ScalarType wide = accumulator_of(x);
  Tensor hidden = empty({c.T, c.mix.hidden_columns()}, wide), mixed = empty({c.T, c.r2}, wide);
  c.mix.hidden = data<void>(hidden);
  c.mix.mixed = data<void>(mixed);
  const Rows out = check_output(y, x, c.N, "y");
  const moelora::Kernels& kernels = moelora::kernels(dtype_of(x));
  run_forward(kernels.dense, {shrink_of(c.x, read(x), c.K, c.down, c.router, c.mix.hidden)},
              kernels.dense.grid, c.mix,
              {expand_of(out, data<void>(y), c.N, c.up, {}, c.mix.mixed,
                         read_like(bias, x, {c.N}, "bias"), accumulate)});
  return hidden;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> grid_backward(
    const Tensor& dy, const Tensor& x, const Tensor& lora_down, const Tensor& lora_up,
    const Tensor& router, const Tensor& omega, const Tensor& beta, const OptionalTensor& intuition,
    const OptionalTensor& row_map, const Tensor& hidden, const Tensor& dx, double token_scale,
    double task_scale, bool diagonal, bool accumulate, bool need_dx, bool need_dparams,
    bool need_dintuition) {
  GridCall c = grid_call(x, lora_down, lora_up, router, omega, beta, intuition, row_map,
                         token_scale, task_scale, diagonal);
  need_dintuition = need_dintuition && intuition;
  const ScalarType wide = accumulator_of(x);
  const Rows dys = check_output(dy, x, c.N, "dy");
  c.mix.hidden = const_cast<void*>(read_wide(hidden, x, {c.T, c.mix.hidden_columns()}, "hidden"));
  Tensor mixed = empty({c.T, c.r2}, wide), dhidden = empty({c.T, c.mix.hidden_columns()}, wide);
  Tensor dscales = empty({c.T, 3}, wide);
  Tensor shares = empty({need_dintuition ? c.T : 0, c.gates}, wide);
  c.mix.dmixed = c.mix.mixed = data<void>(mixed);
  c.mix.dhidden = data<void>(dhidden);
  c.mix.dscales = data<void>(dscales);
  if (need_dintuition) c.mix.dexternal = data<void>(shares);

  Tensor dlora_down = gradient_like(lora_down, need_dparams);
  Tensor dlora_up = gradient_like(lora_up, need_dparams);
  Tensor drouter = gradient_like(router, need_dparams);
  Tensor domega = gradient_like(omega, need_dparams), dbeta = gradient_like(beta, need_dparams);
  const DenseShrink of_dy = shrink_of(dys, read(dy), c.N, c.up, {}, data<void>(mixed));
  std::vector<DenseExpand> expands;
  if (need_dx)
    expands.push_back(expand_of(check_output(dx, x, c.K, "dx"), data<void>(dx), c.K, c.down,
                                c.router, data<void>(dhidden), nullptr, accumulate));
  std::vector<DenseOuter> outers;
  if (need_dparams) {
    outers.push_back(outer_of(of_dy, {read(dlora_up), c.r2, c.N}, {}, data<void>(mixed)));
    outers.push_back(outer_of(shrink_of(c.x, read(x), c.K, c.down, c.router, nullptr),
                              {read(dlora_down), c.r1, c.K}, {read(drouter), c.gates, c.K},
                              data<void>(dhidden)));
  }
  const moelora::Kernels& kernels = moelora::kernels(dtype_of(x));
  run_backward(kernels.dense, {of_dy}, kernels.dense.grid, c.mix, expands, outers);

  if (need_dparams)
    with_element(dtype_of(x), [&](auto element) {
      using T = decltype(element);
      using A = moelora::acc_t<T>;
      const A* share = static_cast<const A*>(dscales.const_data_ptr());
      double token = 0, task = 0, output = 0;
      for (int64_t t = 0; t < c.T; ++t, share += 3)
        token += share[0], task += share[1], output += share[2];
      const double slope = sharp_sigmoid_slope(c.omega);
      *data<T>(domega) =
          moelora::from_acc<T>(static_cast<A>(slope * (token_scale * token - task_scale * task)));
      *data<T>(dbeta) = moelora::from_acc<T>(static_cast<A>(sharp_sigmoid_slope(c.beta) * output));
    });
  Tensor dintuition = need_dintuition ? sum_rows(shares, c.mix.row, intuition->size(0)) : shares;
  return {dlora_down, dlora_up, drouter, domega, dbeta, dintuition};
}

// ---------------------------------------------------------------- averaged

struct AveragedCall {
  Experts e;
  Averaged mix{};
  int64_t Q;
};
AveragedCall averaged_call(const Tensor& x, const Tensor& lora_down, const Tensor& lora_up,
                           const Tensor& weights, const OptionalTensor& row_map, int64_t splits,
                           double scale) {
  AveragedCall c;
  c.e = experts_of(x, lora_down, lora_up);
  c.Q = splits;
  STD_TORCH_CHECK(splits > 0 && c.e.K % splits == 0 && c.e.N % splits == 0,
                  "splits: wanted a divisor of in_features and out_features, got ", splits);
  STD_TORCH_CHECK(weights.dim() == 2, "weights: wanted 2 dimensions");
  c.mix.pairs = static_cast<int>(splits * c.e.E), c.mix.r = static_cast<int>(c.e.r);
  c.mix.scale = scale;
  c.mix.weights = read_wide(weights, x, {weights.size(0), splits * c.e.E}, "weights");
  c.mix.row = row_map_of(row_map, weights.size(0), c.e.T);
  return c;
}

// Segment q of the features meets columns [q E r, (q + 1) E r) of hidden and mixed, and the same
// segment of every expert's rows.
struct Segments {
  int64_t Q, count, element, wide;  // count: E r; bytes of an element and of an accumulator
  Segments(const AveragedCall& c, const Tensor& x)
      : Q(c.Q),
        count(c.e.E * c.e.r),
        element(element_size(x)),
        wide(accumulator_of(x) == ScalarType::Double ? 8 : 4) {}

  RowBlock rows(const void* matrix, int64_t columns, int64_t q) const {
    return {offset(matrix, columns, q), count, columns};
  }
  template <class V>
  V* offset(V* vectors, int64_t columns, int64_t q) const {
    using Byte = std::conditional_t<std::is_const_v<V>, const char, char>;
    return reinterpret_cast<Byte*>(vectors) + q * (columns / Q) * element;
  }
  std::vector<DenseShrink> shrinks(const Rows& shape, const void* v, int64_t columns,
                                   const void* matrix, void* h) const {
    std::vector<DenseShrink> all;
    for (int64_t q = 0; q < Q; ++q) {
      all.push_back(shrink_of(shape, offset(v, columns, q), columns / Q, rows(matrix, columns, q),
                              {}, static_cast<char*>(h) + q * count * wide));
      all.back().ldh = Q * count;
    }
    return all;
  }
  std::vector<DenseExpand> expands(const Rows& shape, void* y, int64_t columns, const void* matrix,
                                   void* h, const void* bias, bool accumulate) const {
    std::vector<DenseExpand> all;
    for (int64_t q = 0; q < Q; ++q) {
      all.push_back(expand_of(shape, offset(y, columns, q), columns / Q, rows(matrix, columns, q),
                              {}, static_cast<char*>(h) + q * count * wide,
                              bias ? offset(bias, columns, q) : nullptr, accumulate));
      all.back().ldh = Q * count;
    }
    return all;
  }
};

// `t` in its accumulator's type.
Tensor widened(const Tensor& t) {
  if (accumulator_of(t) == t.scalar_type()) return t;
  Tensor out = empty(shape_of(t), accumulator_of(t));
  const DenseKernels& kernels = moelora::kernels(dtype_of(t)).dense;
  const int64_t from = element_size(t), to = element_size(out);
  split(t.numel(), kConvertUnit, [&](int64_t begin, int64_t end) {
    kernels.widen(static_cast<const char*>(t.const_data_ptr()) + begin * from, end - begin,
                  data<char>(out) + begin * to);
  });
  return out;
}
// `t` rounded from the accumulator's type to that of `like`.
Tensor rounded(const Tensor& t, const Tensor& like) {
  if (t.scalar_type() == like.scalar_type()) return t;
  Tensor out = empty(shape_of(t), like.scalar_type());
  const DenseKernels& kernels = moelora::kernels(dtype_of(like)).dense;
  const int64_t from = element_size(t), to = element_size(out);
  split(t.numel(), kConvertUnit, [&](int64_t begin, int64_t end) {
    kernels.round(static_cast<const char*>(t.const_data_ptr()) + begin * from, end - begin,
                  data<char>(out) + begin * to);
  });
  return out;
}

// Weights per sequence: the factors of each row of the table are merged first, A = Σ_e w_e A_e and
// B = s Σ_e w_e B_e, and a sequence's tokens meet r rows instead of E r.  Merging is an expand
// whose tokens are the rows of the table; its gradients are an outer product and a shrink.  All
// three in the accumulator's type, as a rounded weight would err alike for every feature.
class Merged {
 public:
  int64_t rows;
  Tensor down, up;  // [rows, r, K], [rows, r, N] in x's dtype

  Merged(const AveragedCall& call, const Tensor& like, const Tensor& lora_down,
         const Tensor& lora_up, const Tensor& weights)
      : rows(weights.size(0)),
        down(like),
        up(like),
        c(call),
        x(like),
        E(call.e.E),
        r(call.e.r),
        Q(call.Q),
        wide(accumulator_of(like) == ScalarType::Double ? 8 : 4),
        kernels(moelora::kernels(wide == 8 ? DType::kFloat64 : DType::kFloat32).dense),
        sides{{widened(lora_down), call.e.K, weights},
              {widened(lora_up), call.e.N, scaled(weights)}} {
    Tensor merged[2] = {empty({rows, r, c.e.K}, accumulator_of(x)),
                        empty({rows, r, c.e.N}, accumulator_of(x))};
    each_pair([&](int side, int64_t j, int64_t q) {
      const Side& s = sides[side];
      DenseExpand expand =
          expand_of({rows, r * s.columns}, at(merged[side], s, j, q), s.columns / Q,
                    experts(s.experts, s, j, q), {}, coefficients(s, q), nullptr, false);
      expand.ldh = Q * E;
      kernels.expand(expand, 0, rows, 0, s.columns / Q);
    });
    down = rounded(merged[0], x);
    up = rounded(merged[1], x);
  }

  // The gradients of the experts' factors and of the weights from those of the merged ones, which
  // are in the accumulator's type.
  std::tuple<Tensor, Tensor, Tensor> gradients(const Tensor& ddown, const Tensor& dup,
                                               bool need_dparams, bool need_dweights) const {
    const ScalarType type = accumulator_of(x);
    Tensor dexperts[2] = {gradient_like(sides[0].experts, need_dparams),
                          gradient_like(sides[1].experts, need_dparams)};
    Tensor dweights = empty({need_dweights ? rows : 0, Q * E}, type);
    // [side, j, q]: <merged gradient, expert e's row> of each table row.
    Tensor shares = empty({need_dweights ? 2 * r * Q * rows * E : 0}, type);
    each_pair([&](int side, int64_t j, int64_t q) {
      const Side& s = sides[side];
      const int64_t unit = (side * r + j) * Q + q;
      DenseShrink shrink =
          shrink_of({rows, r * s.columns}, at(side ? dup : ddown, s, j, q), s.columns / Q,
                    experts(s.experts, s, j, q), {}, data<char>(shares) + unit * rows * E * wide);
      if (need_dweights) kernels.shrink(shrink, 0, rows, 0, E);
      if (!need_dparams) return;
      shrink.ldh = Q * E;
      kernels.outer(outer_of(shrink, experts(dexperts[side], s, j, q), {}, coefficients(s, q)), 0,
                    s.columns / Q);
    });
    if (need_dweights) sum_shares(shares, dweights);
    return {rounded(dexperts[0], x), rounded(dexperts[1], x), dweights};
  }

  // Calls f(first token, last token, row of the table) for the part of [t0, t1) in each sequence.
  template <class F>
  void each_sequence(int64_t t0, int64_t t1, const F& f) const {
    const int64_t length = c.mix.row.tokens_per_row;
    for (int64_t a = t0; a < t1;) {
      const int64_t row = a / length, b = std::min(t1, (row + 1) * length);
      f(a, b, row);
      a = b;
    }
  }
  // The merged factors of one row, or their gradients.
  RowBlock of_row(const Tensor& merged, int64_t columns, int64_t row) const {
    return {static_cast<const char*>(merged.const_data_ptr()) +
                row * r * columns * element_size(merged),
            r, columns};
  }

 private:
  struct Side {
    Tensor experts;  // [E, r, columns], wide
    int64_t columns;
    Tensor table;  // [rows, Q E]: what they are multiplied by
  };
  const AveragedCall& c;
  const Tensor& x;
  int64_t E, r, Q, wide;
  const DenseKernels& kernels;
  Side sides[2];

  Tensor scaled(const Tensor& weights) const {
    Tensor out = empty(shape_of(weights), weights.scalar_type());
    with_element(dtype_of(weights), [&](auto element) {
      using A = decltype(element);
      if constexpr (std::is_floating_point_v<A>) {
        const A* from = static_cast<const A*>(weights.const_data_ptr());
        A* to = data<A>(out);
        for (int64_t i = 0; i < rows * Q * E; ++i) to[i] = static_cast<A>(c.mix.scale) * from[i];
      }
    });
    return out;
  }
  void sum_shares(const Tensor& shares, const Tensor& dweights) const {
    with_element(dtype_of(dweights), [&](auto element) {
      using A = decltype(element);
      if constexpr (std::is_floating_point_v<A>) {
        const A* share = data<A>(shares);
        A* out = data<A>(dweights);
        for (int64_t row = 0; row < rows; ++row)
          for (int64_t q = 0; q < Q; ++q)
            for (int64_t e = 0; e < E; ++e) {
              double down_sum = 0, up_sum = 0;
              for (int64_t j = 0; j < 2 * r; ++j)
                (j < r ? down_sum : up_sum) += share[((j * Q + q) * rows + row) * E + e];
              *out++ = static_cast<A>(down_sum + c.mix.scale * up_sum);
            }
      }
    });
  }
  // Row j, segment q of the first of some matrices [r, columns].
  void* at(const Tensor& matrices, const Side& s, int64_t j, int64_t q) const {
    return data<char>(matrices) + (j * s.columns + q * (s.columns / Q)) * wide;
  }
  RowBlock experts(const Tensor& matrices, const Side& s, int64_t j, int64_t q) const {
    return {at(matrices, s, j, q), E, r * s.columns};
  }
  // Split q of the table, whose rows hold all splits.
  void* coefficients(const Side& s, int64_t q) const { return data<char>(s.table) + q * E * wide; }
  template <class F>
  void each_pair(const F& f) const {
    split(2 * r * Q, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i < r * Q ? 0 : 1, i / Q % r, i % Q);
    });
  }
};

Tensor merged_forward(const AveragedCall& c, const Tensor& x, const Tensor& lora_down,
                      const Tensor& lora_up, const Tensor& weights, const OptionalTensor& bias,
                      const Tensor& y, bool accumulate) {
  const Experts& e = c.e;
  STD_TORCH_CHECK(!c.mix.row.map, "row_map: sequences lie one after the other if they are merged");
  Tensor hidden = empty({e.T, e.r}, accumulator_of(x));
  const Rows out = check_output(y, x, e.N, "y");
  const void* added = read_like(bias, x, {e.N}, "bias");
  if (e.T == 0) return hidden;
  const Merged m(c, x, lora_down, lora_up, weights);
  const DenseKernels& kernels = moelora::kernels(dtype_of(x)).dense;
  split(e.T, kTokenUnit, [&](int64_t t0, int64_t t1) {
    m.each_sequence(t0, t1, [&](int64_t a, int64_t b, int64_t row) {
      void* h = data<void>(hidden);
      kernels.shrink(shrink_of(e.x, read(x), e.K, m.of_row(m.down, e.K, row), {}, h), a, b, 0, e.r);
      kernels.expand(
          expand_of(out, data<void>(y), e.N, m.of_row(m.up, e.N, row), {}, h, added, accumulate), a,
          b, 0, e.N);
    });
  });
  return hidden;
}

std::tuple<Tensor, Tensor, Tensor> merged_backward(const AveragedCall& c, const Tensor& dy,
                                                   const Tensor& x, const Tensor& lora_down,
                                                   const Tensor& lora_up, const Tensor& weights,
                                                   const Tensor& hidden, const Tensor& dx,
                                                   bool accumulate, bool need_dx, bool need_dparams,
                                                   bool need_dweights) {
  const Experts& e = c.e;
  const Rows dys = check_output(dy, x, e.N, "dy");
  read_wide(hidden, x, {e.T, e.r}, "hidden");
  const Merged m(c, x, lora_down, lora_up, weights);
  Tensor dhidden = empty({e.T, e.r}, accumulator_of(x));
  const Rows dxs = need_dx ? check_output(dx, x, e.K, "dx") : Rows{e.T, e.K};
  const DenseKernels& kernels = moelora::kernels(dtype_of(x)).dense;
  const auto of_dy = [&](int64_t row) {
    return shrink_of(dys, read(dy), e.N, m.of_row(m.up, e.N, row), {}, data<void>(dhidden));
  };
  split(e.T, kTokenUnit, [&](int64_t t0, int64_t t1) {
    m.each_sequence(t0, t1, [&](int64_t a, int64_t b, int64_t row) {
      kernels.shrink(of_dy(row), a, b, 0, e.r);
      if (need_dx)
        kernels.expand(expand_of(dxs, data<void>(dx), e.K, m.of_row(m.down, e.K, row), {},
                                 data<void>(dhidden), nullptr, accumulate),
                       a, b, 0, e.K);
    });
  });
  const bool wanted = need_dparams || need_dweights;
  const auto wide_like = [&](const Tensor& t) {
    return empty(wanted ? shape_of(t) : std::vector<int64_t>{0}, accumulator_of(x));
  };
  Tensor ddown = wide_like(m.down), dup = wide_like(m.up);
  // The outer product of one sequence's coefficients and vectors.
  const auto outer_of_row = [&](DenseShrink of, const Tensor& coefficients, const Tensor& out,
                                int64_t row) {
    const int64_t first = row * c.mix.row.tokens_per_row;
    of.T = e.T ? c.mix.row.tokens_per_row : 0;
    of.v = static_cast<const char*>(of.v) + first * of.ldv * element_size(x);
    return outer_of(of, m.of_row(out, of.C, row), {},
                    data<char>(coefficients) + first * e.r * element_size(coefficients));
  };
  if (wanted) {
    split(e.N, kColumnUnit, [&](int64_t c0, int64_t c1) {
      for (int64_t row = 0; row < m.rows; ++row)
        kernels.outer_wide(outer_of_row(of_dy(row), hidden, dup, row), c0, c1);
    });
    split(e.K, kColumnUnit, [&](int64_t c0, int64_t c1) {
      for (int64_t row = 0; row < m.rows; ++row)
        kernels.outer_wide(
            outer_of_row(shrink_of(e.x, read(x), e.K, m.of_row(m.down, e.K, row), {}, nullptr),
                         dhidden, ddown, row),
            c0, c1);
    });
  }
  return m.gradients(ddown, dup, need_dparams, need_dweights);
}

Tensor averaged_forward(const Tensor& x, const Tensor& lora_down, const Tensor& lora_up,
                        const Tensor& weights, const OptionalTensor& row_map,
                        const OptionalTensor& bias, const Tensor& y, int64_t splits, double scale,
                        bool merged, bool accumulate) {
  AveragedCall c = averaged_call(x, lora_down, lora_up, weights, row_map, splits, scale);
  const Experts& e = c.e;
  const ScalarType wide = accumulator_of(x);
  if (merged) return merged_forward(c, x, lora_down, lora_up, weights, bias, y, accumulate);
  Tensor hidden = empty({e.T, c.mix.hidden_columns()}, wide);
  Tensor mixed = empty({e.T, c.mix.mixed_columns()}, wide);
  c.mix.hidden = data<void>(hidden);
  c.mix.mixed = data<void>(mixed);
  const Rows out = check_output(y, x, e.N, "y");
  const Segments segments(c, x);
  const moelora::Kernels& kernels = moelora::kernels(dtype_of(x));
  run_forward(kernels.dense, segments.shrinks(e.x, read(x), e.K, read(lora_down), c.mix.hidden),
              kernels.dense.averaged, c.mix,
              segments.expands(out, data<void>(y), e.N, read(lora_up), c.mix.mixed,
                               read_like(bias, x, {e.N}, "bias"), accumulate));
  return hidden;
}

std::tuple<Tensor, Tensor, Tensor> averaged_backward(
    const Tensor& dy, const Tensor& x, const Tensor& lora_down, const Tensor& lora_up,
    const Tensor& weights, const OptionalTensor& row_map, const Tensor& hidden, const Tensor& dx,
    int64_t splits, double scale, bool merged, bool accumulate, bool need_dx, bool need_dparams,
    bool need_dweights) {
  AveragedCall c = averaged_call(x, lora_down, lora_up, weights, row_map, splits, scale);
  if (merged)
    return merged_backward(c, dy, x, lora_down, lora_up, weights, hidden, dx, accumulate, need_dx,
                           need_dparams, need_dweights);
  const Experts& e = c.e;
  const ScalarType wide = accumulator_of(x);
  const Rows dys = check_output(dy, x, e.N, "dy");
  c.mix.hidden = const_cast<void*>(read_wide(hidden, x, {e.T, c.mix.hidden_columns()}, "hidden"));
  Tensor mixed = empty({e.T, c.mix.mixed_columns()}, wide);
  Tensor dhidden = empty({e.T, c.mix.hidden_columns()}, wide);
  Tensor shares = empty({need_dweights ? e.T : 0, c.mix.pairs}, wide);
  c.mix.dmixed = data<void>(mixed);
  c.mix.dhidden = data<void>(dhidden);
  if (need_dweights) c.mix.dweights = data<void>(shares);
  if (need_dparams) c.mix.mixed = data<void>(mixed);

  Tensor dlora_down = gradient_like(lora_down, need_dparams);
  Tensor dlora_up = gradient_like(lora_up, need_dparams);
  const Segments segments(c, x);
  const auto of_dy = segments.shrinks(dys, read(dy), e.N, read(lora_up), data<void>(mixed));
  std::vector<DenseExpand> expands;
  if (need_dx)
    expands = segments.expands(check_output(dx, x, e.K, "dx"), data<void>(dx), e.K, read(lora_down),
                               data<void>(dhidden), nullptr, accumulate);
  std::vector<DenseOuter> outers;
  if (need_dparams) {
    const auto of_x = segments.shrinks(e.x, read(x), e.K, read(lora_down), data<void>(dhidden));
    for (int64_t q = 0; q < c.Q; ++q) {
      outers.push_back(outer_of(of_dy[q], segments.rows(read(dlora_up), e.N, q), {}, of_dy[q].h));
      outers.push_back(outer_of(of_x[q], segments.rows(read(dlora_down), e.K, q), {}, of_x[q].h));
    }
  }
  const moelora::Kernels& kernels = moelora::kernels(dtype_of(x));
  run_backward(kernels.dense, of_dy, kernels.dense.averaged, c.mix, expands, outers);
  Tensor dweights = need_dweights ? sum_rows(shares, c.mix.row, weights.size(0)) : shares;
  return {dlora_down, dlora_up, dweights};
}

// ---------------------------------------------------------------- output gate

// `count` matrices [rows, columns] transposed.
Tensor transposed(const Tensor& matrices, int64_t count, int64_t rows, int64_t columns) {
  Tensor out = empty({count, columns, rows}, matrices.scalar_type());
  with_element(dtype_of(matrices), [&](auto element) {
    using T = decltype(element);
    const T* from = static_cast<const T*>(matrices.const_data_ptr());
    T* to = data<T>(out);
    for (int64_t m = 0; m < count; ++m, from += rows * columns, to += rows * columns)
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) to[j * rows + i] = from[i * columns + j];
  });
  return out;
}

struct OutputGateCall {
  Experts e;
  Tensor projection_t, factors_t;
  OutputGating mix{};
  RowBlock down, up;
};
OutputGateCall output_gate_call(const Tensor& x, const Tensor& lora_down, const Tensor& lora_up,
                                const Tensor& projection, const Tensor& factors,
                                const OptionalTensor& means, const Tensor& scales,
                                const Tensor& tau, const OptionalTensor& mask,
                                int64_t normalization, bool mask_input) {
  OutputGateCall c{experts_of(x, lora_down, lora_up), projection, factors};
  const Experts& e = c.e;
  STD_TORCH_CHECK(0 <= normalization && normalization < moelora::kNormalizations,
                  "normalization: is no normalization");
  c.mix.E = static_cast<int>(e.E), c.mix.r = static_cast<int>(e.r);
  c.mix.normalization = static_cast<moelora::Normalization>(normalization);
  c.mix.width = static_cast<double>(e.N);
  c.mix.mask_input = mask_input;
  c.mix.projection = read_wide(projection, x, {c.mix.input_columns(), e.E}, "projection");
  c.mix.factors = read_wide(factors, x, {e.E, e.r, e.r}, "factors");
  c.projection_t = transposed(projection, 1, c.mix.input_columns(), e.E);
  c.factors_t = transposed(factors, e.E, e.r, e.r);
  c.mix.projection_t = read(c.projection_t);
  c.mix.factors_t = read(c.factors_t);
  STD_TORCH_CHECK(means || c.mix.normalization != moelora::Normalization::kLayerNorm,
                  "means: layernorm needs them");
  c.mix.means = read_wide(means, x, {e.E * e.r}, "means");
  c.mix.scales = read_wide(scales, x, {e.E}, "scales");
  const void* t = read_wide(tau, x, {1}, "tau");
  c.mix.tau = accumulator_of(x) == ScalarType::Double ? *static_cast<const double*>(t)
                                                      : *static_cast<const float*>(t);
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->numel() == e.E,
                    "mask: wanted one bool per expert");
    check_contiguous(*mask, "mask");
    c.mix.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
  }
  c.down = {read(lora_down), e.E * e.r, e.K};
  c.up = {read(lora_up), e.E * e.r, e.N};
  return c;
}

std::tuple<Tensor, Tensor> output_gate_forward(
    const Tensor& x, const Tensor& lora_down, const Tensor& lora_up, const Tensor& projection,
    const Tensor& factors, const OptionalTensor& means, const Tensor& scales, const Tensor& tau,
    const OptionalTensor& mask, const OptionalTensor& bias, const Tensor& y, int64_t normalization,
    bool mask_input, bool accumulate) {
  OutputGateCall c = output_gate_call(x, lora_down, lora_up, projection, factors, means, scales,
                                      tau, mask, normalization, mask_input);
  const Experts& e = c.e;
  const ScalarType wide = accumulator_of(x);
  Tensor hidden = empty({e.T, e.E * e.r}, wide), mixed = empty({e.T, e.E * e.r}, wide);
  Tensor gates = empty({e.T, e.E}, wide);
  c.mix.hidden = data<void>(hidden);
  c.mix.mixed = data<void>(mixed);
  c.mix.gates = data<void>(gates);
  const Rows out = check_output(y, x, e.N, "y");
  const moelora::Kernels& kernels = moelora::kernels(dtype_of(x));
  run_forward(kernels.dense, {shrink_of(e.x, read(x), e.K, c.down, {}, c.mix.hidden)},
              kernels.dense.output_gate, c.mix,
              {expand_of(out, data<void>(y), e.N, c.up, {}, c.mix.mixed,
                         read_like(bias, x, {e.N}, "bias"), accumulate)});
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
  OutputGateCall c = output_gate_call(dx, lora_down, lora_up, projection, factors, means, scales,
                                      tau, mask, normalization, mask_input);
  const Experts& e = c.e;
  const ScalarType wide = accumulator_of(dx);
  const Rows dys = check_output(dy, dx, e.N, "dy");
  c.mix.hidden = const_cast<void*>(read_wide(hidden, dx, {e.T, e.E * e.r}, "hidden"));
  c.mix.gates = const_cast<void*>(read_wide(gates, dx, {e.T, e.E}, "gates"));
  c.mix.dgates = read_wide(dgates, dx, {e.T, e.E}, "dgates");
  Tensor dmixed = empty({e.T, e.E * e.r}, wide), dhidden = empty({e.T, e.E * e.r}, wide);
  Tensor normalized = empty({e.T, c.mix.input_columns()}, wide);
  Tensor dlogits = empty({e.T, e.E}, wide), dtaus = empty({e.T}, wide), dtau = empty({1}, wide);
  c.mix.dmixed = data<void>(dmixed);
  c.mix.dhidden = data<void>(dhidden);
  c.mix.normalized = data<void>(normalized);
  c.mix.dlogits = data<void>(dlogits);
  c.mix.dtau = data<void>(dtaus);
  std::vector<DenseExpand> expands;
  if (need_dx)
    expands.push_back(
        expand_of(e.x, data<void>(dx), e.K, c.down, {}, data<void>(dhidden), nullptr, accumulate));
  const moelora::Kernels& kernels = moelora::kernels(dtype_of(dx));
  run_backward(kernels.dense, {shrink_of(dys, read(dy), e.N, c.up, {}, data<void>(dmixed))},
               kernels.dense.output_gate, c.mix, expands, {});
  with_element(dtype_of(dtau), [&](auto element) {
    using A = decltype(element);
    if constexpr (std::is_floating_point_v<A>) {
      double sum = 0;
      for (int64_t t = 0; t < e.T; ++t) sum += static_cast<const A*>(dtaus.const_data_ptr())[t];
      *data<A>(dtau) = static_cast<A>(sum);
    }
  });
  return {normalized, dlogits, dtau};
}

// ---------------------------------------------------------------- the products alone

Tensor shrink(const Tensor& v, const Tensor& rows) {
  const Rows tokens = rows_of(v, "x");
  STD_TORCH_CHECK(rows.dim() == 2 && v.size(v.dim() - 1) == rows.size(1), "rows: wanted [R, ",
                  v.size(v.dim() - 1), "]");
  const RowBlock block = {read_like(rows, v, shape_of(rows), "rows"), rows.size(0), rows.size(1)};
  std::vector<int64_t> shape = shape_of(v);
  shape.back() = block.count;
  Tensor h = empty(shape, accumulator_of(v));
  const DenseShrink p = shrink_of(tokens, read(v), rows.size(1), block, {}, data<void>(h));
  const moelora::DenseKernels& kernels = moelora::kernels(dtype_of(v)).dense;
  if (p.T < kSmallT)
    split(p.T ? block.count : 0, kRowUnit,
          [&](int64_t r0, int64_t r1) { kernels.shrink(p, 0, p.T, r0, r1); });
  else
    split(p.T, kTokenUnit,
          [&](int64_t t0, int64_t t1) { kernels.shrink(p, t0, t1, 0, block.count); });
  return h;
}

void expand(const Tensor& h, const Tensor& rows, const Tensor& y, bool accumulate) {
  const Rows out = rows_of(y, "y");
  STD_TORCH_CHECK(rows.dim() == 2 && y.size(y.dim() - 1) == rows.size(1), "rows: wanted [R, ",
                  y.size(y.dim() - 1), "]");
  const RowBlock block = {read_like(rows, y, shape_of(rows), "rows"), rows.size(0), rows.size(1)};
  std::vector<int64_t> shape = shape_of(y);
  shape.back() = block.count;
  const void* coefficients = read_wide(h, y, shape, "hidden");
  const DenseExpand p = expand_of(out, data<void>(y), rows.size(1), block, {},
                                  const_cast<void*>(coefficients), nullptr, accumulate);
  const moelora::DenseKernels& kernels = moelora::kernels(dtype_of(y)).dense;
  if (p.T > kColumnSplitT)
    split(p.T, kTokenUnit, [&](int64_t t0, int64_t t1) { kernels.expand(p, t0, t1, 0, p.C); });
  else
    split(p.T ? p.C : 0, kColumnUnit,
          [&](int64_t c0, int64_t c1) { kernels.expand(p, 0, p.T, c0, c1); });
}

Tensor outer(const Tensor& h, const Tensor& v) {
  const Rows tokens = rows_of(v, "x");
  std::vector<int64_t> shape = shape_of(v);
  const int64_t columns = shape.back();
  STD_TORCH_CHECK(h.dim() == v.dim(), "hidden: wanted as many dimensions as x");
  const int64_t count = shape.back() = h.size(h.dim() - 1);
  const void* coefficients = read_wide(h, v, shape, "hidden");
  Tensor rows = empty({count, columns}, v.scalar_type());
  const DenseShrink s = shrink_of(tokens, read(v), columns, {nullptr, count, columns}, {}, nullptr);
  const DenseOuter p =
      outer_of(s, {read(rows), count, columns}, {}, const_cast<void*>(coefficients));
  const moelora::DenseKernels& kernels = moelora::kernels(dtype_of(v)).dense;
  split(columns, kColumnUnit, [&](int64_t c0, int64_t c1) { kernels.outer(p, c0, c1); });
  return rows;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moelora_ops, CPU, m) {
  m.impl("gated_forward", TORCH_BOX(&gated_forward));
  m.impl("gated_backward", TORCH_BOX(&gated_backward));
  m.impl("grid_forward", TORCH_BOX(&grid_forward));
  m.impl("grid_backward", TORCH_BOX(&grid_backward));
  m.impl("averaged_forward", TORCH_BOX(&averaged_forward));
  m.impl("averaged_backward", TORCH_BOX(&averaged_backward));
  m.impl("output_gate_forward", TORCH_BOX(&output_gate_forward));
  m.impl("output_gate_backward", TORCH_BOX(&output_gate_backward));
  m.impl("shrink", TORCH_BOX(&shrink));
  m.impl("expand", TORCH_BOX(&expand));
  m.impl("outer", TORCH_BOX(&outer));
}
