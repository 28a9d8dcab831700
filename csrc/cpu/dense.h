// The dense mixes on the CPU: shrink, expand and outer products in which every row meets every
// token, and the row mathematics of csrc/mix run over tokens.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/expand.h"
#include "cpu/kernels.h"
#include "cpu/linear.h"
#include "cpu/outer.h"
#include "cpu/shrink.h"
#include "mix/averaged.h"

namespace moelora {
namespace MOELORA_LEVEL {

template <class T>
class DenseProducts {
  using A = acc_t<T>;
  using P = typename PanelOf<T>::type;

  static const T* in(const void* p) { return static_cast<const T*>(p); }

  // Pointers to the rows of all blocks, one block after the other.
  static void gather_rows(const Dense& p, std::vector<const T*>& rows) {
    rows.clear();
    for (const RowBlock& block : p.blocks)
      for (int64_t i = 0; i < block.count; ++i) rows.push_back(in(block.rows) + i * block.ld);
  }

  // h[i, r] = <tokens[i], row r> for rows [r0, r1).
  static void shrink_in_dot_form(const DenseShrink& p, int64_t n, const T* const* tokens,
                                 int64_t r0, int64_t r1, A* h) {
    const int64_t fit = std::max<int64_t>(8, kRowBytes / (p.C * sizeof(T) + 1) / 8 * 8);
    int64_t first = 0;  // of the block, among all rows
    for (const RowBlock& block : p.blocks) {
      const int64_t end = std::min(r1, first + block.count);
      for (int64_t r = std::max(r0, first); r < end; r += fit)
        moelora::MOELORA_LEVEL::shrink<T>(n, tokens, in(block.rows) + (r - first) * block.ld,
                                          block.ld, std::min(fit, end - r), p.C, h + r, p.ldh);
      first += block.count;
    }
  }

  // Tokens per pass of expand: filling the panel is lost in the noise and coefficients stay in L2.
  static constexpr int64_t kExpandTokens = 512;
  // Bytes of rows that meet a block of tokens before the next rows do.
  static constexpr int64_t kRowBytes = 1 << 18;

 public:
  static void shrink(const DenseShrink& p, int64_t t0, int64_t t1, int64_t r0, int64_t r1) {
    static thread_local std::vector<const T*> tokens;
    static thread_local std::vector<const T*> rows;
    static thread_local Scratch<T> masked_scratch;
    const bool in_panels = shrinks_in_panels<T>(p.rows());
    if (in_panels) gather_rows(p, rows);
    for (int64_t a = t0; a < t1; a += kTokenBlock) {
      const int64_t b = std::min(t1, a + kTokenBlock);
      tokens.resize(b - a);
      T* masked = p.dropout ? masked_scratch.take((b - a) * p.C) : nullptr;
      for (int64_t t = a; t < b; ++t) {
        tokens[t - a] = in(p.v) + t * p.ldv;
        if (!masked) continue;
        masked_copy(*p.dropout, tokens[t - a], t, 0, 0, p.C, masked + (t - a) * p.C);
        tokens[t - a] = masked + (t - a) * p.C;
      }
      A* h = static_cast<A*>(p.h) + a * p.ldh;
      if (in_panels)
        shrink_in_panels<T>(b - a, tokens.data(), rows.data(), r0, r1, p.C, h, p.ldh);
      else
        shrink_in_dot_form(p, b - a, tokens.data(), r0, r1, h);
      if (!p.dropout) continue;
      const A inv_keep = static_cast<A>(p.dropout->inv_keep);
      for (int64_t t = a; t < b; ++t)
        for (int64_t r = r0; r < r1; ++r) static_cast<A*>(p.h)[t * p.ldh + r] *= inv_keep;
    }
  }

  static void expand(const DenseExpand& p, int64_t t0, int64_t t1, int64_t c0, int64_t c1) {
    static thread_local std::vector<const T*> rows;
    static thread_local std::vector<typename P::word> words;
    const Output<T> out = {static_cast<T*>(p.y), p.ldy, in(p.bias), p.accumulate};
    if (p.dropout) return expand_under_dropout(p, t0, t1, c0, c1, out);
    gather_rows(p, rows);
    while (rows.size() % P::kRowsPerEntry) rows.push_back(nullptr);
    const int64_t entries = static_cast<int64_t>(rows.size()) / P::kRowsPerEntry;
    words.resize(kExpandTokens * entries);
    for (int64_t a = t0; a < t1; a += kExpandTokens) {
      const int64_t b = std::min(t1, a + kExpandTokens);
      for (int64_t t = a; t < b; ++t)
        P::pack(static_cast<const A*>(p.h) + t * p.ldh, static_cast<int>(p.rows()),
                words.data() + (t - a) * entries);
      expand_dense<T>({rows.data(), entries}, a, b, c0, c1, words.data(), out);
    }
  }

