// What the grid bindings of every device share: checks that keep kernels inside their memory.
#pragma once

#include "bindings_dense_common.h"

namespace moelora::tensors {

// One token's hidden is [r1 | gates]: rows of down, then the router's.
struct GridTensors {
  Vectors tokens;
  int64_t T, K, N, r1, r2, gates;
  GridShape shape;
  RowBlock down, router, up;

  GridTensors(const Tensor& x, const Tensor& lora_down, const Tensor& lora_up,
              const Tensor& routers, const Tensor& omega, const Tensor& beta, bool diagonal)
      : tokens(vectors_of(x, "x")), T(tokens.T) {
    STD_TORCH_CHECK(lora_down.dim() == 2 && lora_up.dim() == 2,
                    "lora_down, lora_up: wanted 2 dimensions");
    r1 = lora_down.size(0), K = lora_down.size(1), r2 = lora_up.size(0), N = lora_up.size(1);
    STD_TORCH_CHECK(r1 > 0 && r2 > 0 && (!diagonal || r1 == r2),
                    "lora_down, lora_up: have ranks that do not fit");
    STD_TORCH_CHECK(tokens.columns == K, "x: wanted last dimension ", K);
    shape = {static_cast<int>(r1), static_cast<int>(r2), diagonal};
    gates = shape.gates();
    down = {read_like(lora_down, x, {r1, K}, "lora_down"), r1, K};
    router = {read_like(routers, x, {gates, K}, "router"), gates, K};
    up = {read_like(lora_up, x, {r2, N}, "lora_up"), r2, N};
    for (const auto& [t, name] : {std::pair(&omega, "omega"), std::pair(&beta, "beta")})
      STD_TORCH_CHECK(t->numel() == 1 && t->scalar_type() == x.scalar_type(), name,
                      ": wanted one element of x's dtype");
  }
  int64_t hidden_columns() const { return r1 + gates; }
};

}  // namespace moelora::tensors
