// The cosines of PEMT's task sparsity loss on CPU tensors.

#include "bindings_cosines.h"
#include "bindings_dense.h"

namespace {

using namespace moelora::tensors;

std::tuple<Tensor, Tensor, Tensor> cosines(const Tensor& f, const Tensor& seen,
                                           const Tensor& hidden, const Tensor& rotations,
                                           const Tensor& scales) {
  auto p = cosines_of<moelora::CosinesForward>(f, seen, hidden, rotations, "rotations", scales);
  Tensor cosines = empty_wide(coefficients_of(f, p.E), f), f_norm = empty_wide({p.T}, f);
  Tensor norms = empty_wide(coefficients_of(f, p.E), f);
  p.cosines = data<void>(cosines), p.norms = data<void>(norms), p.f_norm = data<void>(f_norm);
  const moelora::Kernels& kernels = moelora::kernels(dtype_of(f));
  split(p.T, kTokenUnit, [&](int64_t t0, int64_t t1) { kernels.cosines(p, t0, t1); });
  return {cosines, norms, f_norm};
}

Tensor cosines_backward(const Tensor& dcosines, const OptionalTensor& df_given, const Tensor& f,
                        const Tensor& seen, const Tensor& hidden, const Tensor& grams,
                        const Tensor& scales, const Tensor& cosines, const Tensor& norms,
                        const Tensor& f_norm, const Tensor& df, const Tensor& dhidden) {
  auto p = cosines_backward_of(dcosines, df_given, f, seen, hidden, grams, scales, cosines, norms,
                               f_norm, df, dhidden);
  Tensor dseen = empty_wide(shape_of(seen), f);
  p.dseen = data<void>(dseen);
  const moelora::Kernels& kernels = moelora::kernels(dtype_of(f));
  split(p.T, kTokenUnit, [&](int64_t t0, int64_t t1) { kernels.cosines_backward(p, t0, t1); });
  return dseen;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moelora_ops, CPU, m) {
  m.impl("cosines", TORCH_BOX(&cosines));
  m.impl("cosines_backward", TORCH_BOX(&cosines_backward));
}
