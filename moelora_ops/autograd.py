"""The autograd functions: what is saved, which operator runs in which direction, nothing else.

Old-style functions (``forward(ctx, ...)``): the new style binds a signature on every call, 14 µs
that a one-token layer feels.  Functorch transforms are therefore not supported.

Every mixture is a frozen linear plus a mix.  The first seven arguments are the same for all: the
linear's, and the back end, whose operators run.  A plain function computes the forward pass (and is
all there is without a graph), and a class of the same name adds the gradient.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ops


def plain_backward(backward: Callable) -> Callable:
    """A backward that is not differentiated, and whose products autocast leaves alone."""

    @once_differentiable
    @functools.wraps(backward)
    def run(ctx, *gradients):
        device_type = next((g.device.type for g in gradients if g is not None), "meta")
        autocast = torch.amp.is_autocast_available(device_type)
        if not autocast or not torch.is_autocast_enabled(device_type):
            return backward(ctx, *gradients)
        with torch.autocast(device_type, enabled=False):
            return backward(ctx, *gradients)

    return run


# ---------------------------------------------------------------- the frozen linear


def _start(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base_output: Tensor | None,
    expand_first: bool,
    base_product: str,
) -> tuple[Tensor, Tensor | None, bool]:
    """What a mix's operator writes to: y, the bias that it adds and whether it accumulates.

    Args:
        x: ``[..., K]``, contiguous, or a matrix with contiguous rows.
        expand_first: write the adapter, then add the base GEMM with beta = 1.
        base_product: one of ``ops.BASE_PRODUCTS``: who computes the base.
    """
    if base_output is not None:
        # Never written in place: the module that made it may have saved it for its own backward.
        return base_output.clone(memory_format=torch.contiguous_format), None, True
    if expand_first:
        return x.new_empty((*x.shape[:-1], weight.shape[0])), bias, False
    if base_product != ops.LIBRARY:
        return ops.linear(x, weight, bias), None, True
    return F.linear(x, weight, bias), None, True


def _rows(t: Tensor) -> Tensor:
    """`t` as a matrix, a row a token, that shares its memory."""
    return t.flatten(0, -2) if t.dim() > 1 else t.unsqueeze(0)


def _finish(y: Tensor, x: Tensor, weight: Tensor | None, accumulate: bool) -> Tensor:
    """y with the base in it, if the adapter went first."""
    if not accumulate:
        _rows(y).addmm_(_rows(x), weight.t())
    return y


def _through(ctx, dy: Tensor, weight: Tensor) -> Tensor:
    """``dy @ weight``: what a base on the CPU passes on."""
    if ctx.base_product == ops.OWN:
        return ops.linear_backward(dy, weight)
    return torch.matmul(dy, weight)


def _start_backward(ctx, dy: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, bool]:
    """dy contiguous; dx that a mix's operator writes to; and whether it accumulates."""
    dy = dy.contiguous()
    # On a GPU the base GEMM adds itself to what the operator wrote, which saves reading dx once.
    if weight is not None and ctx.needs_input_grad[0] and ctx.backend == "cpu":
        return dy, _through(ctx, dy, weight), True
    return dy, dy.new_empty(ctx.shape), False


def _base_gradients(
    ctx,
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    dx: Tensor,
    accumulate: bool,
) -> tuple[Tensor | None, ...]:
    """dx with the base in it, dweight, dbias and dbase_output; then None for the three flags."""
    need = ctx.needs_input_grad
    gemm_last = need[0] and weight is not None and not accumulate
    rows = _rows(dy) if gemm_last or need[1] or need[2] else None
    if gemm_last:
        _rows(dx).addmm_(rows, weight)
    return (
        dx if need[0] else None,
        rows.t() @ _rows(x) if need[1] else None,
        rows.sum(0) if need[2] else None,
        dy if need[3] else None,
        None,
        None,
        None,
    )


