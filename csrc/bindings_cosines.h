// What the bindings of the cosines share on every device: checks that keep kernels inside their
// memory.
#pragma once

#include "bindings_dense_common.h"
#include "mix/cosines.h"

namespace moelora::tensors {

// What both directions share: everything but what they write.
template <class P>
P cosines_of(const Tensor& f, const Tensor& seen, const Tensor& hidden, const Tensor& factors,
             const char* name, const Tensor& scales) {
  const Vectors v = vectors_of(f, "f");
  STD_TORCH_CHECK(factors.dim() == 3, name, ": wanted 3 dimensions");
  const int64_t E = factors.size(0), r = factors.size(1);
  P p{};
  p.T = v.T, p.N = v.columns, p.E = static_cast<int>(E), p.r = static_cast<int>(r);
  p.f = v.at, p.ldf = v.ld;
  const std::vector<int64_t> shape = coefficients_of(f, E * r);
  p.seen = read_wide(seen, f, shape, "seen");
  p.hidden = read_wide(hidden, f, shape, "hidden");
  p.factors = read_wide(factors, f, {E, r, r}, name);
  p.scales = read_wide(scales, f, {E}, "scales");
  return p;
}

inline moelora::CosinesBackward cosines_backward_of(
    const Tensor& dcosines, const OptionalTensor& df_given, const Tensor& f, const Tensor& seen,
    const Tensor& hidden, const Tensor& grams, const Tensor& scales, const Tensor& cosines,
    const Tensor& norms, const Tensor& f_norm, const Tensor& df, const Tensor& dhidden) {
  auto p = cosines_of<moelora::CosinesBackward>(f, seen, hidden, grams, "grams", scales);
  const std::vector<int64_t> per_expert = coefficients_of(f, p.E);
  p.dcosines = read_wide(dcosines, f, per_expert, "dcosines");
  p.cosines = read_saved(cosines, f, per_expert, "cosines");
  p.norms = read_saved(norms, f, per_expert, "norms");
  p.f_norm = read_saved(f_norm, f, {p.T}, "f_norm");
  if (df_given) {
    const Vectors given = vectors_like(*df_given, f, p.N, "df_given");
    p.df_given = given.at, p.lddf = given.ld;
  }
  check_columns(df, f, p.N, "df");
  check_contiguous(df, "df");
  p.df = data<void>(df);
  p.dhidden = read_saved(dhidden, f, shape_of(hidden), "dhidden");
  return p;
}

}  // namespace moelora::tensors
