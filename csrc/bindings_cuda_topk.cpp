// The topk operators of moelora_ops/ops.py on CUDA tensors: allocate, fill the plain structs of
// cuda/kernels.h, launch.  Arguments were validated in Python (moelora_ops/functional); what is
// checked here would corrupt memory.

#include "bindings_cuda_grouped.h"

namespace {

using namespace moelora::tensors;
namespace cuda = moelora::cuda;

TopkSizes sizes_of(const Tensor& x, const Tensor& lora_down, const Tensor& lora_up,
                   const Tensor& router, int64_t top_k, bool stacked) {
  TopkSizes n = check_topk(x, lora_down, lora_up, router, top_k, stacked);
  n.segments = !stacked;
  const int64_t most = INT32_MAX / n.k;  // grouped, a pair of a token and a slot is an int32
  STD_TORCH_CHECK(stacked || n.T <= most, "x: wanted at most ", most, " tokens, got ", n.T);
  return n;
}

// Without `mixed`.
cuda::Topk topk_of(const TopkSizes& n, const Tensor& saved, double scale, bool renormalize,
                   double dropout) {
  cuda::Topk p = {};
  p.E = n.E;
  p.r = n.r;
  p.k = n.k;
  p.renormalize = renormalize;
  p.scale = scale;
  p.inv_keep = 1 / (1 - dropout);
  point_into_saved(p, n, saved);
  return p;
}

std::tuple<Tensor, Tensor, Tensor> topk_forward(const Tensor& x, const Tensor& lora_down,
                                                const Tensor& lora_up, const Tensor& router,
                                                const std::optional<Tensor>& bias,
                                                const std::optional<Tensor>& seed, const Tensor& y,
                                                int64_t top_k, double scale, bool renormalize,
                                                double dropout, bool dropout_per_expert,
                                                bool stacked, bool accumulate) {
  const TopkSizes n = sizes_of(x, lora_down, lora_up, router, top_k, stacked);
  const int R = n.E * n.r;
  check_output(y, x, n.N, "y");
  check_bias(bias, x, n.N);
  const cuda::Masks masks = make_masks(seed, dropout, dropout_per_expert);

  const Call call(x);
  const moelora::DType dtype = dtype_of(x);
  const ScalarType wide = accumulator_of(x);
  Tensor saved = call.empty({n.saved()}, wide);
  Tensor counts = call.empty({n.E}, ScalarType::Long);
  Tensor prob_sums = call.empty({n.E}, wide);
  if (n.T == 0) {
    set_zero(call, {&counts, &prob_sums});
    return {saved, counts, prob_sums};
  }

  const cuda::Topk common = topk_of(n, saved, scale, renormalize, dropout);
  if (!stacked) {
    const Grouped grouped = {call, n, x, lora_down, lora_up, router, common, masks};
    grouped_forward(grouped, bias, y, accumulate, saved, counts, prob_sums);
    return {saved, counts, prob_sums};
  }
  cuda::Shrink shrink =
      shrink_of(vectors_of(x, "x"), {read(lora_down), read(router), R, n.r, n.E}, masks);
  cuda::TopkForward mix = {common};
  cuda::Expand expand = expand_of(outputs_of(y, "y"), {read(lora_up), nullptr, R, n.r, 0}, nullptr,
                                  {read(bias), accumulate});
  Workspace workspace;
  const cuda::ShrinkPlan plan = plan_mix(workspace, dtype, shrink, mix, expand);
  const int64_t blocks = plan.few ? 1 : plan.mix_blocks;
  workspace.reserve(blocks * n.E, element_size(prob_sums), &mix.prob_partials);
  const int64_t count_partials = workspace.reserve(blocks * n.E, sizeof(int32_t));
  workspace.allocate(call);
  mix.count_partials = static_cast<int32_t*>(workspace.at(count_partials));
  expand.statistics = {mix.prob_partials,     mix.count_partials,   blocks, n.E,
                       data<void>(prob_sums), data<int64_t>(counts)};
  cuda::launch_mix(dtype, shrink, mix, plan, expand, call.stream());
  return {saved, counts, prob_sums};
}

std::tuple<Tensor, Tensor, Tensor> topk_backward(
    const Tensor& dy, const Tensor& x, const Tensor& lora_down, const Tensor& lora_up,
    const Tensor& router, const std::optional<Tensor>& seed, const Tensor& saved,
    const std::optional<Tensor>& dprob_sums, const Tensor& dx, int64_t top_k, double scale,
    bool renormalize, double dropout, bool dropout_per_expert, bool stacked, bool accumulate,
    bool need_dx, bool need_dparams) {
  const TopkSizes n = sizes_of(x, lora_down, lora_up, router, top_k, stacked);
  const int R = n.E * n.r;
  check_output(dy, x, n.N, "dy");
  if (need_dx) check_like(dx, x, shape_of(x), "dx");
  if (dprob_sums) {
    STD_TORCH_CHECK(dprob_sums->scalar_type() == saved.scalar_type() && dprob_sums->numel() == n.E,
                    "dprob_sums: wanted ", n.E, " elements like saved's");
    check_contiguous(*dprob_sums, "dprob_sums");
  }
  const cuda::Masks masks = make_masks(seed, dropout, dropout_per_expert);

  const Call call(x);
  const moelora::DType dtype = dtype_of(x);
  const int64_t size = element_size(x);
  const auto gradient = [&](const Tensor& t) {
    return call.empty(need_dparams ? shape_of(t) : std::vector<int64_t>{0}, t.scalar_type());
  };
  Tensor dlora_down = gradient(lora_down), dlora_up = gradient(lora_up), drouter = gradient(router);
  if (n.T == 0) {
    set_zero(call, {&dlora_down, &dlora_up, &drouter});
    return {dlora_down, dlora_up, drouter};
  }

  const cuda::Topk common = topk_of(n, saved, scale, renormalize, dropout);
  if (!stacked) {
    const Grouped grouped = {call, n, x, lora_down, lora_up, router, common, masks};
    grouped_backward(grouped, dy, saved, dprob_sums, need_dx ? &dx : nullptr, accumulate,
                     need_dparams, dlora_down, dlora_up, drouter);
    return {dlora_down, dlora_up, drouter};
  }
  const Vectors dys = vectors_of(dy, "dy");
  const cuda::Rows up = {read(lora_up), nullptr, R, n.r, 0};
  const cuda::Rows down = {read(lora_down), read(router), R, n.r, n.E};
  cuda::Shrink shrink = shrink_of(dys, up);
  cuda::TopkBackward mix = {common};
  mix.dprob_sums = read(dprob_sums);
  cuda::Outer outer = {};
  outer.T = n.T;
  if (need_dparams) {
    outer.products[0] = outer_of(dys, up);
    outer.products[1] = outer_of(vectors_of(x, "x"), down, masks);
    set_outputs(outer, saved.scalar_type(), {&dlora_up, &dlora_down, &drouter});
  }

  Workspace workspace;
  const cuda::ShrinkPlan plan = plan_mix(workspace, dtype, shrink, mix);
  workspace.reserve(n.T * pitch(down), size, &mix.gradients);
  workspace.reserve(need_dparams ? n.T * pitch(up) : 0, size, &mix.mixed);
  plan_outer(workspace, dtype, outer);
  workspace.allocate(call);
  cuda::launch_mix(dtype, shrink, mix, plan, call.stream());

  if (need_dx)
    cuda::launch_expand(
        dtype, expand_of(outputs_of(dx, "dx"), down, mix.gradients, {nullptr, accumulate}, masks),
        call.stream());
  outer.products[0].h = mix.mixed;
  outer.products[1].h = mix.gradients;
  cuda::launch_outer(dtype, outer, call.stream());
  return {dlora_down, dlora_up, drouter};
}

}  // namespace

#ifdef MOELORA_CUDA_ARCHS
namespace {
std::string cuda_archs() { return MOELORA_CUDA_ARCHS; }
}  // namespace
STABLE_TORCH_LIBRARY_FRAGMENT(moelora_ops, m) { m.def("cuda_archs() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(moelora_ops, CompositeExplicitAutograd, m) {
  m.impl("cuda_archs", TORCH_BOX(&cuda_archs));
}
#endif

STABLE_TORCH_LIBRARY_IMPL(moelora_ops_cuda, MOELORA_CUDA_KEY, m) {
  m.impl("topk_forward", TORCH_BOX(&topk_forward));
  m.impl("topk_backward", TORCH_BOX(&topk_backward));
}