  static void widen(const void* from, int64_t n, void* to) {
    A* out = static_cast<A*>(to);
    int64_t i = 0;
    for (; i + kLanes<A> <= n; i += kLanes<A>) store(out + i, load(in(from) + i));
    for (; i < n; ++i) out[i] = to_acc(in(from)[i]);
  }
  static void round(const void* from, int64_t n, void* to) {
    const A* values = static_cast<const A*>(from);
    T* out = static_cast<T*>(to);
    int64_t i = 0;
    for (; i + kLanes<A> <= n; i += kLanes<A>) store(out + i, load(values + i));
    for (; i < n; ++i) out[i] = from_acc<T>(values[i]);
  }

  // Gradients of the rows, columns [c0, c1), as O: T or its accumulator.
  template <class O>
  static void outer(const DenseOuter& p, int64_t c0, int64_t c1) {
    static thread_local std::vector<const T*> tokens;
    static thread_local std::vector<O*> destination;
    static thread_local std::vector<const A*> coefficients;
    static thread_local Scratch<T> masked_scratch;
    destination.clear();
    for (const RowBlock& block : p.blocks)
      for (int64_t i = 0; i < block.count; ++i)
        destination.push_back(static_cast<O*>(const_cast<void*>(block.rows)) + i * block.ld);
    const int64_t count = p.rows(), block = outer_block(static_cast<int>(count));
    accumulate_rows<O>(
        count, c0, c1,
        [&](int64_t a, int64_t b, A* sums, int64_t width) {
          for (int64_t t0 = 0; t0 < p.T; t0 += block) {
            const int64_t n = std::min(p.T, t0 + block) - t0;
            T* masked = p.dropout ? masked_scratch.take(n * width) : nullptr;
            tokens.resize(n + 1);
            coefficients.resize(n);
            for (int64_t i = 0; i < n; ++i) {
              tokens[i] = in(p.v) + (t0 + i) * p.ldv + a;
              coefficients[i] = static_cast<const A*>(p.h) + (t0 + i) * p.ldh;
              if (!masked) continue;
              masked_copy(*p.dropout, in(p.v) + (t0 + i) * p.ldv, t0 + i, 0, a, b,
                          masked + i * width);
              tokens[i] = masked + i * width;
            }
            moelora::MOELORA_LEVEL::outer<T>(n, tokens.data(), coefficients.data(),
                                             static_cast<int>(count), 0, width, sums, width);
          }
        },
        destination.data());
  }

 private:
  static void expand_under_dropout(const DenseExpand& p, int64_t t0, int64_t t1, int64_t c0,
                                   int64_t c1, const Output<T>& out) {
    static thread_local std::vector<const T*> rows;
    static thread_local std::vector<int32_t> entry, mask_expert;
    static thread_local std::vector<A> words;
    gather_rows(p, rows);
    const int64_t count = p.rows();
    mask_expert.assign(kExpandTokens, 0);
    entry.resize(kExpandTokens * count);
    words.resize(kExpandTokens * count);
    for (int64_t i = 0; i < static_cast<int64_t>(entry.size()); ++i)
      entry[i] = static_cast<int32_t>(i % count);
    for (int64_t a = t0; a < t1; a += kExpandTokens) {
      const int64_t b = std::min(t1, a + kExpandTokens);
      for (int64_t t = a; t < b; ++t)
        std::copy_n(static_cast<const A*>(p.h) + t * p.ldh, count, words.data() + (t - a) * count);
      expand_masked<T>({rows.data(), count}, a, b, c0, c1, 1, static_cast<int>(count), entry.data(),
                       words.data(), *p.dropout, mask_expert.data(), out);
    }
  }
};

// The mixes: one token after the other.
template <class A>
struct Mixes {
  static A* at(void* p, int64_t offset) { return p ? static_cast<A*>(p) + offset : nullptr; }
  static const A* at(const void* p, int64_t offset) {
    return p ? static_cast<const A*>(p) + offset : nullptr;
  }

