"""Every operator's schema, fake and dispatch, in one place.

The schemas live here and not in C++, so that the package imports, traces and falls back without its
compiled part.  Kernels only add implementations: the CPU extension through the stable ABI when it
is loaded.

An operator is one direction of the skeleton *shrink -> mix -> expand* with one mix; what the
library GEMM does better (the frozen linear itself) stays outside.  `y` and `dx` are written in
place because they are the base GEMM's output or its accumulator, and a second [T, N] buffer would
cost more than the adapter.

Letters: T tokens, K in_features, N out_features, E experts, r rank, k top-k.
"""

import math

import torch
from torch import Tensor

_library = torch.library.Library("moelora_ops", "DEF")

_library.define(
    "topk_forward(Tensor x, Tensor lora_down, Tensor lora_up, Tensor router, Tensor? bias,"
    " Tensor? seed, Tensor(a!) y, int top_k, float scale, bool renormalize, float dropout,"
    " bool dropout_per_expert, bool stacked, bool accumulate)"
    " -> (Tensor saved, Tensor counts, Tensor prob_sums)"
)
_library.define(
    "topk_backward(Tensor dy, Tensor x, Tensor lora_down, Tensor lora_up, Tensor router,"
    " Tensor? seed, Tensor saved, Tensor? dprob_sums, Tensor(a!) dx, int top_k, float scale,"
    " bool renormalize, float dropout, bool dropout_per_expert, bool stacked, bool accumulate,"
    " bool need_dx, bool need_dparams)"
    " -> (Tensor dlora_down, Tensor dlora_up, Tensor drouter)"
)
_library.define("small_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")

# Bound once: looking a packet up costs more than the dispatch itself.
topk_forward = torch.ops.moelora_ops.topk_forward.default
topk_backward = torch.ops.moelora_ops.topk_backward.default
small_linear = torch.ops.moelora_ops.small_linear.default


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """What products of `dtype` accumulate in, and what logits, weights and hidden are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


STRATEGIES = ("auto", "stacked", "grouped")


def is_stacked(strategy: str, num_experts: int, top_k: int) -> bool:
    """Whether a kernel computes all experts (``stacked``) or a token's chosen ones (``grouped``).

    On a CPU flops decide: grouped kernels touch k*r rows of a token, one token at a time; stacked
    ones touch all E*r rows but share each load between several tokens.  That measured 6 to 17 %
    faster at k = E and no faster at k = 6 of 8 (docs/design.md).  The choice depends on E and k
    alone, so that the bits of a token never depend on how many others there are.
    """
    if strategy == "auto":
        return 8 * top_k > 7 * num_experts
    return strategy == "stacked"


def topk_saved_size(tokens: int, num_experts: int, rank: int, top_k: int, stacked: bool) -> int:
    """Elements of `saved`: hidden, logits, weights and selected (int32 bits), one after the other.

    One allocation instead of four: right after a large GEMM, when caches are cold, each costs more
    than the routing of a token.
    """
    rows = num_experts if stacked else top_k
    return tokens * (rows * rank + num_experts + 2 * top_k)


@torch.library.register_fake("moelora_ops::topk_forward")
def _topk_forward_fake(
    x, lora_down, lora_up, router, bias, seed, y, top_k, scale, renormalize, dropout,
    dropout_per_expert, stacked, accumulate,
):  # fmt: skip
    num_experts, rank, _ = lora_down.shape
    wide = accumulator_dtype(x.dtype)
    size = topk_saved_size(math.prod(x.shape[:-1]), num_experts, rank, top_k, stacked)
    return (
        x.new_empty((size,), dtype=wide),
        x.new_empty((num_experts,), dtype=torch.int64),
        x.new_empty((num_experts,), dtype=wide),
    )


@torch.library.register_fake("moelora_ops::topk_backward")
def _topk_backward_fake(
    dy, x, lora_down, lora_up, router, seed, saved, dprob_sums, dx, top_k, scale, renormalize,
    dropout, dropout_per_expert, stacked, accumulate, need_dx, need_dparams,
):  # fmt: skip
    if not need_dparams:
        return tuple(lora_down.new_empty((0,)) for _ in range(3))
    return tuple(p.new_empty(p.shape) for p in (lora_down, lora_up, router))


@torch.library.register_fake("moelora_ops::small_linear")
def _small_linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
