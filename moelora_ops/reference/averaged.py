"""Experts beside a frozen linear whose factors are averaged first: literally, up to float64.

Polytropon, C-Poly and MHR do this with weights per task (PEFT's Poly layer, mttl), and so may
OrchMoE.  It is quadratic in the weights, unlike :func:`moelora_ops.reference.gated`, and the same
for one-hot weights only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .gated import weights_per_token


def averaged(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_down: Tensor,
    lora_up: Tensor,
    weights: Tensor,
    scale: float = 1.0,
    *,
    row_map: Tensor | None = None,
    splits: int = 1,
    base_output: Tensor | None = None,
) -> Tensor:
    """``y = x Wᵀ + b + scale · (x Aᵀ) Bᵀ`` with ``A = Σ_e w_e A_e`` and ``B = Σ_e w_e B_e``.

    Every token gets merged factors of its own, which is what the formula says and needs
    ``r (K + N)`` numbers per token: this is for judging, not for training.

    Args:
        x: ``[..., K]``.
        weight, bias: the frozen linear, ``[N, K]`` and ``[N]`` or None; ignored if `base_output`
            is given.
        lora_down: ``[E, r, K]``; A of expert e is ``lora_down[e]``.
        lora_up: ``[E, r, N]``; B of expert e is ``lora_up[e].T``.
        weights: ``[..., E]`` with x's leading dimensions, per token; ``[batch, E]`` for x
            ``[batch, length, K]``, per sequence; or ``[rows, E]`` with `row_map`.  With splits
            ``[..., Q, E]``.
        scale: one number.
        row_map: see :func:`gated`.
        splits: Q of multi-head routing (MHR, 2211.03831): input and output features fall into Q
            equal segments, and segment q of A (its columns) and of B (its rows) is merged with
            ``weights[..., q, :]``.
        base_output: ``[..., N]``, the frozen layer's output if it is not a plain linear.

    Returns:
        y ``[..., N]``.
    """
    if splits == 1:
        weights = weights.unsqueeze(-2)
    tokens = x.reshape(-1, x.shape[-1])
    per_token = weights_per_token(weights, x, row_map, trailing=2)  # [T, Q, E]
    wide = torch.promote_types(x.dtype, per_token.dtype)
    per_token = per_token.to(wide)
    merged = [
        torch.einsum("tqe,erqf->trqf", per_token, t.to(wide).unflatten(-1, (splits, -1))).flatten(2)
        for t in (lora_down, lora_up)
    ]
    hidden = torch.einsum("tk,trk->tr", tokens.to(wide), merged[0])
    adapter = scale * torch.einsum("tr,trn->tn", hidden, merged[1])
    if base_output is None:
        y = F.linear(tokens, weight, bias)
    else:
        y = base_output.reshape(-1, base_output.shape[-1])
    return (y + adapter.to(y.dtype)).reshape(*x.shape[:-1], y.shape[-1])
