"""PEFT's Poly layers (Polytropon, and MHR with n_splits), made into ours."""

import torch
from torch import nn

from ..nn import PolytroponLinear


def is_poly(module: nn.Module) -> bool:
    """Whether `module` is a linear that PEFT has given Poly skills."""
    # By its parts: where no such layer is, peft need not be installed.
    return all(
        hasattr(module, part)
        for part in ("base_layer", "poly_lora_A", "poly_lora_B", "poly_router", "n_skills")
    )


def fused_poly(layer: nn.Module) -> PolytroponLinear:
    """Our layer in place of a PEFT Poly linear (:func:`is_poly`), with the same numbers.

    PEFT keeps ``A [Q, S, in/Q, r]`` and ``B [Q, S, r, out/Q]``, we ``[S, r, in]`` and
    ``[S, r, out]``: the parameters are copies, so make optimizers afterwards.

    Raises:
        ValueError: it does something that our layer would not do.
    """
    names = list(layer.poly_lora_A)
    if len(names) != 1:
        raise ValueError(f"model: wanted PEFT layers with one adapter, got {names}; delete others")
    (name,) = names
    if layer.disable_adapters or list(layer.active_adapters) != names:
        raise ValueError(f"model: the PEFT adapter {name!r} is not active; enable it first")
    if layer.poly_type[name] != "poly":
        raise ValueError(f"model: wanted poly_type='poly', got {layer.poly_type[name]!r}")
    a, b = layer.poly_lora_A[name], layer.poly_lora_B[name]
    logits = layer.poly_router[name].module_logits
    splits, skills, _, rank = a.shape
    base = layer.get_base_layer()
    fused = PolytroponLinear(
        base, skills, len(logits), rank, splits=splits, device=a.device, dtype=a.dtype
    )
    with torch.no_grad():
        fused.lora_down.copy_(a.permute(1, 3, 0, 2).reshape(fused.lora_down.shape))
        fused.lora_up.copy_(b.permute(1, 2, 0, 3).reshape(fused.lora_up.shape))
        fused.skill_logits.copy_(logits.view(fused.skill_logits.shape))
    for ours, theirs in ((fused.lora_down, a), (fused.lora_up, b), (fused.skill_logits, logits)):
        ours.requires_grad_(theirs.requires_grad)
    return fused.train(layer.training)
