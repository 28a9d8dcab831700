// The averaged mix on CPU tensors: experts whose factors are averaged, not their outputs; with
// weights per sequence by merging the factors first.

#include "bindings_dense.h"

namespace {

using namespace moelora::tensors;

// Elements that one thread converts at least.
constexpr int64_t kConvertUnit = 1 << 14;

// What both directions share.
struct AveragedCall {
  Experts e;
  const Tensor& weights;  // [rows, Q E]
  int64_t Q;              // splits
  moelora::Averaged mix{};

  AveragedCall(const Tensor& x, const Tensor& lora_down, const Tensor& lora_up, const Tensor& table,
               const OptionalTensor& row_map, int64_t splits, double scale)
      : e(experts_of(x, lora_down, lora_up)), weights(table), Q(splits) {
    check_splits(Q, e.K, e.N);
    STD_TORCH_CHECK(weights.dim() == 2, "weights: wanted 2 dimensions");
    mix.pairs = static_cast<int>(Q * e.E), mix.r = static_cast<int>(e.r);
    mix.scale = scale;
    mix.weights = read_wide(weights, x, {weights.size(0), Q * e.E}, "weights");
    mix.row = checked_row_map(row_map, weights.size(0), e.T);
  }
};

// ---------------------------------------------------------------- weights per token

// Segment q of the features meets columns [q E r, (q + 1) E r) of hidden and mixed, and the same
// segment of every expert's rows.
class Segments {
 public:
  explicit Segments(const AveragedCall& c)
      : Q(c.Q), count(c.e.E * c.e.r), element(element_size(c.e.x)), wide(accumulator_size(c.e.x)) {}

  // One product per segment.
  std::vector<DenseShrink> shrinks(const Vectors& v, const RowBlock& rows, void* h) const {
    return each<DenseShrink>(h, [&](int64_t q, void* own) {
      return shrink_of({v.T, v.columns / Q, v.ld, offset(v.at, v.columns, q)}, part(rows, q), own);
    });
  }
  std::vector<DenseExpand> expands(const Outputs& y, const RowBlock& rows, void* h,
                                   const Start& start) const {
    return each<DenseExpand>(h, [&](int64_t q, void* own) {
      const void* bias = start.bias ? offset(start.bias, y.columns, q) : nullptr;
      return expand_of({y.T, y.columns / Q, y.ld, offset(y.at, y.columns, q)}, part(rows, q), own,
                       {bias, start.accumulate});
    });
  }
  std::vector<DenseOuter> outers(const Vectors& v, const RowBlock& rows, void* h) const {
    return each<DenseOuter>(h, [&](int64_t q, void* own) {
      return outer_of({v.T, v.columns / Q, v.ld, offset(v.at, v.columns, q)}, part(rows, q), own);
    });
  }

 private:
  int64_t Q, count, element, wide;  // count: E r; bytes of an element and of an accumulator

  template <class V>
  V* offset(V* vectors, int64_t columns, int64_t q) const {
    using Byte = std::conditional_t<std::is_const_v<V>, const char, char>;
    return static_cast<Byte*>(vectors) + q * (columns / Q) * element;
  }
  Blocks part(const RowBlock& rows, int64_t q) const {
    return {{offset(rows.rows, rows.ld, q), rows.count, rows.ld}};
  }
  template <class Product, class F>
  std::vector<Product> each(void* h, const F& product) const {
    std::vector<Product> all;
    for (int64_t q = 0; q < Q; ++q) {
      all.push_back(product(q, static_cast<char*>(h) + q * count * wide));
      all.back().ldh = Q * count;
    }
    return all;
  }
};

// ---------------------------------------------------------------- weights per sequence

// `t` in another type, by a conversion of the kernels for `narrow`.
using Conversion = void (*DenseKernels::*)(const void* from, int64_t n, void* to);
Tensor converted(const Tensor& t, ScalarType type, DType narrow, Conversion conversion) {
  if (t.scalar_type() == type) return t;
  Tensor out = empty(shape_of(t), type);
  const auto convert = moelora::kernels(narrow).dense.*conversion;
  const int64_t from = element_size(t), to = element_size(out);
  split(t.numel(), kConvertUnit, [&](int64_t begin, int64_t end) {
    convert(static_cast<const char*>(t.const_data_ptr()) + begin * from, end - begin,
            data<char>(out) + begin * to);
  });
  return out;
}
Tensor widened(const Tensor& t) {
  return converted(t, accumulator_of(t), dtype_of(t), &DenseKernels::widen);
}
Tensor rounded(const Tensor& t, const Tensor& like) {
  return converted(t, like.scalar_type(), dtype_of(like), &DenseKernels::round);
}

// The factors of each row of the table are merged first, A = Σ_e w_e A_e and B = s Σ_e w_e B_e, and
// a sequence's tokens meet r rows instead of E r.  Merging is an expand whose tokens are the rows
// of the table; its gradients are an outer product and a shrink.  All three in the accumulator's
// type, as a rounded weight would err alike for every feature.
class Merged {
 public:
  int64_t rows;
  Tensor down, up;  // [rows, r, K], [rows, r, N] in x's dtype

