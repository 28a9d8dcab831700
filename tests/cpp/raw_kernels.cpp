// The row kernels of csrc on numpy arrays, for tests/test_kernels.py, which builds this file once
// per ISA level with -DMOELORA_LEVEL=<level> -DMOELORA_MODULE=<name>.  Never part of the wheel:
// pybind11 has no limited-API mode.
//
// bfloat16 and float16 travel as uint16.  Kernels are named <kernel>_<dtype> and write into the
// given arrays, which may be views with any distance between rows.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "cpu/expand.h"
#include "cpu/linear.h"
#include "cpu/outer.h"
#include "cpu/shrink.h"
#include "mix/topk.h"

namespace py = pybind11;

namespace moelora {
namespace MOELORA_LEVEL {
namespace {

// ---- arrays as the kernels see them

template <class T>
struct Storage {
  using type = T;
};
template <>
struct Storage<BFloat16> {
  using type = uint16_t;
};
template <>
struct Storage<Float16> {
  using type = uint16_t;
};

// A matrix, or a vector as one row; never a converted copy.
template <class T>
struct Rows {
  T* data;
  int64_t rows, columns, stride;

  explicit Rows(const py::array& a) {
    if (!py::isinstance<py::array_t<typename Storage<T>::type>>(a))
      throw py::type_error("wanted elements of " + std::to_string(sizeof(T)) + " bytes, got " +
                           std::string(py::str(a.dtype())));
    const auto dims = a.ndim();
    if (dims < 1 || dims > 2) throw py::value_error("wanted a vector or a matrix");
    rows = dims == 2 ? a.shape(0) : 1;
    columns = a.shape(dims - 1);
    if (columns > 1 && a.strides(dims - 1) != sizeof(T))
      throw py::value_error("wanted contiguous rows");
    stride = dims == 2 ? a.strides(0) / static_cast<int64_t>(sizeof(T)) : columns;
    data = static_cast<T*>(const_cast<void*>(a.data()));
  }
  T* row(int64_t i) const { return data + i * stride; }
  std::vector<const T*> pointers() const {
    std::vector<const T*> out(rows);
    for (int64_t i = 0; i < rows; ++i) out[i] = row(i);
    return out;
  }
};

template <class T>
using Array = py::array_t<typename Storage<T>::type>;

void expect(bool condition, const char* what) {
  if (!condition) throw py::value_error(what);
}

// out[i] = f(in[i])
template <class Out, class In, class F>
Array<Out> each(const py::array& input, const F& f) {
  const Rows<In> in(input);
  expect(in.rows == 1, "wanted a vector");
  Array<Out> out(in.columns);
  Out* to = Rows<Out>(out).data;
  for (int64_t i = 0; i < in.columns; ++i) to[i] = f(in.data[i]);
  return out;
}

// ---- row mathematics, A = float or double

template <class A>
void bind_rows(py::module_& m, const std::string& name) {
  m.def(("exp_nonpositive_" + name).c_str(),
        [](const py::array& x) { return each<A, A>(x, [](A v) { return exp_nonpositive(v); }); });
  m.def(("order_key_" + name).c_str(), [](const py::array& x) {
    return each<decltype(order_key(A())), A>(x, [](A v) { return order_key(v); });
  });
  m.def(("topk_forward_row_" + name).c_str(), [](const py::array& x, int k, bool renormalize) {
    const Rows<A> logits(x);
    const int E = static_cast<int>(logits.columns);
    expect(0 < k && k <= E, "k: wanted 1..E");
    py::array_t<int32_t> selected(k);
    py::array_t<A> weights(k), probs(E);
    topk_forward_row(logits.data, E, k, renormalize, selected.mutable_data(),
                     weights.mutable_data(), probs.mutable_data());
    return py::make_tuple(selected, weights, probs);
  });
  m.def(("softmax_row_" + name).c_str(), [](const py::array& x) {
    const Rows<A> logits(x);
    py::array_t<A> probs(logits.columns);
    softmax_row(logits.data, static_cast<int>(logits.columns), probs.mutable_data());
    return probs;
  });
  m.def(("dweight_row_" + name).c_str(), [](const py::array& x, const py::array& y, A scale) {
    const Rows<A> dhidden_out(x), hidden(y);
    return dweight_row(dhidden_out.data, hidden.data, static_cast<int>(hidden.columns), scale);
  });
  m.def(("topk_backward_selected_" + name).c_str(), [](const py::array& x, const py::array& y) {
    const Rows<A> weights(x), dweights(y);
    py::array_t<A> dlogits(weights.columns);
    topk_backward_selected(weights.data, dweights.data, static_cast<int>(weights.columns),
                           dlogits.mutable_data());
    return dlogits;
  });
  m.def(("softmax_backward_row_" + name).c_str(), [](const py::array& x, const py::array& y,
                                                     const py::array& z) {
    const Rows<A> probs(x), dprobs(y), dlogits(z);
    softmax_backward_row(probs.data, dprobs.data, static_cast<int>(probs.columns), dlogits.data);
  });
}

template <int kLanes>
py::array_t<uint32_t> philox(int64_t seed, uint32_t group, uint64_t token, uint32_t expert) {
  py::array_t<uint32_t> out({4, kLanes});
  philox_words<kLanes>(make_dropout(seed, 0.5), group, token, expert,
                       reinterpret_cast<uint32_t(*)[kLanes]>(out.mutable_data()));
  return out;
}

// ---- conversions, T = BFloat16 or Float16

template <class T>
void bind_conversions(py::module_& m, const std::string& name) {
  constexpr int64_t kWidth = kLanes<float>;
  m.def(("widen_" + name).c_str(),
        [](const py::array& x) { return each<float, T>(x, [](T v) { return to_acc(v); }); });
  m.def(("narrow_" + name).c_str(), [](const py::array& x) {
    return each<T, float>(x, [](float v) { return from_acc<T>(v); });
  });
  m.def(("load_" + name).c_str(), [](const py::array& x) {
    const Rows<T> in(x);
    py::array_t<float> out(in.columns);
    float* to = out.mutable_data();
    int64_t i = 0;
    for (; i + kWidth <= in.columns; i += kWidth) store(to + i, load(in.data + i));
    if (i < in.columns) {
      const vec<float> last = load_partial(in.data + i, in.columns - i);
      for (int64_t l = 0; i + l < in.columns; ++l) to[i + l] = last[l];
      for (int64_t l = in.columns - i; l < kWidth; ++l)
        expect(last[l] == 0, "load_partial: wanted zeros beyond the end");
    }
    return out;
  });
  m.def(("store_" + name).c_str(), [](const py::array& x) {
    const Rows<float> in(x);
    expect(in.columns % kWidth == 0, "wanted whole registers");
    Array<T> out(in.columns);
    for (int64_t i = 0; i < in.columns; i += kWidth)
      store(Rows<T>(out).data + i, load(in.data + i));
    return out;
  });
}

// ---- the skinny products

template <class T>
Output<T> output(const py::array& y, const py::object& bias, bool accumulate) {
  const Rows<T> to(y);
  return {to.data, to.stride, bias.is_none() ? nullptr : Rows<T>(bias.cast<py::array>()).data,
          accumulate};
}

template <class T>
Linear linear_of(const py::array& x, const py::array& weight, const py::object& bias,
                 const py::array& y) {
  const Rows<T> v(x), w(weight), to(y);
  return {v.rows,  v.columns, v.data, v.stride, w.data, w.stride, output<T>(y, bias, false).bias,
          to.data, to.stride};
}

// Groups of r rows as a table of panel entries, each group padded to whole entries.
template <class P, class T>
std::vector<const T*> table_of(const Rows<T>& rows, int64_t r) {
  std::vector<const T*> out;
  for (int64_t i = 0; i < rows.rows; ++i) {
    out.push_back(rows.row(i));
    if ((i + 1) % r == 0)
      while (out.size() % P::kRowsPerEntry) out.push_back(nullptr);
  }
  return out;
}

template <class T>
void bind_products(py::module_& m, const std::string& name) {
  using A = acc_t<T>;
  using P = typename PanelOf<T>::type;
  using word = typename P::word;

  // x [n, K], w [rows, K], out A [n, rows]
  m.def(("shrink_" + name).c_str(),
        [](const py::array& x, const py::array& w, const py::array& out) {
          const Rows<T> v(x), rows(w);
          const Rows<A> to(out);
          shrink<T>(v.rows, v.pointers().data(), rows.data, rows.stride, rows.rows, v.columns,
                    to.data, to.stride);
        });
  // x [tokens, K], weight [N, K], bias [N] or None, y [tokens, N]
  m.def(("small_linear_" + name).c_str(),
        [](const py::array& x, const py::array& weight, const py::object& bias, int64_t n0,
           int64_t n1,
           const py::array& y) { small_linear<T>(linear_of<T>(x, weight, bias, y), n0, n1); });
  m.def(("linear_" + name).c_str(),
        [](const py::array& x, const py::array& weight, const py::object& bias, int64_t n0,
           int64_t n1, const py::array& y) {
          const Linear p = linear_of<T>(x, weight, bias, y);
          linear<T>(p, 0, p.T, n0, n1);
        });
  // dy [tokens, N], weight [N, K], dx [tokens, K]
  m.def(("linear_backward_" + name).c_str(), [](const py::array& dy, const py::array& weight,
                                                int64_t c0, int64_t c1, const py::array& dx) {
    const Linear p = linear_of<T>(dy, weight, py::none(), dx);
    linear_backward<T>(p, 0, p.T, c0, c1);
  });
  // rows [groups * r, C], chosen int32 [tokens, slots] names groups, h A [tokens, slots * r], y
  // [tokens, C]
  m.def(("expand_sparse_" + name).c_str(),
        [](const py::array& matrix, int r, const py::array& groups, const py::array& coefficients,
           int64_t c0, int64_t c1, const py::object& bias, bool accumulate, const py::array& y) {
          const Rows<T> rows(matrix);
          const Rows<int32_t> chosen(groups);
          const Rows<A> h(coefficients);
          const auto pointers = table_of<P>(rows, r);
          const int per_group = (r + P::kRowsPerEntry - 1) / P::kRowsPerEntry;
          const int per_token = per_group * static_cast<int>(chosen.columns);
          std::vector<int32_t> entry;
          std::vector<word> words(h.rows * per_token);
          for (int64_t t = 0; t < h.rows; ++t)
            for (int64_t s = 0; s < chosen.columns; ++s) {
              P::pack(h.row(t) + s * r, r, words.data() + entry.size());
              for (int i = 0; i < per_group; ++i) entry.push_back(chosen.row(t)[s] * per_group + i);
            }
          expand_sparse<T>(
              {pointers.data(), static_cast<int64_t>(pointers.size()) / P::kRowsPerEntry}, 0,
              h.rows, c0, c1, per_token, entry.data(), words.data(),
              output<T>(y, bias, accumulate));
        });
  // rows [R, C], h A [tokens, R], y [tokens, C]
  m.def(("expand_dense_" + name).c_str(),
        [](const py::array& matrix, const py::array& coefficients, int64_t c0, int64_t c1,
           const py::object& bias, bool accumulate, const py::array& y) {
          const Rows<T> rows(matrix);
          const Rows<A> h(coefficients);
          const auto pointers = table_of<P>(rows, rows.rows);
          const int64_t entries = static_cast<int64_t>(pointers.size()) / P::kRowsPerEntry;
          std::vector<word> words(h.rows * entries);
          for (int64_t t = 0; t < h.rows; ++t)
            P::pack(h.row(t), static_cast<int>(rows.rows), words.data() + t * entries);
          expand_dense<T>({pointers.data(), entries}, 0, h.rows, c0, c1, words.data(),
                          output<T>(y, bias, accumulate));
        });
  // rows [R, C], entry int32 [tokens, segments * n] names rows, h A like entry, mask_expert int32
  // [tokens, segments]
  m.def(("expand_masked_" + name).c_str(),
        [](const py::array& matrix, const py::array& entries, const py::array& coefficients,
           int64_t seed, double p, const py::array& experts, int64_t c0, int64_t c1,
           const py::object& bias, bool accumulate, const py::array& y) {
          const Rows<T> rows(matrix);
          const Rows<int32_t> entry(entries), mask_expert(experts);
          const Rows<A> h(coefficients);
          const auto pointers = rows.pointers();
          const int segments = static_cast<int>(mask_expert.columns);
          expand_masked<T>({pointers.data(), rows.rows}, 0, h.rows, c0, c1, segments,
                           static_cast<int>(h.columns) / segments, entry.data, h.data,
                           make_dropout(seed, p), mask_expert.data, output<T>(y, bias, accumulate));
        });
  // v [n, C], coefficients A [n, rows], out A [rows, c1 - c0]
  m.def(("outer_" + name).c_str(), [](const py::array& x, const py::array& coefficients, int64_t c0,
                                      int64_t c1, const py::array& out) {
    const Rows<A> h(coefficients), to(out);
    auto rows = Rows<T>(x).pointers();
    const auto pointers = h.pointers();
    const int64_t n = h.rows;
    rows.resize(n + 1);
    outer<T>(n, rows.data(), pointers.data(), static_cast<int>(h.columns), c0, c1, to.data,
             to.stride);
  });
}

// Levels whose instructions this processor has.
py::list levels_here() {
  py::list out;
  out.append("portable");
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx2) out.append("avx2");
  if (avx512) out.append("avx512");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) out.append("avx512_bf16");
#endif
  return out;
}

}  // namespace

PYBIND11_MODULE(MOELORA_MODULE, m) {
  m.def("levels_here", levels_here);
  m.def("philox_words_1", philox<1>);
  m.def("philox_words_16", philox<16>);
  bind_rows<float>(m, "float32");
  bind_rows<double>(m, "float64");
  bind_conversions<BFloat16>(m, "bfloat16");
  bind_conversions<Float16>(m, "float16");
  bind_products<float>(m, "float32");
  bind_products<BFloat16>(m, "bfloat16");
}

}  // namespace MOELORA_LEVEL
}  // namespace moelora