  // ---------------------------------------------------------------- gated

  template <Activation activation>
  static void gated_forward_as(const Gated& m, int64_t t0, int64_t t1) {
    const int64_t columns = m.hidden_columns();
    for (int64_t t = t0; t < t1; ++t) {
      A* hidden = at(m.hidden, t * columns);
      if (m.down_bias)
        for (int64_t j = 0; j < columns; ++j) hidden[j] += at(m.down_bias, 0)[j];
      gated_forward_row<activation>(m.E, m.r, hidden, at(m.weights, m.row(t) * m.E),
                                    static_cast<A>(m.scale), m.up_bias,
                                    at(m.mixed, t * m.mixed_columns()));
    }
  }
  template <Activation activation>
  static void gated_backward_as(const Gated& m, int64_t t0, int64_t t1) {
    for (int64_t t = t0; t < t1; ++t) {
      const A* hidden = at(m.hidden, t * m.hidden_columns());
      const A* weights = at(m.weights, m.row(t) * m.E);
      const int64_t mixed = t * m.mixed_columns();
      gated_backward_row<activation>(m.E, m.r, hidden, weights, static_cast<A>(m.scale), m.up_bias,
                                     at(m.dmixed, mixed), at(m.dhidden, t * m.hidden_columns()),
                                     at(m.dweights, t * m.E));
      if (m.dhidden_scale != 1)
        for (int64_t j = 0; j < m.hidden_columns(); ++j)
          at(m.dhidden, t * m.hidden_columns())[j] *= static_cast<A>(m.dhidden_scale);
      if (m.mixed)
        gated_forward_row<activation>(m.E, m.r, hidden, weights, static_cast<A>(m.scale), m.up_bias,
                                      at(m.mixed, mixed));
    }
  }
  // The activation is a template argument so that the loops over a token's hidden vectorise.
  template <class F>
  static void with_activation(Activation activation, const F& f) {
    switch (activation) {
      case Activation::kRelu: return f(std::integral_constant<Activation, Activation::kRelu>());
      case Activation::kGelu: return f(std::integral_constant<Activation, Activation::kGelu>());
      case Activation::kGeluTanh:
        return f(std::integral_constant<Activation, Activation::kGeluTanh>());
      default: return f(std::integral_constant<Activation, Activation::kIdentity>());
    }
  }
  static void gated_forward(const Gated& m, int64_t t0, int64_t t1) {
    with_activation(m.activation, [&](auto a) { gated_forward_as<decltype(a)::value>(m, t0, t1); });
  }
  static void gated_backward(const Gated& m, int64_t t0, int64_t t1) {
    with_activation(m.activation,
                    [&](auto a) { gated_backward_as<decltype(a)::value>(m, t0, t1); });
  }

  // ---------------------------------------------------------------- grid

  static GridScales<A> scales(const Grid& m) {
    return {static_cast<A>(m.token_scale), static_cast<A>(m.task_scale),
            static_cast<A>(m.output_scale)};
  }
  static void grid_forward(const Grid& m, int64_t t0, int64_t t1) {
    static thread_local Scratch<A> scratch;
    A* gate = scratch.take(m.shape.gates());
    for (int64_t t = t0; t < t1; ++t) {
      const A* hidden = at(m.hidden, t * m.hidden_columns());
      grid_forward_row(m.shape, hidden, hidden + m.shape.r1,
                       at(m.external, m.row(t) * m.shape.gates()), scales(m), gate,
                       at(m.mixed, t * m.shape.r2));
    }
  }
  static void grid_backward(const Grid& m, int64_t t0, int64_t t1) {
    static thread_local Scratch<A> scratch;
    const int gates = m.shape.gates(), r2 = m.shape.r2;
    A *probs = scratch.take(2 * gates + r2), *dgate = probs + gates, *mixed = dgate + gates;
    for (int64_t t = t0; t < t1; ++t) {
      const A* hidden = at(m.hidden, t * m.hidden_columns());
      A* dhidden = at(m.dhidden, t * m.hidden_columns());
      GridScales<A> dscales;
      grid_backward_row(m.shape, hidden, hidden + m.shape.r1, at(m.external, m.row(t) * gates),
                        scales(m), at(m.dmixed, t * r2), dhidden, dhidden + m.shape.r1, mixed,
                        &dscales, at(m.dexternal, t * gates), probs, dgate);
      A* out = at(m.dscales, t * 3);
      out[0] = dscales.token, out[1] = dscales.task, out[2] = dscales.output;
      if (m.mixed) std::copy_n(mixed, r2, at(m.mixed, t * r2));
    }
  }