  explicit Merged(const AveragedCall& call)
      : rows(call.weights.size(0)),
        down(call.e.x),
        up(call.e.x),
        c(call),
        E(call.e.E),
        r(call.e.r),
        Q(call.Q),
        wide(accumulator_size(call.e.x)),
        kernels(moelora::kernels(wide == 8 ? DType::kFloat64 : DType::kFloat32).dense),
        sides{{widened(c.e.lora_down), c.e.K, c.weights},
              {widened(c.e.lora_up), c.e.N, scaled_weights()}} {
    STD_TORCH_CHECK(!c.mix.row.map,
                    "row_map: sequences lie one after the other if they are merged");
    Tensor merged[2] = {empty_wide({rows, r, c.e.K}, c.e.x), empty_wide({rows, r, c.e.N}, c.e.x)};
    each_pair([&](int side, int64_t j, int64_t q) {
      const Side& s = sides[side];
      DenseExpand expand =
          expand_of({rows, s.columns / Q, r * s.columns, at(merged[side], s, j, q)},
                    {experts(s.experts, s, j, q)}, coefficients(s, q), {nullptr, false});
      expand.ldh = Q * E;
      kernels.expand(expand, 0, rows, 0, s.columns / Q);
    });
    down = rounded(merged[0], c.e.x);
    up = rounded(merged[1], c.e.x);
  }

