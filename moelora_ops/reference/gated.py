"""Experts beside a frozen linear, each with a given weight: literally, for any dtype up to float64.

PEMT, OrchMoE's ``sum`` and X-LoRA-style layers are this with weights from their own gates; one
expert of weight 1 is LoRA, and with an activation and biases it is a parallel adapter.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .philox import keep_mask

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda hidden: hidden,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda hidden: F.gelu(hidden, approximate="tanh"),
}


def gated(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_down: Tensor,
    lora_up: Tensor,
    weights: Tensor,
    scale: float | Tensor | Sequence[float] = 1.0,
    *,
    activation: str | None = None,
    row_map: Tensor | None = None,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    base_output: Tensor | None = None,
) -> Tensor:
    """``y = x Wᵀ + b + Σ_e s_e w_e (φ(dropout(x) A_eᵀ + a_e) B_eᵀ + b_e)``.

    Args:
        x: ``[..., K]``.
        weight, bias: the frozen linear, ``[N, K]`` and ``[N]`` or None; ignored if `base_output`
            is given.
        lora_down: ``[E, r, K]``; A of expert e is ``lora_down[e]``.
        lora_up: ``[E, r, N]``; B of expert e is ``lora_up[e].T``.
        weights: ``[..., E]`` with x's leading dimensions, per token; ``[batch, E]`` for x
            ``[batch, length, K]``, per sequence; or ``[rows, E]`` with `row_map`.
        scale: one number, or E of them.
        activation: φ: None (LoRA), ``"relu"``, ``"gelu"`` (erf) or ``"gelu_tanh"``.
        row_map: integers ``[T]`` or x's leading dimensions, the row of `weights` that each of x's
            T tokens takes.
        down_bias: a, ``[E, r]``.
        up_bias: b, ``[E, N]``; scaled and weighted like the expert's output.
        dropout: probability of dropping an expert's input, one mask for all experts of a token.
        seed: int64, one element; required if dropout > 0.
        base_output: ``[..., N]``, the frozen layer's output if it is not a plain linear.

    Returns:
        y ``[..., N]``.
    """
    tokens = x.reshape(-1, x.shape[-1])
    gates = weights_per_token(weights, x, row_map)
    num_experts = len(lora_down)
    scales = [scale] * num_experts if isinstance(scale, (int, float)) else scale
    if base_output is None:
        y = F.linear(tokens, weight, bias)
    else:
        y = base_output.reshape(-1, base_output.shape[-1])
    inputs = tokens
    if dropout > 0:
        inputs = tokens.where(keep_mask(seed, *tokens.shape, dropout), 0) / (1 - dropout)
    for e in range(num_experts):
        hidden = inputs @ lora_down[e].T
        if down_bias is not None:
            hidden = hidden + down_bias[e]
        expert = ACTIVATIONS[activation](hidden) @ lora_up[e]
        if up_bias is not None:
            expert = expert + up_bias[e]
        y = y + (scales[e] * gates[:, e : e + 1] * expert).to(y.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def weights_per_token(
    weights: Tensor, x: Tensor, row_map: Tensor | None, trailing: int = 1
) -> Tensor:
    """Weights per token, per sequence or by row map, as ``[T, ...]`` of at least float32.

    Args:
        weights: its last `trailing` dimensions belong to one row: E, or splits and E.
        x: ``[..., K]``, T tokens.
        row_map: see :func:`gated`.
    """
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    row = weights.shape[weights.dim() - trailing :]
    if row_map is not None:
        return weights[row_map.reshape(-1).long()]
    if weights.dim() - trailing == x.dim() - 1:
        return weights.reshape(-1, *row)
    return weights[:, None].expand(*x.shape[:2], *row).reshape(-1, *row)
