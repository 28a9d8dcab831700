// Shrink into partial sums, and how a shrink is planned.
#include "cuda/shrink.cuh"

namespace moelora::cuda {
namespace {

template <class A>
struct WritePartials {
  template <int kTiles>
  __device__ __forceinline__ void operator()(const Shrink& p, int64_t t0, int c0, int columns,
                                             A (&total)[kTiles][4], char*) const {
    const int count = p.rows.count(), own = warp_id() * 16;
    A* out = static_cast<A*>(p.partials) + (blockIdx.z * p.T + t0) * count + c0;
    for_each_sum(total, [&](int row, int c, A sum) {
      if (c < columns && t0 + own + row < p.T) out[int64_t{own + row} * count + c] = sum;
    });
  }
};

template <class T>
ShrinkPlan plan(const Shrink& p, int64_t row_bytes, Device device) {
  using S = ShrinkTile<T>;
  const int column_tiles = ceil_div(p.rows.count(), S::kColumns);
  ShrinkPlan plan = {};
  // Twice the tokens per block read the weights half as often, where blocks remain for all.
  plan.warps = ceil_div<int64_t>(p.T, 16 * S::kMostWarps) >= device.multiprocessors ? 8 : 4;
  const int64_t tokens = 16 * plan.warps, tiles = ceil_div(p.T, tokens);
  // With fewer blocks than half of the multiprocessors, segments of one tile go to several.
  const bool enough = 2 * tiles * column_tiles >= device.multiprocessors;
  plan.parts = enough ? 1 : segments(p.columns);
  plan.fused = enough && column_tiles == 1 && kFusable<T> && !p.masks.seed &&
               tokens * row_bytes <= device.shared_bytes;
  const int64_t most = std::min<int64_t>(device.shared_bytes / row_bytes, 64);
  if (most == 0)
    throw std::runtime_error("experts: E * r = " + std::to_string(p.rows.R) +
                             " is more than a block's shared memory holds");
  plan.mix_tokens = static_cast<int>(
      plan.fused ? tokens
                 : std::clamp<int64_t>(ceil_div<int64_t>(p.T, device.multiprocessors),
                                       std::min<int64_t>(kMixWarps, most), most));
  plan.mix_blocks = ceil_div<int64_t>(p.T, plan.mix_tokens);
  return plan;
}

}  // namespace

ShrinkPlan plan_shrink(DType dtype, const Shrink& p, int64_t row_bytes, Device device) {
  ShrinkPlan result;
  dispatch(dtype,
           [&](auto type) { result = plan<typename decltype(type)::type>(p, row_bytes, device); });
  return result;
}

void launch_partials(DType dtype, const Shrink& p, const ShrinkPlan& plan, void* stream) {
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using S = ShrinkTile<T>;
    using Finish = WritePartials<acc_t<T>>;
    const auto kernel =
        p.masks.seed ? shrink_kernel<T, true, Finish> : shrink_kernel<T, false, Finish>;
    launch("shrink", kernel, shrink_grid(p.T, plan, ceil_div(p.rows.count(), S::kColumns)),
           32 * plan.warps, S::shared_bytes(plan.warps, p.rows.count()), stream, p, Finish{});
  });
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
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
}

void set_zero(void* data, int64_t bytes, void* stream) {
  check(cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream)), "cudaMemsetAsync");
}

}  // namespace moelora::cuda