  // The gradients of the experts' factors and of the weights from those of the merged ones, which
  // are in the accumulator's type.
  std::tuple<Tensor, Tensor, Tensor> gradients(const Tensor& ddown, const Tensor& dup,
                                               bool need_dparams, bool need_dweights) const {
    Tensor dexperts[2] = {gradient_like(sides[0].experts, need_dparams),
                          gradient_like(sides[1].experts, need_dparams)};
    Tensor dweights = empty_wide({need_dweights ? rows : 0, Q * E}, c.e.x);
    // [side, j, q]: <merged gradient, expert e's row> of each table row.
    Tensor shares = empty_wide({need_dweights ? 2 * r * Q * rows * E : 0}, c.e.x);
    each_pair([&](int side, int64_t j, int64_t q) {
      const Side& s = sides[side];
      const Vectors gradient = {rows, s.columns / Q, r * s.columns,
                                at(side ? dup : ddown, s, j, q)};
      if (need_dweights) {
        const int64_t unit = (side * r + j) * Q + q;
        kernels.shrink(shrink_of(gradient, {experts(s.experts, s, j, q)},
                                 data<char>(shares) + unit * rows * E * wide),
                       0, rows, 0, E);
      }
      if (need_dparams) {
        DenseOuter outer =
            outer_of(gradient, {experts(dexperts[side], s, j, q)}, coefficients(s, q));
        outer.ldh = Q * E;
        kernels.outer(outer, 0, s.columns / Q);
      }
    });
    if (need_dweights) sum_shares(shares, dweights);
    return {rounded(dexperts[0], c.e.x), rounded(dexperts[1], c.e.x), dweights};
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
  Blocks of_row(const Tensor& merged, int64_t row) const {
    const int64_t columns = merged.size(2);
    const auto* first = static_cast<const char*>(merged.const_data_ptr());
    return {{first + row * r * columns * element_size(merged), r, columns}};
  }
  // The outer product, for row's sequence, of its coefficients in h [T, r] and its vectors.
  DenseOuter outer_of_row(const Vectors& v, const Tensor& h, const Tensor& out, int64_t row) const {
    const int64_t length = v.T ? c.mix.row.tokens_per_row : 0, first = row * length;
    const auto* vectors = static_cast<const char*>(v.at) + first * v.ld * element_size(c.e.x);
    return outer_of({length, v.columns, v.ld, vectors}, of_row(out, row),
                    data<char>(h) + first * r * wide);
  }

 private:
  struct Side {
    Tensor experts;  // [E, r, columns], wide
    int64_t columns;
    Tensor table;  // [rows, Q E]: what they are multiplied by
  };
  const AveragedCall& c;
  int64_t E, r, Q, wide;
  const DenseKernels& kernels;
  Side sides[2];

  Tensor scaled_weights() const {
    Tensor out = empty_wide(shape_of(c.weights), c.e.x);
    with_accumulator(out, [&](auto element) {
      using A = decltype(element);
      const A* from = static_cast<const A*>(c.weights.const_data_ptr());
      A* to = data<A>(out);
      for (int64_t i = 0; i < rows * Q * E; ++i) to[i] = static_cast<A>(c.mix.scale) * from[i];
    });
    return out;
  }
  void sum_shares(const Tensor& shares, const Tensor& dweights) const {
    with_accumulator(dweights, [&](auto element) {
      using A = decltype(element);
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

Tensor merged_forward(const AveragedCall& c, const Outputs& y, const Start& start) {
  const Experts& e = c.e;
  Tensor hidden = empty_wide({e.T, e.r}, e.x);
  if (e.T == 0) return hidden;
  const Merged m(c);
  const DenseKernels& kernels = moelora::kernels(dtype_of(e.x)).dense;
  void* h = data<void>(hidden);
  split(e.T, kTokenUnit, [&](int64_t t0, int64_t t1) {
    m.each_sequence(t0, t1, [&](int64_t a, int64_t b, int64_t row) {
      kernels.shrink(shrink_of(e.tokens, m.of_row(m.down, row), h), a, b, 0, e.r);
      kernels.expand(expand_of(y, m.of_row(m.up, row), h, start), a, b, 0, e.N);
    });
  });
  return hidden;
}

// dx is null if it is not wanted.
std::tuple<Tensor, Tensor, Tensor> merged_backward(const AveragedCall& c, const Vectors& dy,
                                                   const Tensor& hidden, const Outputs* dx,
                                                   bool accumulate, bool need_dparams,
                                                   bool need_dweights) {
  const Experts& e = c.e;
  read_saved(hidden, e.x, {e.T, e.r}, "hidden");
  const Merged m(c);
  Tensor dhidden = empty_wide({e.T, e.r}, e.x);
  const DenseKernels& kernels = moelora::kernels(dtype_of(e.x)).dense;
  void* dh = data<void>(dhidden);
  split(e.T, kTokenUnit, [&](int64_t t0, int64_t t1) {
    m.each_sequence(t0, t1, [&](int64_t a, int64_t b, int64_t row) {
      kernels.shrink(shrink_of(dy, m.of_row(m.up, row), dh), a, b, 0, e.r);
      if (dx)
        kernels.expand(expand_of(*dx, m.of_row(m.down, row), dh, {nullptr, accumulate}), a, b, 0,
                       e.K);
    });
  });
  const bool wanted = need_dparams || need_dweights;
  Tensor ddown = empty_wide({wanted ? m.rows : 0, e.r, e.K}, e.x);
  Tensor dup = empty_wide({wanted ? m.rows : 0, e.r, e.N}, e.x);
  if (wanted) {
    split(e.N, kColumnUnit, [&](int64_t c0, int64_t c1) {
      for (int64_t row = 0; row < m.rows; ++row)
        kernels.outer_wide(m.outer_of_row(dy, hidden, dup, row), c0, c1);
    });
    split(e.K, kColumnUnit, [&](int64_t c0, int64_t c1) {
      for (int64_t row = 0; row < m.rows; ++row)
        kernels.outer_wide(m.outer_of_row(e.tokens, dhidden, ddown, row), c0, c1);
    });
  }
  return m.gradients(ddown, dup, need_dparams, need_dweights);
}

// ---------------------------------------------------------------- operators

Tensor averaged_forward(const Tensor& x, const Tensor& lora_down, const Tensor& lora_up,
                        const Tensor& weights, const OptionalTensor& row_map,
                        const OptionalTensor& bias, const Tensor& y, int64_t splits, double scale,
                        bool merged, bool accumulate) {
  AveragedCall c(x, lora_down, lora_up, weights, row_map, splits, scale);
  const Outputs out = outputs_like(y, x, c.e.N, "y");
  const Start start = {read_like(bias, x, {c.e.N}, "bias"), accumulate};
  if (merged) return merged_forward(c, out, start);
  Tensor hidden = empty_wide({c.e.T, c.mix.hidden_columns()}, x);
  Tensor mixed = empty_wide({c.e.T, c.mix.mixed_columns()}, x);
  c.mix.hidden = data<void>(hidden);
  c.mix.mixed = data<void>(mixed);
  const Segments segments(c);
  run_forward(x, &DenseKernels::averaged, c.mix,
              segments.shrinks(c.e.tokens, c.e.down, c.mix.hidden),
              segments.expands(out, c.e.up, c.mix.mixed, start));
  return hidden;
}

std::tuple<Tensor, Tensor, Tensor> averaged_backward(
    const Tensor& dy, const Tensor& x, const Tensor& lora_down, const Tensor& lora_up,
    const Tensor& weights, const OptionalTensor& row_map, const Tensor& hidden, const Tensor& dx,
    int64_t splits, double scale, bool merged, bool accumulate, bool need_dx, bool need_dparams,
    bool need_dweights) {
  AveragedCall c(x, lora_down, lora_up, weights, row_map, splits, scale);
  const Experts& e = c.e;
  const Vectors dys = vectors_like(dy, x, e.N, "dy");
  std::optional<Outputs> dxs;
  if (need_dx) dxs = outputs_like(dx, x, e.K, "dx");
  if (merged)
    return merged_backward(c, dys, hidden, dxs ? &*dxs : nullptr, accumulate, need_dparams,
                           need_dweights);
  c.mix.hidden = read_saved(hidden, x, {e.T, c.mix.hidden_columns()}, "hidden");
  Tensor mixed = empty_wide({e.T, c.mix.mixed_columns()}, x);
  Tensor dhidden = empty_wide({e.T, c.mix.hidden_columns()}, x);
  Tensor shares = empty_wide({need_dweights ? e.T : 0, c.mix.pairs}, x);
  c.mix.dmixed = data<void>(mixed);
  c.mix.dhidden = data<void>(dhidden);
  if (need_dweights) c.mix.dweights = data<void>(shares);
  if (need_dparams) c.mix.mixed = data<void>(mixed);

  Tensor dlora_down = gradient_like(lora_down, need_dparams);
  Tensor dlora_up = gradient_like(lora_up, need_dparams);
  const Segments segments(c);
  std::vector<DenseExpand> expands;
  if (dxs) expands = segments.expands(*dxs, e.down, c.mix.dhidden, {nullptr, accumulate});
  std::vector<DenseOuter> outers;
  if (need_dparams) {
    outers = segments.outers(dys, gradient_of(e.up, dlora_up), data<void>(mixed));
    for (const DenseOuter& p :
         segments.outers(e.tokens, gradient_of(e.down, dlora_down), c.mix.dhidden))
      outers.push_back(p);
  }
  run_backward(x, &DenseKernels::averaged, c.mix, segments.shrinks(dys, e.up, data<void>(mixed)),
               expands, outers);
  Tensor dweights = need_dweights ? sum_rows(shares, c.mix.row, weights.size(0)) : shares;
  return {dlora_down, dlora_up, dweights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moelora_ops, CPU, m) {
  m.impl("averaged_forward", TORCH_BOX(&averaged_forward));
  m.impl("averaged_backward", TORCH_BOX(&averaged_backward));
}
