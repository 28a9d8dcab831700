"""The autograd functions: what is saved, which operator runs in which direction, nothing else.

Old-style functions (``forward(ctx, ...)``): the new style binds a signature on every call, 14 µs
that a one-token layer feels.  Functorch transforms are therefore not supported.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ops


def topk_mixture(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base_output: Tensor | None,
    lora_down: Tensor,
    lora_up: Tensor,
    router: Tensor,
    seed: Tensor | None,
    expand_first: bool,
    small_base: bool,
    *mix,
) -> tuple[Tensor, ...]:
    """Frozen linear plus top-k mixture, forward.

    Args:
        x: ``[..., K]``, contiguous, or a matrix with contiguous rows.
        expand_first: write the adapter, then add the base GEMM with beta = 1.
        small_base: compute the base with ``ops.small_linear``.
        mix: top_k, scale, renormalize, dropout, dropout_per_expert, stacked.

    Returns:
        y ``[..., N]`` and the outputs of ``ops.topk_forward``.
    """
    if base_output is not None:
        # Never written in place: the module that made it may have saved it for its own backward.
        y = base_output.clone(memory_format=torch.contiguous_format)
        expand_first = False
    elif expand_first:
        y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    elif small_base:
        y = ops.small_linear(x, weight, bias)
    else:
        y = F.linear(x, weight, bias)
    routed = ops.topk_forward(
        x, lora_down, lora_up, router, bias if expand_first else None, seed, y, *mix,
        not expand_first,
    )  # fmt: skip
    if expand_first:
        y.flatten(0, -2).addmm_(x.flatten(0, -2), weight.t())
    return y, *routed


class TopkMixture(torch.autograd.Function):
    """:func:`topk_mixture` with its gradient.

    Saves the rank-space hidden, the logits and the k choices per token; and x, but only if a
    parameter is trained.
    """

    @staticmethod
    def forward(ctx, *arguments) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, _, _, lora_down, lora_up, router, seed, _, _, *ctx.mix = arguments
        y, saved, counts, prob_sums = topk_mixture(*arguments)
        need = ctx.needs_input_grad
        kept = x if need[1] or any(need[4:7]) else None
        ctx.save_for_backward(kept, weight, lora_down, lora_up, router, seed, saved)
        ctx.shape = x.shape
        ctx.mark_non_differentiable(counts)
        ctx.set_materialize_grads(False)
        return y, counts, prob_sums

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor | None, _dcounts, dprob_sums: Tensor | None):
        x, weight, lora_down, lora_up, router, seed, saved = ctx.saved_tensors
        need = ctx.needs_input_grad
        need_dx, need_dparams = need[0], any(need[4:7])
        if dy is None:
            dy = lora_up.new_zeros((*ctx.shape[:-1], lora_up.shape[2]))
        dy = dy.contiguous()
        if dprob_sums is not None:
            dprob_sums = dprob_sums.contiguous()

        accumulate = weight is not None and need_dx
        dx = (
            torch.matmul(dy, weight)
            if accumulate
            else lora_up.new_empty(ctx.shape if need_dx else (0,))
        )
        dlora_down = dlora_up = drouter = None
        if need_dx or need_dparams:
            dparams = ops.topk_backward(
                dy, dx if x is None else x, lora_down, lora_up, router, seed, saved, dprob_sums, dx,
                *ctx.mix, accumulate, need_dx, need_dparams,
            )  # fmt: skip
            if need_dparams:
                dlora_down, dlora_up, drouter = dparams
        rows = dy.reshape(-1, dy.shape[-1]) if need[1] or need[2] else None
        dweight = rows.t() @ x.reshape(-1, x.shape[-1]) if need[1] else None
        dbias = rows.sum(0) if need[2] else None
        dbase = dy if need[3] else None
        return (
            dx if need_dx else None, dweight, dbias, dbase, dlora_down, dlora_up, drouter,
            *(None,) * 9,
        )  # fmt: skip
