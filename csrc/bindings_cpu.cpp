// The operators of moelora_ops/ops.py on CPU tensors: allocate, fill the plain structs of
// cpu/kernels.h, split the work over torch's threads.  The only file that knows tensors, and only
// through the LibTorch stable ABI. Arguments were validated in Python (moelora_ops/functional.py);
// what is checked here would corrupt memory.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "cpu/kernels.h"
#include "cpu/scratch.h"

namespace {

using moelora::Dropout;
using moelora::DType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::Double: return DType::kFloat64;
    default:
      STD_TORCH_CHECK(false, "x: the cpu kernels compute in float32, bfloat16, float16, float64");
  }
}

ScalarType accumulator_of(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}
const void* read(const Tensor& t) { return t.const_data_ptr(); }
const void* read(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

// Distance between rows of a [rows, columns] tensor whose columns are contiguous.
int64_t row_stride(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && (t.numel() == 0 || t.size(1) == 1 || t.stride(1) == 1), name,
                  ": wanted a matrix with contiguous rows");
  return t.stride(0);
}

void check_contiguous(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous(), name, ": wanted a contiguous tensor");
}

// Runs f(begin, end) over [0, n) in pieces whose ends are multiples of `unit`.
template <class F>
void split(int64_t n, int64_t unit, const F& f) {
  const int64_t units = (n + unit - 1) / unit;
  torch::stable::parallel_for(
      0, units, 1, [&](int64_t begin, int64_t end) { f(begin * unit, std::min(n, end * unit)); });
}

// Column pieces: whole cache lines of any type and whole tiles of any level.
constexpr int64_t kColumnUnit = 128;

// Fewer tokens than this share threads within a token instead of between tokens.
constexpr int64_t kSmallT = moelora::kTokenUnit;

void fill_common(moelora::Topk& p, const Tensor& x, const Tensor& lora_down, const Tensor& lora_up,
                 const Tensor& router, int64_t top_k, double scale, bool renormalize,
                 bool dropout_per_expert, bool accumulate, bool stacked) {
  check_contiguous(lora_down, "lora_down");
  check_contiguous(lora_up, "lora_up");
  check_contiguous(router, "router");
  p.T = x.size(0);
  p.K = lora_down.size(2);
  p.N = lora_up.size(2);
  p.E = static_cast<int>(lora_down.size(0));
  p.r = static_cast<int>(lora_down.size(1));
  p.k = static_cast<int>(top_k);
  p.renormalize = renormalize;
  p.dropout_per_expert = dropout_per_expert;
  p.accumulate = accumulate;
  p.stacked = stacked;
  p.scale = scale;
  p.x = read(x);
  p.ldx = row_stride(x, "x");
  p.lora_down = read(lora_down);
  p.lora_up = read(lora_up);
  p.router = read(router);
}

std::optional<Dropout> make_dropout(const std::optional<Tensor>& seed, double p) {
  if (p <= 0) return std::nullopt;
  STD_TORCH_CHECK(seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                  "seed: wanted an int64 tensor of one element, as dropout > 0");
  return moelora::make_dropout(*static_cast<const int64_t*>(seed->const_data_ptr()), p);
}

