// Shrink into partial sums, and how a shrink is planned.
#include "cuda/mix.cuh"
#include "cuda/shrink_wgmma.cuh"

namespace moelora::cuda {
namespace {

// T has no say: a token gets its bits from one kind of instruction.
template <class T>
bool use_wgmma(const Shrink& p, Device device) {
#ifdef MOELORA_SM_90A  // the build has code for it
  return sizeof(T) == 2 && device.capability == 90 && !p.masks.seed &&
         p.rows.count() > ShrinkTile<T>::kColumns;
#else
  return false;
#endif
}

template <class T>
ShrinkPlan plan(const Shrink& p, Device device) {
  ShrinkPlan plan = {};
  plan.wgmma = use_wgmma<T>(p, device);
  const int count = p.rows.count();
  const int64_t columns =
      plan.wgmma ? WgmmaTile::column_tiles(count) : ceil_div(count, ShrinkTile<T>::kColumns);
  const auto tiles_of = [&](int warps) {
    return p.batch.count * ceil_div<int64_t>(p.T, 16 * warps) * columns;
  };
  // Twice the tokens per block read the weights half as often, where blocks enough remain.
  constexpr int kMost = ShrinkTile<T>::kMostWarps;
  static_assert(16 * kMost == WgmmaTile::kTokens);
  plan.warps = plan.wgmma || device.filled_by(tiles_of(kMost)) ? kMost : 4;
  const int64_t tiles = tiles_of(plan.warps);
  // With fewer blocks than half of the multiprocessors, segments of one tile go to several.
  plan.parts = 2 * tiles >= device.multiprocessors ? 1 : segments(p.columns);
  return plan;
}

template <class T>
void plan_mix(const Shrink& p, int64_t row_bytes, Device device, ShrinkPlan& plan) {
  const int64_t tokens = 16 * plan.warps;
  const bool enough = 2 * ceil_div(p.T, tokens) >= device.multiprocessors;
  plan.fused = enough && p.batch.count == 1 && p.rows.count() <= ShrinkTile<T>::kColumns &&
               kFusable<T> && !p.masks.seed && tokens * row_bytes <= device.shared_bytes;
  plan.mix_tokens = plan.fused ? static_cast<int>(tokens) : mix_tokens(p.T, row_bytes, device);
  plan.mix_blocks = ceil_div<int64_t>(p.T, plan.mix_tokens);
}

// Whether every block of the expand had better mix by itself than wait for a launch that does.
template <class T>
bool is_few(const Shrink& p, int64_t row_bytes, Device device, const ShrinkPlan& plan) {
  const int64_t read = plan.parts * p.T * p.columns_of_h() * int64_t{sizeof(acc_t<T>)};
  return kExpands<T> && !plan.fused && p.T <= kFewTokens &&
         p.T * row_bytes <= device.shared_bytes && read <= kBlockBytesOfLaunch;
}

template <class A>
__global__ void __launch_bounds__(kFlatThreads)
    add_kernel(const A* partials, int parts, int64_t size, A* sums) {
  for_each_flat(size, [&](int64_t i) { sums[i] = add_parts(partials, parts, size, i); });
}

}  // namespace

ShrinkPlan plan_shrink(DType dtype, const Shrink& p, Device device) {
  ShrinkPlan result;
  dispatch(dtype, [&](auto type) { result = plan<typename decltype(type)::type>(p, device); });
  return result;
}

ShrinkPlan plan_shrink(DType dtype, const Shrink& p, int64_t row_bytes, Device device) {
  ShrinkPlan result = plan_shrink(dtype, p, device);
  dispatch(dtype, [&](auto type) {
    plan_mix<typename decltype(type)::type>(p, row_bytes, device, result);
  });
  return result;
}

ShrinkPlan plan_shrink(DType dtype, const Shrink& p, int64_t row_bytes, const Expand& expand,
                       Device device) {
  ShrinkPlan plan = plan_shrink(dtype, p, row_bytes, device);
  dispatch(dtype, [&](auto type) {
    plan.few = is_few<typename decltype(type)::type>(p, row_bytes, device, plan);
  });
  // One block more, which saves what the mix leaves behind.
  plan.copies = plan.few ? expand_strips(dtype, expand) * expand.batch.count + 1 : 1;
  return plan;
}

void launch_partials(DType dtype, const Shrink& p, const ShrinkPlan& plan, void* stream) {
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using S = ShrinkTile<T>;
    using Finish = WritePartials<acc_t<T>>;
    if constexpr (sizeof(T) == 2)
      if (plan.wgmma)
        return launch("shrink", wgmma_shrink_kernel<T, Finish>, wgmma_shrink_grid(p, plan),
                      32 * plan.warps, int64_t{WgmmaTile::kStages} * WgmmaTile::kStage<T>, stream,
                      p, Finish{});
    const auto kernel =
        p.masks.seed ? shrink_kernel<T, true, Finish> : shrink_kernel<T, false, Finish>;
    launch("shrink", kernel, shrink_grid(p, plan, ceil_div(p.rows.count(), S::kColumns)),
           32 * plan.warps, S::shared_bytes(plan.warps, p.rows.count()), stream, p, Finish{});
  });
}

void launch_shrink(DType dtype, const Shrink& p, const ShrinkPlan& plan, void* sums, void* stream) {
  Shrink product = p;
  if (plan.parts == 1) product.partials = sums;
  launch_partials(dtype, product, plan, stream);
  if (plan.parts == 1) return;
  const auto add = [&](auto zero) {
    using A = decltype(zero);
    const int64_t size = p.T * p.rows.count();
    launch("add", add_kernel<A>, flat_grid(size), kFlatThreads, 0, stream,
           static_cast<const A*>(p.partials), plan.parts, size, static_cast<A*>(sums));
  };
  dtype == DType::kFloat64 ? add(0.0) : add(0.0f);
}

Device current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
    return value;
  };
  return {attribute(cudaDevAttrMultiProcessorCount),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          10 * attribute(cudaDevAttrComputeCapabilityMajor) +
              attribute(cudaDevAttrComputeCapabilityMinor)};
}

void set_zero(void* data, int64_t bytes, void* stream) {
  check(cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream)), "cudaMemsetAsync");
}

}  // namespace moelora::cuda
