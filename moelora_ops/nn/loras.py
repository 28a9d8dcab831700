"""Trained LoRAs of one linear, in PEFT's layout, and their stack in ours."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import functional


class LoRA(NamedTuple):
    """One trained LoRA of one linear, as PEFT has it; any tuple of the three will do.

    Attributes:
        A: ``[r, in_features]``.
        B: ``[out_features, r]``.
        scale: alpha / r, or alpha / √r.
    """

    A: Tensor
    B: Tensor
    scale: float


class Stack(NamedTuple):
    """Several LoRAs, expert-major.

    Attributes:
        lora_down: ``[E, r, in_features]``, r the largest rank; rows of zeros make up for less.
        lora_up: ``[E, r, out_features]``, the B transposed.
        scales: one number per expert.
    """

    lora_down: Tensor
    lora_up: Tensor
    scales: list[float]


def stack_loras(
    loras: Sequence[tuple[Tensor, Tensor, float]],
    in_features: int,
    out_features: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Stack:
    """Copies of `loras` as one stack; ranks may differ.

    Args:
        loras: at least one (A, B, scale), see :class:`LoRA`.
        in_features, out_features: of the linear that they are for.
        device, dtype: of the stack; by default those of the first A.

    Raises:
        TypeError, ValueError: one of `loras` does not fit; the message says which.
    """
    if isinstance(loras, Tensor) or not isinstance(loras, Sequence) or not loras:
        raise ValueError(f"loras: wanted a list of at least one (A, B, scale), got {loras!r:.60}")
    for i, lora in enumerate(loras):
        _check_lora(f"loras[{i}]", lora, in_features, out_features)
    first = loras[0][0]
    like = {"device": device or first.device, "dtype": dtype or first.dtype}
    rank = max(a.shape[0] for a, _, _ in loras)
    down = torch.zeros(len(loras), rank, in_features, **like)
    up = torch.zeros(len(loras), rank, out_features, **like)
    for i, (a, b, _) in enumerate(loras):
        down[i, : a.shape[0]].copy_(a.detach())
        up[i, : a.shape[0]].copy_(b.detach().t())
    return Stack(down, up, [float(scale) for _, _, scale in loras])


def unstack_loras(lora_down: Tensor, lora_up: Tensor, scales: Sequence[float]) -> list[LoRA]:
    """The LoRAs of a stack, as views; padded ranks stay padded, which changes no output.

    Args:
        lora_down: ``[E, r, in_features]``.
        lora_up: ``[E, r, out_features]``.
        scales: one number per expert.
    """
    if lora_down.dim() != 3 or lora_up.dim() != 3 or lora_down.shape[:2] != lora_up.shape[:2]:
        raise ValueError(
            "lora_up: wanted [E, r, out_features] beside lora_down [E, r, in_features], got "
            f"{list(lora_up.shape)} and {list(lora_down.shape)}"
        )
    if len(scales) != len(lora_down):
        raise ValueError(f"scales: wanted {len(lora_down)} numbers, got {len(scales)}")
    experts = zip(lora_down, lora_up, scales, strict=True)
    return [LoRA(down, up.t(), float(scale)) for down, up, scale in experts]


def _check_lora(name: str, lora, in_features: int, out_features: int) -> None:
    if not isinstance(lora, Sequence) or len(lora) != 3:
        raise ValueError(f"{name}: wanted (A, B, scale), got {lora!r:.60}")
    a, b, scale = lora
    for letter, t in (("A", a), ("B", b)):
        if not isinstance(t, Tensor) or not t.is_floating_point():
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{name}: wanted {letter} as a floating-point tensor, got {got}")
    if a.dim() != 2 or a.shape[0] < 1 or a.shape[1] != in_features:
        raise ValueError(f"{name}: wanted A of shape [r, {in_features}], got {list(a.shape)}")
    if b.shape != (out_features, a.shape[0]):
        raise ValueError(
            f"{name}: wanted B of shape [{out_features}, {a.shape[0]}] beside A "
            f"{list(a.shape)}, got {list(b.shape)}"
        )
    functional.check_finite(f"{name}: scale", scale)
