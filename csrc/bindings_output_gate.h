// What the output_gate bindings of every device share: checks that keep kernels inside their
// memory.
#pragma once

#include "bindings_dense_common.h"
#include "mix/output_gate.h"

namespace moelora::tensors {

// Fills what both directions of `mix` read, but tau, whose address is returned.
template <class Mix>
const void* read_gate(Mix& mix, const Experts& e, const Tensor& projection, const Tensor& factors,
                      const OptionalTensor& means, const Tensor& scales, const Tensor& tau,
                      const OptionalTensor& mask, int64_t normalization, bool mask_input) {
  STD_TORCH_CHECK(0 <= normalization && normalization < moelora::kNormalizations,
                  "normalization: is no normalization");
  const Tensor& x = e.x;
  mix.E = static_cast<int>(e.E), mix.r = static_cast<int>(e.r);
  mix.normalization = static_cast<moelora::Normalization>(normalization);
  mix.width = static_cast<double>(e.N);
  mix.mask_input = mask_input;
  mix.projection = read_wide(projection, x, {mix.input_columns(), e.E}, "projection");
  mix.factors = read_wide(factors, x, {e.E, e.r, e.r}, "factors");
  STD_TORCH_CHECK(means || mix.normalization != moelora::Normalization::kLayerNorm,
                  "means: layernorm needs them");
  mix.means = read_wide(means, x, {e.E * e.r}, "means");
  mix.scales = read_wide(scales, x, {e.E}, "scales");
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->numel() == e.E,
                    "mask: wanted one bool per expert");
    check_contiguous(*mask, "mask");
    mix.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
  }
  return read_wide(tau, x, {1}, "tau");
}

}  // namespace moelora::tensors