def _wanted(gradients: tuple[Tensor, ...], need: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    return tuple(g if n else None for g, n in zip(gradients, need, strict=True))


# ---------------------------------------------------------------- topk


def topk_mixture(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base_output: Tensor | None,
    expand_first: bool,
    base_product: str,
    backend: str,
    lora_down: Tensor,
    lora_up: Tensor,
    router: Tensor,
    seed: Tensor | None,
    *mix,
) -> tuple[Tensor, ...]:
    """Frozen linear plus top-k mixture, forward.

    Args:
        mix: top_k, scale, renormalize, dropout, dropout_per_expert, stacked.

    Returns:
        y ``[..., N]`` and the outputs of ``topk_forward``.
    """
    y, op_bias, accumulate = _start(x, weight, bias, base_output, expand_first, base_product)
    routed = ops.of(backend).topk_forward(
        x, lora_down, lora_up, router, op_bias, seed, y, *mix, accumulate
    )
    return _finish(y, x, weight, accumulate), *routed


class TopkMixture(torch.autograd.Function):
    """:func:`topk_mixture` with its gradient.

    Saves the rank-space hidden, the logits and the k choices per token; and x, but only if a
    parameter is trained.
    """

    @staticmethod
    def forward(ctx, *arguments) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, _, _, _, ctx.base_product, ctx.backend, *tensors = arguments[:11]
        y, saved, counts, prob_sums = topk_mixture(*arguments)
        need = ctx.needs_input_grad
        kept = x if need[1] or any(need[7:10]) else None
        ctx.save_for_backward(kept, weight, *tensors, saved)
        ctx.shape, ctx.mix = x.shape, arguments[11:]
        ctx.mark_non_differentiable(counts)
        ctx.set_materialize_grads(False)
        return y, counts, prob_sums

    @staticmethod
    @plain_backward
    def backward(ctx, dy: Tensor | None, _dcounts, dprob_sums: Tensor | None):
        x, weight, lora_down, lora_up, router, seed, saved = ctx.saved_tensors
        need = ctx.needs_input_grad
        need_dx, need_dparams = need[0], any(need[7:10])
        if dy is None:
            dy = lora_up.new_zeros((*ctx.shape[:-1], lora_up.shape[2]))
        if dprob_sums is not None:
            dprob_sums = dprob_sums.contiguous()
        dy, dx, accumulate = _start_backward(ctx, dy, weight)
        dparams = (None,) * 3
        if need_dx or need_dparams:
            dparams = ops.of(ctx.backend).topk_backward(
                dy, dx if x is None else x, lora_down, lora_up, router, seed, saved, dprob_sums, dx,
                *ctx.mix, accumulate, need_dx, need_dparams,
            )  # fmt: skip
        return (
            *_base_gradients(ctx, dy, x, weight, dx, accumulate), *_wanted(dparams, need[7:10]),
            *(None,) * 7,
        )  # fmt: skip


# ---------------------------------------------------------------- gated


def gated_mixture(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base_output: Tensor | None,
    expand_first: bool,
    base_product: str,
    backend: str,
    lora_down: Tensor,
    down_bias: Tensor | None,
    lora_up: Tensor,
    up_bias: Tensor | None,
    weights: Tensor,
    row_map: Tensor | None,
    seed: Tensor | None,
    *mix,
) -> tuple[Tensor, Tensor]:
    """Frozen linear plus experts with given weights, forward.

    Args:
        mix: scale, activation, dropout.

    Returns:
        y ``[..., N]`` and hidden ``[T, E * r]`` before the activation.
    """
    y, op_bias, accumulate = _start(x, weight, bias, base_output, expand_first, base_product)
    hidden = ops.of(backend).gated_forward(
        x, lora_down, down_bias, lora_up, up_bias, weights, row_map, op_bias, seed, y, *mix,
        accumulate,
    )  # fmt: skip
    return _finish(y, x, weight, accumulate), hidden


class GatedMixture(torch.autograd.Function):
    """:func:`gated_mixture` with its gradient; frozen experts save hidden and no x."""

    @staticmethod
    def forward(ctx, *arguments) -> Tensor:
        x, weight, _, _, _, ctx.base_product, ctx.backend, *tensors, row_map, seed = arguments[:14]
        y, hidden = gated_mixture(*arguments)
        need = ctx.needs_input_grad
        kept = x if need[1] or any(need[7:11]) else None
        ctx.save_for_backward(kept, weight, *tensors, row_map, seed, hidden)
        ctx.shape, ctx.mix = x.shape, arguments[14:]
        return y

    @staticmethod
    @plain_backward
    def backward(ctx, dy: Tensor):
        x, weight, *tensors, row_map, seed, hidden = ctx.saved_tensors
        need = ctx.needs_input_grad
        need_dx, need_dparams, need_dweights = need[0], any(need[7:11]), need[11]
        dy, dx, accumulate = _start_backward(ctx, dy, weight)
        gradients = (None,) * 5
        if need_dx or need_dparams or need_dweights:
            gradients = ops.of(ctx.backend).gated_backward(
                dy, dx if x is None else x, *tensors, row_map, seed, hidden, dx, *ctx.mix,
                accumulate, need_dx, need_dparams, need_dweights,
            )  # fmt: skip
        return (
            *_base_gradients(ctx, dy, x, weight, dx, accumulate), *_wanted(gradients, need[7:12]),
            *(None,) * 5,
        )  # fmt: skip


# ---------------------------------------------------------------- grid


def grid_mixture(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base_output: Tensor | None,
    expand_first: bool,
    base_product: str,
    backend: str,
    lora_down: Tensor,
    lora_up: Tensor,
    router: Tensor,
    omega: Tensor,
    beta: Tensor,
    intuition: Tensor | None,
    row_map: Tensor | None,
    *mix,
) -> tuple[Tensor, Tensor]:
    """Frozen linear plus a grid of rank-1 experts, forward.

    Args:
        mix: token_scale, task_scale, diagonal.

    Returns:
        y ``[..., N]`` and ``[T, r1 + gates]``: hidden and logits.
    """
    y, op_bias, accumulate = _start(x, weight, bias, base_output, expand_first, base_product)
    hidden = ops.of(backend).grid_forward(
        x, lora_down, lora_up, router, omega, beta, intuition, row_map, op_bias, y, *mix, accumulate
    )
    return _finish(y, x, weight, accumulate), hidden


class GridMixture(torch.autograd.Function):
    """:func:`grid_mixture` with its gradient."""

    @staticmethod
    def forward(ctx, *arguments) -> Tensor:
        x, weight, _, _, _, ctx.base_product, ctx.backend, *tensors = arguments[:14]
        y, hidden = grid_mixture(*arguments)
        need = ctx.needs_input_grad
        kept = x if need[1] or any(need[7:12]) else None
        ctx.save_for_backward(kept, weight, *tensors, hidden)
        ctx.shape, ctx.mix = x.shape, arguments[14:]
        return y

    @staticmethod
    @plain_backward
    def backward(ctx, dy: Tensor):
        x, weight, *tensors, hidden = ctx.saved_tensors
        need = ctx.needs_input_grad
        need_dx, need_dparams, need_dintuition = need[0], any(need[7:12]), need[12]
        dy, dx, accumulate = _start_backward(ctx, dy, weight)
        gradients = (None,) * 6
        if need_dx or need_dparams or need_dintuition:
            gradients = ops.of(ctx.backend).grid_backward(
                dy, dx if x is None else x, *tensors, hidden, dx, *ctx.mix, accumulate, need_dx,
                need_dparams, need_dintuition,
            )  # fmt: skip
        return (
            *_base_gradients(ctx, dy, x, weight, dx, accumulate), *_wanted(gradients, need[7:13]),
            *(None,) * 4,
        )  # fmt: skip


# ---------------------------------------------------------------- averaged


def averaged_mixture(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base_output: Tensor | None,
    expand_first: bool,
    base_product: str,
    backend: str,
    lora_down: Tensor,
    lora_up: Tensor,
    weights: Tensor,
    row_map: Tensor | None,
    *mix,
) -> tuple[Tensor, Tensor]:
    """Frozen linear plus the experts' averaged factors, forward.

    Args:
        mix: splits, scale, merged.

    Returns:
        y ``[..., N]`` and hidden ``[T, splits * E * r]``, or ``[T, r]`` of the merged factors.
    """
    y, op_bias, accumulate = _start(x, weight, bias, base_output, expand_first, base_product)
    hidden = ops.of(backend).averaged_forward(
        x, lora_down, lora_up, weights, row_map, op_bias, y, *mix, accumulate
    )
    return _finish(y, x, weight, accumulate), hidden


class AveragedMixture(torch.autograd.Function):
    """:func:`averaged_mixture` with its gradient."""

    @staticmethod
    def forward(ctx, *arguments) -> Tensor:
        x, weight, _, _, _, ctx.base_product, ctx.backend, *tensors = arguments[:11]
        y, hidden = averaged_mixture(*arguments)
        need = ctx.needs_input_grad
        ctx.shape, ctx.mix = x.shape, arguments[11:]
        _, _, merged = ctx.mix
        # Merged, the weights' gradient comes from that of the factors.
        kept = x if need[1] or any(need[7:9]) or (merged and need[9]) else None
        ctx.save_for_backward(kept, weight, *tensors, hidden)
        return y

    @staticmethod
    @plain_backward
    def backward(ctx, dy: Tensor):
        x, weight, *tensors, hidden = ctx.saved_tensors
        need = ctx.needs_input_grad
        need_dx, need_dparams, need_dweights = need[0], any(need[7:9]), need[9]
        dy, dx, accumulate = _start_backward(ctx, dy, weight)
        gradients = (None,) * 3
        if need_dx or need_dparams or need_dweights:
            gradients = ops.of(ctx.backend).averaged_backward(
                dy, dx if x is None else x, *tensors, hidden, dx, *ctx.mix, accumulate, need_dx,
                need_dparams, need_dweights,
            )  # fmt: skip
        return (
            *_base_gradients(ctx, dy, x, weight, dx, accumulate), *_wanted(gradients, need[7:10]),
            *(None,) * 4,
        )  # fmt: skip


# ---------------------------------------------------------------- output gate


def output_gate_mixture(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base_output: Tensor | None,
    expand_first: bool,
    base_product: str,
    backend: str,
    lora_down: Tensor,
    lora_up: Tensor,
    projection: Tensor,
    tau: Tensor,
    factors: Tensor,
    means: Tensor | None,
    scales: Tensor,
    mask: Tensor | None,
    *mix,
) -> tuple[Tensor, Tensor, Tensor]:
    """Frozen linear plus frozen experts gated on their own outputs, forward.

    Args:
        mix: normalization, mask_input.

    Returns:
        y ``[..., N]``, gates ``[T, E]`` and hidden ``[T, E * r]``.
    """
    y, op_bias, accumulate = _start(x, weight, bias, base_output, expand_first, base_product)
    hidden, gates = ops.of(backend).output_gate_forward(
        x, lora_down, lora_up, projection, factors, means, scales, tau, mask, op_bias, y, *mix,
        accumulate,
    )  # fmt: skip
    return _finish(y, x, weight, accumulate), gates, hidden


class OutputGateMixture(torch.autograd.Function):
    """:func:`output_gate_mixture` with its gradient: x, projection and tau; experts are frozen."""

    @staticmethod
    def forward(ctx, *arguments) -> tuple[Tensor, Tensor]:
        x, weight, _, _, _, ctx.base_product, ctx.backend, *tensors = arguments[:15]
        y, gates, hidden = output_gate_mixture(*arguments)
        ctx.save_for_backward(
            x if ctx.needs_input_grad[1] else None, weight, *tensors, hidden, gates
        )
        ctx.shape, ctx.mix = x.shape, arguments[15:]
        ctx.set_materialize_grads(False)
        return y, gates

    @staticmethod
    @plain_backward
    def backward(ctx, dy: Tensor | None, dgates: Tensor | None):
        x, weight, *tensors, hidden, gates = ctx.saved_tensors
        lora_down, lora_up, projection, tau, factors, means, scales, mask = tensors
        need = ctx.needs_input_grad
        if dy is None:
            dy = lora_up.new_zeros((*ctx.shape[:-1], lora_up.shape[2]))
        if dgates is not None:
            dgates = dgates.contiguous()
        dy, dx, accumulate = _start_backward(ctx, dy, weight)
        dprojection = dtau = None
        if need[0] or need[9] or need[10]:
            normalized, dlogits, dtau = ops.of(ctx.backend).output_gate_backward(
                dy, dgates, lora_down, lora_up, projection, factors, means, scales, tau, mask,
                hidden, gates, dx, *ctx.mix, accumulate, need[0],
            )  # fmt: skip
            dprojection = normalized.t() @ dlogits if need[9] else None
        return (
            *_base_gradients(ctx, dy, x, weight, dx, accumulate), None, None, dprojection,
            dtau if need[10] else None, *(None,) * 6,
        )  # fmt: skip


# ---------------------------------------------------------------- the products alone


class Shrink(torch.autograd.Function):
    """``hidden = x @ rows.T`` in the accumulator's dtype."""

    @staticmethod
    def forward(ctx, backend: str, x: Tensor, rows: Tensor) -> Tensor:
        _, need_dx, need_drows = ctx.needs_input_grad
        ctx.save_for_backward(x if need_drows else None, rows if need_dx else None)
        ctx.shape, ctx.backend = x.shape, backend
        return ops.of(backend).shrink(x, rows)

    @staticmethod
    @plain_backward
    def backward(ctx, dhidden: Tensor):
        x, rows = ctx.saved_tensors
        dhidden = dhidden.contiguous()
        dx = None
        if rows is not None:
            dx = rows.new_empty(ctx.shape)
            ops.of(ctx.backend).expand(dhidden, rows, dx, False)
        return None, dx, ops.of(ctx.backend).outer(dhidden, x) if x is not None else None


def expand_mixture(
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    base_output: Tensor | None,
    expand_first: bool,
    base_product: str,
    backend: str,
    hidden: Tensor,
    rows: Tensor,
) -> tuple[Tensor]:
    """Frozen linear, or a given y, plus ``hidden @ rows``; x may be None beside a given y."""
    y, bias_left, accumulate = _start(x, weight, bias, base_output, expand_first, base_product)
    if bias_left is not None:
        y.copy_(bias_left)
    ops.of(backend).expand(hidden, rows, y, accumulate or bias_left is not None)
    return (_finish(y, x, weight, accumulate),)


class ExpandMixture(torch.autograd.Function):
    """:func:`expand_mixture` with its gradient."""

    @staticmethod
    def forward(ctx, *arguments) -> Tensor:
        x, weight, _, _, _, ctx.base_product, ctx.backend, hidden, rows = arguments
        need = ctx.needs_input_grad
        ctx.save_for_backward(
            x if need[1] else None, weight, hidden if need[8] else None, rows if need[7] else None
        )
        return expand_mixture(*arguments)[0]

    @staticmethod
    @plain_backward
    def backward(ctx, dy: Tensor):
        x, weight, hidden, rows = ctx.saved_tensors
        dy = dy.contiguous()
        need_dx = ctx.needs_input_grad[0] and weight is not None
        dx = _through(ctx, dy, weight) if need_dx else None
        return (
            *_base_gradients(ctx, dy, x, weight, dx, True),
            ops.of(ctx.backend).shrink(dy, rows) if rows is not None else None,
            ops.of(ctx.backend).outer(hidden, dy) if hidden is not None else None,
        )
