// The topk operators by segments: every expert meets the tokens that chose it.  Part of
// bindings_cuda_topk.cpp, which checks and allocates what is returned.
#pragma once

#include "bindings_cuda_dense.h"
#include "bindings_topk.h"

namespace moelora::tensors {
namespace {

// What both directions take.
struct Grouped {
  const Call& call;
  const TopkSizes& n;
  const Tensor &x, &lora_down, &lora_up, &router;
  cuda::Topk mix;  // without `mixed`
  cuda::Masks masks;

  DType dtype() const { return dtype_of(x); }
  // Rows of one expert, of E that follow each other, and others below them.
  cuda::Rows rows(const Tensor& experts, const void* others = nullptr) const {
    return {read(experts), others, n.r, n.r, others ? n.E : 0};
  }
  cuda::Segments segments(const Tensor& saved) const {
    const int64_t size = element_size(saved);
    char* order = data<char>(saved) + n.behind_choices() * size;
    char* starts = order + n.T * n.k * size;
    return {reinterpret_cast<int32_t*>(order), reinterpret_cast<int32_t*>(starts), n.E, n.k};
  }
};

// Four launches, and one for each slot; three, if one block routes its tokens.
void grouped_forward(const Grouped& g, const std::optional<Tensor>& bias, const Tensor& y,
                     bool accumulate, const Tensor& saved, const Tensor& counts,
                     const Tensor& prob_sums) {
  const TopkSizes& n = g.n;
  const DType dtype = g.dtype();
  const cuda::Segments segments = g.segments(saved);
  const Vectors tokens = vectors_of(g.x, "x");
  cuda::Shrink logits = shrink_of(tokens, {read(g.router), nullptr, n.E, 1, 0});
  cuda::TopkRouting routing = {{g.mix}};
  cuda::SegmentSums sums = {g.mix.hidden, g.mix.inv_keep, nullptr, g.mix.weights, g.mix.scale};

  Workspace workspace;
  const cuda::ShrinkPlan plan = plan_mix(workspace, dtype, logits, routing);
  const int64_t ldm = cuda::padded(n.r);
  workspace.reserve(plan.mix_blocks * n.E, element_size(prob_sums), &routing.prob_partials);
  const int64_t tile_counts = workspace.reserve(plan.mix_blocks * n.k * n.E, sizeof(int32_t));
  workspace.reserve(n.T * n.k * ldm, element_size(g.x), &sums.mixed);
  workspace.allocate(g.call);
  routing.count_partials = static_cast<int32_t*>(workspace.at(tile_counts));

  void* stream = g.call.stream();
  cuda::launch_mix(dtype, logits, routing, plan, stream);
  cuda::launch_sort(routing, n.T, plan, segments, data<int64_t>(counts), stream);
  cuda::launch_shrink_segments(dtype, shrink_of(tokens, g.rows(g.lora_down), g.masks), segments,
                               sums, stream);
  cuda::Expand expand =
      expand_of(outputs_of(y, "y"), g.rows(g.lora_up), sums.mixed, {read(bias), accumulate});
  expand.ldh = n.k * ldm;
  expand.statistics = {routing.prob_partials, nullptr, plan.mix_blocks, n.E,
                       data<void>(prob_sums), nullptr};
  cuda::launch_expand_segments(dtype, expand, segments, sums.mixed, stream);
}

// Two launches, one for each slot if there is a dx, and four for parameters.
void grouped_backward(const Grouped& g, const Tensor& dy, const Tensor& saved,
                      const std::optional<Tensor>& dprob_sums, const Tensor* dx, bool accumulate,
                      bool need_dparams, const Tensor& dlora_down, const Tensor& dlora_up,
                      const Tensor& drouter) {
  const TopkSizes& n = g.n;
  const DType dtype = g.dtype();
  const Vectors dys = vectors_of(dy, "dy"), tokens = vectors_of(g.x, "x");
  const cuda::Segments segments = g.segments(saved);
  cuda::GroupedBackward mix = {g.mix};
  mix.dprob_sums = read(dprob_sums);
  cuda::SegmentSums dmixed = {nullptr, 1, nullptr, nullptr, 1};
  const int64_t ldm = cuda::padded(n.r), ldf = cuda::padded(n.r + n.E), lde = cuda::padded(n.E);
  cuda::Outer experts = {}, router = {};
  experts.T = router.T = n.T;
  if (need_dparams) {
    experts.segments = segments;
    const auto product = [&](const Vectors& v, const cuda::Masks& masks) {
      cuda::OuterProduct p = outer_of(v, {nullptr, nullptr, n.r, n.r, 0}, masks);
      p.batch.count = n.E;
      p.batch.rows = n.r * v.columns;
      return p;
    };
    experts.products[0] = product(dys, {});
    experts.products[1] = product(tokens, g.masks);
    router.products[0] = outer_of(tokens, {nullptr, nullptr, n.E, 1, 0});
    set_outputs(experts, saved.scalar_type(), {&dlora_up, &dlora_down});
    set_outputs(router, saved.scalar_type(), {&drouter});
  }

  Workspace workspace;
  const int64_t size = element_size(g.x), pairs = n.T * n.k;
  workspace.reserve(pairs * n.r, element_size(saved), &dmixed.hidden);
  workspace.reserve(pairs * ldm, size, &mix.dhidden);
  workspace.reserve(dx ? n.T * ldf : 0, size, &mix.first);
  workspace.reserve(need_dparams ? pairs * ldm : 0, size, &mix.mixed);
  workspace.reserve(need_dparams ? n.T * lde : 0, size, &mix.dlogits);
  plan_outer(workspace, dtype, experts);
  plan_outer(workspace, dtype, router);
  workspace.allocate(g.call);

  void* stream = g.call.stream();
  cuda::launch_shrink_segments(dtype, shrink_of(dys, g.rows(g.lora_up)), segments, dmixed, stream);
  cuda::launch_mix(dtype, n.T, dmixed.hidden, mix, stream);
  if (dx) {
    const cuda::Rows rows = g.rows(g.lora_down, read(g.router));
    cuda::launch_expand_segments(
        dtype, expand_of(outputs_of(*dx, "dx"), rows, mix.first, {nullptr, accumulate}, g.masks),
        segments, mix.dhidden, stream);
  }
  experts.products[0].h = mix.mixed;
  experts.products[1].h = mix.dhidden;
  router.products[0].h = mix.dlogits;
  cuda::launch_outer(dtype, experts, stream);
  cuda::launch_outer(dtype, router, stream);
}

}  // namespace
}  // namespace moelora::tensors