  // ---------------------------------------------------------------- averaged

  static void averaged_forward(const Averaged& m, int64_t t0, int64_t t1) {
    static thread_local Scratch<A> scratch;
    A* average = scratch.take(m.r);
    for (int64_t t = t0; t < t1; ++t)
      averaged_forward_row(m.pairs, m.r, at(m.hidden, t * m.hidden_columns()),
                           at(m.weights, m.row(t) * m.pairs), static_cast<A>(m.scale), average,
                           at(m.mixed, t * m.mixed_columns()));
  }
  static void averaged_backward(const Averaged& m, int64_t t0, int64_t t1) {
    static thread_local Scratch<A> scratch;
    A *average = scratch.take(2 * m.r), *daverage = average + m.r;
    for (int64_t t = t0; t < t1; ++t) {
      const A* hidden = at(m.hidden, t * m.hidden_columns());
      const A* weights = at(m.weights, m.row(t) * m.pairs);
      averaged_backward_row(m.pairs, m.r, hidden, weights, static_cast<A>(m.scale),
                            at(m.dmixed, t * m.mixed_columns()),
                            at(m.dhidden, t * m.hidden_columns()), at(m.dweights, t * m.pairs),
                            average, daverage);
      if (m.mixed)
        averaged_forward_row(m.pairs, m.r, hidden, weights, static_cast<A>(m.scale), average,
                             at(m.mixed, t * m.mixed_columns()));
    }
  }

  // ---------------------------------------------------------------- output gate

  static OutputGate<A> gate_of(const OutputGating& m) {
    return {m.E,
            m.r,
            m.normalization,
            at(m.projection, 0),
            at(m.projection_t, 0),
            at(m.factors, 0),
            at(m.factors_t, 0),
            at(m.means, 0),
            at(m.scales, 0),
            m.mask,
            m.mask_input,
            static_cast<A>(1 / m.tau),
            static_cast<A>(1 / m.width)};
  }
  static void output_gate_forward(const OutputGating& m, int64_t t0, int64_t t1) {
    static thread_local Scratch<A> scratch;
    const OutputGate<A> gate = gate_of(m);
    A* normalized = scratch.take(m.input_columns() + m.E + m.hidden_columns());
    A *inverse = normalized + m.input_columns(), *rotated = inverse + m.E;
    for (int64_t t = t0; t < t1; ++t)
      output_gate_forward_row(gate, at(m.hidden, t * m.hidden_columns()), at(m.gates, t * m.E),
                              at(m.mixed, t * m.mixed_columns()), normalized, inverse, rotated);
  }
  static void output_gate_backward(const OutputGating& m, int64_t t0, int64_t t1) {
    static thread_local Scratch<A> scratch;
    const OutputGate<A> gate = gate_of(m);
    A* dnormalized = scratch.take(m.input_columns() + m.E + m.hidden_columns());
    A *inverse = dnormalized + m.input_columns(), *rotated = inverse + m.E;
    for (int64_t t = t0; t < t1; ++t)
      *at(m.dtau, t) = output_gate_backward_row(
          gate, at(m.hidden, t * m.hidden_columns()), at(m.gates, t * m.E),
          at(m.dmixed, t * m.mixed_columns()), at(m.dgates, t * m.E),
          at(m.normalized, t * m.input_columns()), at(m.dlogits, t * m.E),
          at(m.dhidden, t * m.hidden_columns()), inverse, dnormalized, rotated);
  }
};

template <class T>
constexpr DenseKernels dense_table() {
  using D = DenseProducts<T>;
  using M = Mixes<acc_t<T>>;
  return {D::shrink,
          D::expand,
          D::template outer<T>,
          D::template outer<acc_t<T>>,
          D::widen,
          D::round,
          {M::gated_forward, M::gated_backward},
          {M::grid_forward, M::grid_backward},
          {M::averaged_forward, M::averaged_backward},
          {M::output_gate_forward, M::output_gate_backward}};
}

}  // namespace MOELORA_LEVEL
}  // namespace moelora
