// The cosines of PEMT's task sparsity loss on CUDA tensors.

#include "bindings_cosines.h"
#include "bindings_cuda_common.h"

namespace {

using namespace moelora::tensors;
namespace cuda = moelora::cuda;

std::tuple<Tensor, Tensor, Tensor> cosines(const Tensor& f, const Tensor& seen,
                                           const Tensor& hidden, const Tensor& rotations,
                                           const Tensor& scales) {
  auto p = cosines_of<moelora::CosinesForward>(f, seen, hidden, rotations, "rotations", scales);
  const Call call(f);
  const ScalarType wide = accumulator_of(f);
  Tensor cosines = call.empty(coefficients_of(f, p.E), wide), f_norm = call.empty({p.T}, wide);
  Tensor norms = call.empty(coefficients_of(f, p.E), wide);
  p.cosines = data<void>(cosines), p.norms = data<void>(norms), p.f_norm = data<void>(f_norm);
  if (p.T) cuda::launch_cosines(dtype_of(f), p, call.stream());
  return {cosines, norms, f_norm};
}

Tensor cosines_backward(const Tensor& dcosines, const OptionalTensor& df_given, const Tensor& f,
                        const Tensor& seen, const Tensor& hidden, const Tensor& grams,
                        const Tensor& scales, const Tensor& cosines, const Tensor& norms,
                        const Tensor& f_norm, const Tensor& df, const Tensor& dhidden) {
  auto p = cosines_backward_of(dcosines, df_given, f, seen, hidden, grams, scales, cosines, norms,
                               f_norm, df, dhidden);
  const Call call(f);
  Tensor dseen = call.empty(shape_of(seen), accumulator_of(f));
  p.dseen = data<void>(dseen);
  if (p.T) cuda::launch_cosines_backward(dtype_of(f), p, call.stream());
  return dseen;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moelora_ops_cuda, MOELORA_CUDA_KEY, m) {
  m.impl("cosines", TORCH_BOX(&cosines));
  m.impl("cosines_backward", TORCH_BOX(&cosines_backward));
}
