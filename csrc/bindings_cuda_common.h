// What the CUDA bindings share: the device and stream of a call, and its allocations.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <initializer_list>
#include <utility>

#include "bindings_common.h"
#include "cuda/kernels.h"

#ifdef MOELORA_EMULATED
// A build for tests: the operators take CPU tensors, and the CUDA runtime that it is linked with
// hands launches to an emulator (tools/gpu_emulator), which must know what memory there is.
extern "C" void emulated_allocation(void* data, size_t bytes);
#define MOELORA_CUDA_KEY CPU
#else
#include <dlfcn.h>
#define MOELORA_CUDA_KEY CUDA
#endif

namespace moelora::tensors {
namespace {

// One call of an operator: while it lives, the device of its tensors is the current one.
class Call {
 public:
  explicit Call(const Tensor& x)
#ifndef MOELORA_EMULATED
      : guard_(x.get_device_index()),
        stream_(current_stream(x.get_device_index()))
#endif
  {
    aoti_torch_get_device_type(x.get(), &device_type_);
    aoti_torch_get_device_index(x.get(), &device_index_);
  }

  void* stream() const { return stream_; }

  // On the device of the call, uninitialised.
  Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype) const {
    Tensor t = tensors::empty(shape, dtype, device_type_, device_index_);
#ifdef MOELORA_EMULATED
    emulated_allocation(t.mutable_data_ptr(),
                        t.numel() * (dtype == ScalarType::Long ? 8 : element_size(t)));
#endif
    return t;
  }

 private:
#ifndef MOELORA_EMULATED
  // The function is part of torch's CUDA library, which a torch without CUDA does not have, so it
  // is looked up when the first CUDA tensor arrives.
  static void* current_stream(int32_t device_index) {
    using Function = int32_t (*)(int32_t, void**);
    static const Function get = [] {
      void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      return library
                 ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream"))
                 : nullptr;
    }();
    STD_TORCH_CHECK(get, "x: this torch has no CUDA");
    void* stream = nullptr;
    STD_TORCH_CHECK(get(device_index, &stream) == 0, "x: its device has no current stream");
    return stream;
  }

  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
  int32_t device_type_ = 0, device_index_ = 0;
};

// Scratch memory, carved into parts that begin at multiples of 16 bytes.
class Workspace {
 public:
  // Reserves `count` elements of `size` bytes; at() finds them after allocate().
  int64_t reserve(int64_t count, int64_t size) {
    const int64_t offset = bytes_;
    bytes_ += (count * size + 15) / 16 * 16;
    return offset;
  }
  // The same; allocate() lets `to` point there, or nowhere if nothing is reserved.
  void reserve(int64_t count, int64_t size, void** to) {
    if (count == 0)
      *to = nullptr;
    else
      places_.emplace_back(reserve(count, size), to);
  }
  void allocate(const Call& call) {
    memory_.emplace(call.empty({bytes_ / 8}, ScalarType::Double));
    for (const auto& [offset, to] : places_) *to = at(offset);
  }
  void* at(int64_t offset) const { return data<char>(*memory_) + offset; }

 private:
  int64_t bytes_ = 0;
  std::vector<std::pair<int64_t, void**>> places_;
  std::optional<Tensor> memory_;
};

void reserve_partials(Workspace& workspace, DType dtype, const cuda::ShrinkPlan& plan,
                      cuda::Shrink& shrink) {
  workspace.reserve(plan.fused ? 0 : plan.parts * shrink.T * shrink.columns_of_h(),
                    accumulator_size(dtype), &shrink.partials);
}

// Plans a shrink with the mix behind it, and reserves its partial sums.
template <class Mix>
cuda::ShrinkPlan plan_mix(Workspace& workspace, DType dtype, cuda::Shrink& shrink, const Mix& mix) {
  const cuda::ShrinkPlan plan =
      cuda::plan_shrink(dtype, shrink, cuda::row_bytes(dtype, mix), cuda::current_device());
  reserve_partials(workspace, dtype, plan, shrink);
  return plan;
}

// The same from x to y; what is mixed is reserved too.
template <class Mix>
cuda::ShrinkPlan plan_mix(Workspace& workspace, DType dtype, cuda::Shrink& shrink, Mix& mix,
                          const cuda::Expand& expand) {
  const cuda::ShrinkPlan plan =
      cuda::plan_shrink(dtype, shrink, cuda::row_bytes(dtype, mix), expand, cuda::current_device());
  reserve_partials(workspace, dtype, plan, shrink);
  workspace.reserve(plan.copies * expand.T * expand.ldh, element_size(dtype), &mix.mixed);
  return plan;
}

// Plans the sums over tokens, and reserves their parts, or the one that has no outputs to go to.
void plan_outer(Workspace& workspace, DType dtype, cuda::Outer& outer) {
  cuda::plan_outer(dtype, cuda::current_device(), outer);
  const bool at_once = outer.parts == 1 && outer.outputs[0].to;
  workspace.reserve(at_once ? 0 : outer.parts * outer.size(), accumulator_size(dtype),
                    &outer.partials);
}

// Where the sums over tokens go; null and tensors without elements are passed over.
void set_outputs(cuda::Outer& outer, ScalarType wide,
                 std::initializer_list<const Tensor*> tensors) {
  int i = 0;
  for (const Tensor* t : tensors)
    if (t && t->numel())
      outer.outputs[i++] = {data<void>(*t), t->numel(), t->scalar_type() == wide};
}

void set_zero(const Call& call, std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* t : tensors)
    if (t->numel())
      cuda::set_zero(data<void>(*t),
                     t->numel() * (t->scalar_type() == ScalarType::Long ? 8 : element_size(*t)),
                     call.stream());
}

cuda::Masks make_masks(const std::optional<Tensor>& seed, double p, bool per_expert) {
  if (p <= 0) return {};
  STD_TORCH_CHECK(seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                  "seed: wanted an int64 tensor of one element, as dropout > 0");
  return {static_cast<const int64_t*>(read(seed)), p, per_expert};
}

}  // namespace
}  // namespace moelora::tensors
