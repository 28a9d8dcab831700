// The topk operators of moelora_ops/ops.py on CPU tensors: allocate, fill the plain structs of
// cpu/kernels.h, split the work over torch's threads.  Arguments were validated in Python
// (moelora_ops/functional); what is checked here would corrupt memory.

#include "bindings_topk.h"

namespace {

using namespace moelora::tensors;

TopkSizes fill_common(moelora::Topk& p, const Tensor& x, const Tensor& lora_down,
                      const Tensor& lora_up, const Tensor& router, int64_t top_k, double scale,
                      bool renormalize, bool dropout_per_expert, bool stacked, bool accumulate) {
  const TopkSizes n = check_topk(x, lora_down, lora_up, router, top_k, stacked);
  p.T = n.T;
  p.K = n.K;
  p.N = n.N;
  p.E = n.E;
  p.r = n.r;
  p.k = n.k;
  p.renormalize = renormalize;
  p.dropout_per_expert = dropout_per_expert;
  p.accumulate = accumulate;
  p.stacked = stacked;
  p.scale = scale;
  p.x = read(x);
  p.ldx = n.ldx;
  p.lora_down = read(lora_down);
  p.lora_up = read(lora_up);
  p.router = read(router);
  return n;
}

// prob_sums [E] from the partial sums, in order, and in double, as long inputs have thousands of
// parts; counts [E] from the choices.
template <class A>
void sum_routing(const moelora::TopkForward& p, int64_t* counts, A* prob_sums) {
  std::fill(counts, counts + p.E, 0);
  for (int64_t q = 0; q < p.T * p.k; ++q) ++counts[p.selected[q]];
  const int64_t parts = (p.T + moelora::kTokenUnit - 1) / moelora::kTokenUnit;
  const A* partials = static_cast<const A*>(p.prob_partials);
  std::vector<double> sums(p.E);
  for (int64_t i = 0; i < parts; ++i)
    for (int e = 0; e < p.E; ++e) sums[e] += partials[i * p.E + e];
  std::copy(sums.begin(), sums.end(), prob_sums);
}

std::tuple<Tensor, Tensor, Tensor> topk_forward(const Tensor& x, const Tensor& lora_down,
                                                const Tensor& lora_up, const Tensor& router,
                                                const std::optional<Tensor>& bias,
                                                const std::optional<Tensor>& seed, const Tensor& y,
                                                int64_t top_k, double scale, bool renormalize,
                                                double dropout, bool dropout_per_expert,
                                                bool stacked, bool accumulate) {
  moelora::TopkForward p{};
  const TopkSizes sizes = fill_common(p, x, lora_down, lora_up, router, top_k, scale, renormalize,
                                      dropout_per_expert, stacked, accumulate);
  const std::optional<Dropout> masks = make_dropout(seed, dropout);
  p.dropout = masks ? &*masks : nullptr;
  check_output(y, x, p.N, "y");
  check_bias(bias, x, p.N);
  p.bias = read(bias);
  p.y = data<void>(y);
  p.ldy = rows_of(y, "y").stride;

  const ScalarType wide = accumulator_of(x);
  Tensor saved = empty({sizes.saved()}, wide);
  Tensor counts = empty({p.E}, ScalarType::Long);
  Tensor prob_sums = empty({p.E}, wide);
  static thread_local moelora::Scratch<double> partials;
  point_into_saved(p, sizes, saved);
  p.prob_partials = partials.take((p.T + moelora::kTokenUnit - 1) / moelora::kTokenUnit * p.E + 1);

  const moelora::Kernels& kernels = moelora::kernels(dtype_of(x));
  if (p.T > kColumnSplitT) {
    split(p.T, moelora::kTokenUnit, [&](int64_t t0, int64_t t1) {
      kernels.topk_tokens(p, t0, t1);
      kernels.topk_expand(p, t0, t1, 0, p.N);
    });
  } else if (p.T > 0) {
    if (p.T >= kSmallT || p.dropout) {
      split(p.T, moelora::kTokenUnit,
            [&](int64_t t0, int64_t t1) { kernels.topk_tokens(p, t0, t1); });
    } else {
      if (p.T * p.E * p.K > kSerialProducts)
        split(p.E, 4, [&](int64_t e0, int64_t e1) { kernels.topk_logits(p, e0, e1); });
      else
        kernels.topk_logits(p, 0, p.E);
      kernels.topk_route(p, 0, p.T);
      split(moelora::topk_hidden_units(p), 1,
            [&](int64_t u0, int64_t u1) { kernels.topk_hidden(p, u0, u1); });
    }
    split(p.N, kColumnUnit,
          [&](int64_t c0, int64_t c1) { kernels.topk_expand(p, 0, p.T, c0, c1); });
  }
  if (wide == ScalarType::Double)
    sum_routing(p, data<int64_t>(counts), data<double>(prob_sums));
  else
    sum_routing(p, data<int64_t>(counts), data<float>(prob_sums));
  return {saved, counts, prob_sums};
}

std::tuple<Tensor, Tensor, Tensor> topk_backward(
    const Tensor& dy, const Tensor& x, const Tensor& lora_down, const Tensor& lora_up,
    const Tensor& router, const std::optional<Tensor>& seed, const Tensor& saved,
    const std::optional<Tensor>& dprob_sums, const Tensor& dx, int64_t top_k, double scale,
    bool renormalize, double dropout, bool dropout_per_expert, bool stacked, bool accumulate,
    bool need_dx, bool need_dparams) {
  moelora::TopkBackward p{};
  const TopkSizes sizes = fill_common(p, x, lora_down, lora_up, router, top_k, scale, renormalize,
                                      dropout_per_expert, stacked, accumulate);
  const std::optional<Dropout> masks = make_dropout(seed, dropout);
  p.dropout = masks ? &*masks : nullptr;
  point_into_saved(p, sizes, saved);
  check_output(dy, x, p.N, "dy");
  if (need_dx) check_like(dx, x, shape_of(x), "dx");
  p.dy = read(dy);
  p.lddy = rows_of(dy, "dy").stride;
  if (dprob_sums) check_contiguous(*dprob_sums, "dprob_sums");
  p.dprob_sums = read(dprob_sums);
  if (need_dx) {
    p.dx = data<void>(dx);
    p.lddx = rows_of(dx, "dx").stride;
  }

  const ScalarType narrow = x.scalar_type();
  const auto like = [&](const Tensor& t) {
    return empty(need_dparams ? shape_of(t) : std::vector<int64_t>{0}, narrow);
  };
  Tensor dlora_down = like(lora_down), dlora_up = like(lora_up), drouter = like(router);
  // dhidden, dlogits and hidden_out in one allocation.
  const int64_t rows = p.rows(), dhidden_size = p.T * rows * (p.r + 1), dlogits_size = p.T * p.E;
  const ScalarType wide = accumulator_of(x);
  Tensor workspace = empty({dhidden_size + dlogits_size + p.T * rows * p.r}, wide);
  const auto at = [&](int64_t offset) {
    return data<char>(workspace) + offset * accumulator_size(dtype_of(x));
  };
  p.dhidden = at(0);
  p.dlogits = at(dhidden_size);
  if (need_dparams) {
    p.hidden_out = at(dhidden_size + dlogits_size);
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

std::string cpu_isa() { return moelora::isa_level(); }
std::string cpu_isa_levels() { return moelora::isa_levels_built(); }
std::string cpu_vendor() { return moelora::cpu_vendor(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(moelora_ops, m) {
  m.def("cpu_isa() -> str");
  m.def("cpu_isa_levels() -> str");
  m.def("cpu_vendor() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(moelora_ops, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_isa_levels", TORCH_BOX(&cpu_isa_levels));
  m.impl("cpu_vendor", TORCH_BOX(&cpu_vendor));
}

STABLE_TORCH_LIBRARY_IMPL(moelora_ops, CPU, m) {
  m.impl("topk_forward", TORCH_BOX(&topk_forward));
  m.impl("topk_backward", TORCH_BOX(&topk_backward));
}

// An empty Python module, so that `import moelora_ops._C` loads the library; no other Python symbol
// is used.
#include <Python.h>

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