// prob_sums [E] from the partial sums, in order; counts [E] from the choices.
template <class A>
void sum_routing(const moelora::TopkForward& p, int64_t* counts, A* prob_sums) {
  std::fill(counts, counts + p.E, 0);
  std::fill(prob_sums, prob_sums + p.E, A(0));
  for (int64_t q = 0; q < p.T * p.k; ++q) ++counts[p.selected[q]];
  const int64_t parts = (p.T + moelora::kTokenUnit - 1) / moelora::kTokenUnit;
  const A* partials = static_cast<const A*>(p.prob_partials);
  for (int64_t i = 0; i < parts; ++i)
    for (int e = 0; e < p.E; ++e) prob_sums[e] += partials[i * p.E + e];
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> topk_forward(
    const Tensor& x, const Tensor& lora_down, const Tensor& lora_up, const Tensor& router,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& seed, const Tensor& y,
    int64_t top_k, double scale, bool renormalize, double dropout, bool dropout_per_expert,
    bool accumulate, bool stacked) {
  moelora::TopkForward p{};
  fill_common(p, x, lora_down, lora_up, router, top_k, scale, renormalize, dropout_per_expert,
              accumulate, stacked);
  const std::optional<Dropout> masks = make_dropout(seed, dropout);
  p.dropout = masks ? &*masks : nullptr;
  p.bias = read(bias);
  p.y = data<void>(y);
  p.ldy = row_stride(y, "y");

  const ScalarType wide = accumulator_of(x);
  Tensor hidden = empty(x, {p.T, static_cast<int64_t>(p.rows()) * p.r}, wide);
  Tensor logits = empty(x, {p.T, p.E}, wide);
  Tensor selected = empty(x, {p.T, p.k}, ScalarType::Int);
  Tensor weights = empty(x, {p.T, p.k}, wide);
  Tensor counts = empty(x, {p.E}, ScalarType::Long);
  Tensor prob_sums = empty(x, {p.E}, wide);
  static thread_local moelora::Scratch<double> partials;
  p.hidden = data<void>(hidden);
  p.logits = data<void>(logits);
  p.selected = data<int32_t>(selected);
  p.weights = data<void>(weights);
  p.prob_partials = partials.take((p.T + moelora::kTokenUnit - 1) / moelora::kTokenUnit * p.E + 1);

  const moelora::Kernels& kernels = moelora::kernels(dtype_of(x));
  if (p.T >= kSmallT || p.dropout) {
    split(p.T, moelora::kTokenUnit, [&](int64_t t0, int64_t t1) {
      kernels.topk_tokens(p, t0, t1);
      kernels.topk_expand(p, t0, t1, 0, p.N);
    });
  } else if (p.T > 0) {
    split(p.E, 4, [&](int64_t e0, int64_t e1) { kernels.topk_logits(p, e0, e1); });
    kernels.topk_route(p, 0, p.T);
    split(moelora::topk_hidden_units(p), 1,
          [&](int64_t u0, int64_t u1) { kernels.topk_hidden(p, u0, u1); });
    split(p.N, kColumnUnit,
          [&](int64_t c0, int64_t c1) { kernels.topk_expand(p, 0, p.T, c0, c1); });
  }
  if (wide == ScalarType::Double)
    sum_routing(p, data<int64_t>(counts), data<double>(prob_sums));
  else
    sum_routing(p, data<int64_t>(counts), data<float>(prob_sums));
  return {hidden, logits, selected, weights, counts, prob_sums};
}

std::tuple<Tensor, Tensor, Tensor> topk_backward(
    const Tensor& dy, const Tensor& x, const Tensor& lora_down, const Tensor& lora_up,
    const Tensor& router, const std::optional<Tensor>& seed, const Tensor& hidden,
    const Tensor& logits, const Tensor& selected, const Tensor& weights,
    const std::optional<Tensor>& dprob_sums, const Tensor& dx, double scale, bool renormalize,
    double dropout, bool dropout_per_expert, bool accumulate, bool stacked, bool need_dx,
    bool need_dparams) {
  moelora::TopkBackward p{};
  fill_common(p, x, lora_down, lora_up, router, selected.size(1), scale, renormalize,
              dropout_per_expert, accumulate, stacked);
  const std::optional<Dropout> masks = make_dropout(seed, dropout);
  p.dropout = masks ? &*masks : nullptr;
  check_contiguous(hidden, "hidden");
  STD_TORCH_CHECK(hidden.size(1) == static_cast<int64_t>(p.rows()) * p.r,
                  "hidden: is not of this strategy's layout");
  p.hidden = data<void>(hidden);
  p.logits = data<void>(logits);
  p.selected = data<int32_t>(selected);
  p.weights = data<void>(weights);
  p.dy = read(dy);
  p.lddy = row_stride(dy, "dy");
  p.dprob_sums = read(dprob_sums);
  if (need_dx) {
    p.dx = data<void>(dx);
    p.lddx = row_stride(dx, "dx");
  }

  const ScalarType wide = accumulator_of(x), narrow = x.scalar_type();
  const auto like = [&](const Tensor& t) {
    return need_dparams ? torch::stable::new_empty(t, t.sizes(), narrow) : empty(t, {0}, narrow);
  };
  Tensor dlora_down = like(lora_down), dlora_up = like(lora_up), drouter = like(router);
  Tensor dhidden = empty(x, {p.T, static_cast<int64_t>(p.rows()) * (p.r + 1)}, wide);
  Tensor hidden_out =
      empty(x, {need_dparams ? p.T : 0, static_cast<int64_t>(p.rows()) * p.r}, wide);
  Tensor dlogits = empty(x, {p.dense_router() ? p.T : 0, p.E}, wide);
  p.dhidden = data<void>(dhidden);
  p.dlogits = data<void>(dlogits);
  if (need_dparams) {
    p.hidden_out = data<void>(hidden_out);
    p.dlora_down = data<void>(dlora_down);
    p.dlora_up = data<void>(dlora_up);
    p.drouter = data<void>(drouter);
  }

  const moelora::Kernels& kernels = moelora::kernels(dtype_of(x));
  split(p.T, moelora::kTokenUnit,
        [&](int64_t t0, int64_t t1) { kernels.topk_backward_tokens(p, t0, t1); });
  if (need_dparams) {
    split(p.K, kColumnUnit, [&](int64_t c0, int64_t c1) { kernels.topk_backward_down(p, c0, c1); });
    split(p.N, kColumnUnit, [&](int64_t c0, int64_t c1) { kernels.topk_backward_up(p, c0, c1); });
  }
  return {dlora_down, dlora_up, drouter};
}

Tensor small_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const int64_t T = x.size(0), K = x.size(1), N = weight.size(0);
  Tensor y = empty(x, {T, N}, x.scalar_type());
  const moelora::Kernels& kernels = moelora::kernels(dtype_of(x));
  const int64_t ldx = row_stride(x, "x"), ldw = row_stride(weight, "weight");
  split(N, kColumnUnit, [&](int64_t n0, int64_t n1) {
    kernels.small_linear(read(x), ldx, T, read(weight), ldw, read(bias), K, n0, n1, data<void>(y),
                         N);
  });
  return y;
}

std::string cpu_isa() { return moelora::isa_level(); }
std::string cpu_isa_levels() { return moelora::isa_levels_built(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(moelora_ops, m) {
  m.def("cpu_isa() -> str");
  m.def("cpu_isa_levels() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(moelora_ops, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_isa_levels", TORCH_BOX(&cpu_isa_levels));
}

STABLE_TORCH_LIBRARY_IMPL(moelora_ops, CPU, m) {
  m.impl("topk_forward", TORCH_BOX(&topk_forward));
  m.impl("topk_backward", TORCH_BOX(&topk_backward));
  m.impl("small_linear", TORCH_BOX(&small_linear));
}

// An empty Python module, so that `import moelora_ops._C` loads the library; no other Python symbol
// is used.
#include <Python.h>

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
