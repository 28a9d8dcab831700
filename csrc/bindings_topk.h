// What the topk bindings of every device share: checks that keep kernels inside their memory, and
// the layout of `saved`.
#pragma once

#include "bindings_common.h"

namespace moelora::tensors {

struct TopkSizes {
  int64_t T, K, N, ldx;
  int E, r, k, kept;      // kept: experts of a token that have a hidden
  bool segments = false;  // saved: with the order of the pairs by expert, and where each begins

  // Elements of the accumulator type; moelora_ops/ops.py says the same.
  int64_t saved() const {
    return behind_choices() + (segments ? T * k + static_cast<int64_t>(E) * k + 1 : 0);
  }
  int64_t behind_choices() const { return T * (static_cast<int64_t>(kept) * r + E + 2 * k); }
};

inline TopkSizes check_topk(const Tensor& x, const Tensor& lora_down, const Tensor& lora_up,
                            const Tensor& router, int64_t top_k, bool stacked) {
  const Rows rows = rows_of(x, "x");
  STD_TORCH_CHECK(lora_down.dim() == 3 && lora_up.dim() == 3,
                  "lora_down, lora_up: wanted 3 dimensions");
  check_contiguous(lora_down, "lora_down");
  check_contiguous(lora_up, "lora_up");
  check_contiguous(router, "router");
  const int64_t E = lora_down.size(0), r = lora_down.size(1);
  const int64_t K = lora_down.size(2), N = lora_up.size(2);
  STD_TORCH_CHECK(1 <= top_k && top_k <= E, "top_k: wanted 1..", E, ", got ", top_k);
  STD_TORCH_CHECK(x.size(x.dim() - 1) == K, "x: wanted last dimension ", K);
  check_like(lora_down, x, {E, r, K}, "lora_down");
  check_like(lora_up, x, {E, r, N}, "lora_up");
  check_like(router, x, {E, K}, "router");
  return {rows.count,
          K,
          N,
          rows.stride,
          static_cast<int>(E),
          static_cast<int>(r),
          static_cast<int>(top_k),
          static_cast<int>(stacked ? E : top_k)};
}

// Points hidden, logits, weights and selected of a kernel's parameters into `saved`, one after the
// other.
template <class P>
void point_into_saved(P& p, const TopkSizes& n, const Tensor& saved) {
  check_contiguous(saved, "saved");
  STD_TORCH_CHECK(saved.numel() == n.saved(), "saved: wanted ", n.saved(), " elements, got ",
                  saved.numel());
  const int64_t size = element_size(saved);
  char* at = data<char>(saved);
  const auto take = [&](int64_t count) {
    void* here = at;
    at += n.T * count * size;
    return here;
  };
  p.hidden = take(static_cast<int64_t>(n.kept) * n.r);
  p.logits = take(n.E);
  p.weights = take(n.k);
  p.selected = static_cast<int32_t*>(take(n.k));
}

}  // namespace moelora::tensors
