"""What MoLE's gates have in common, be they a linear's own or shared: state, masks, by-products."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from .. import reference
from ..companions import check_model
from ..functional.mole import GRANULARITIES, MASK_MODES
from ..reference import Gating
from .checks import check_bool, check_choice

NORMALIZATIONS = ("l2", "l2_per_expert", "layernorm", "none")
GATE_STATE = ("gate", "log_tau", "expert_mask")


def check_arguments(granularity, normalization, mask_mode, gated, compact) -> None:
    """The constructors' contract; a whole model's configuration is checked by it as well."""
    for name, value, wanted in (
        ("granularity", granularity, GRANULARITIES),
        ("normalization", normalization, NORMALIZATIONS),
        ("mask_mode", mask_mode, MASK_MODES),
    ):
        check_choice(name, value, wanted)
    check_bool("gated", gated)
    check_bool("compact", compact)
    if compact and normalization == "layernorm":
        raise ValueError(
            "compact: wanted another normalization than 'layernorm', whose gate needs more than P"
        )


def new_gate(holder: nn.Module, width: int, num_experts: int, *, device, dtype) -> None:
    dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
    like = {"device": device, "dtype": dtype}
    holder.gate = nn.Parameter(torch.zeros(num_experts, width, num_experts, **like))
    # One element and not a scalar, which FSDP2 refuses to shard.
    holder.log_tau = nn.Parameter(torch.zeros(1, **like))
    everyone = torch.ones(num_experts, dtype=torch.bool, device=device)
    holder.register_buffer("expert_mask", everyone)


def checked_expert_mask(mask: Tensor | Sequence[bool], holder: nn.Module) -> Tensor:
    """`mask` as a bool tensor for `holder`, checked."""
    if not isinstance(mask, Tensor):
        mask = torch.tensor(mask, device=holder.gate.device)
    if mask.dtype != torch.bool:
        raise TypeError(f"expert_mask: wanted a bool tensor, got {mask.dtype}")
    if mask.shape != (holder.num_experts,):
        raise ValueError(
            f"expert_mask: wanted shape [{holder.num_experts}], got {list(mask.shape)}"
        )
    if not mask.is_meta and not mask.any():
        raise ValueError("expert_mask: wanted at least one True, but every expert is removed")
    return mask.to(holder.gate.device)


@contextlib.contextmanager
def sequence_mask(model: nn.Module, mask: Tensor | None) -> Iterator[None]:
    """Tell every MoLE gate in `model`, inside the ``with``, which tokens are real.

    A backward pass that recomputes (gradient checkpointing) belongs inside, too.

    Args:
        mask: bool or integer ``[batch, length]``, zero for padding, such as a tokenizer's attention
            mask; None for no padding.  For a gate from the question alone, mark the question.

    Raises:
        TypeError, ValueError: `mask` is no such tensor, or `model` has no gates.
    """
    check_model(model)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.is_floating_point():
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask: wanted a bool or integer tensor, got {got}")
        mask = mask.bool()
    gates = [module for module in model.modules() if hasattr(module, "sequence_mask")]
    if not gates:
        raise ValueError("model: has no MoLE gates")
    before = [gate.sequence_mask for gate in gates]
    try:
        for gate in gates:
            gate.sequence_mask = mask
        yield
    finally:
        for gate, old in zip(gates, before, strict=True):
            gate.sequence_mask = old


def set_expert_mask(model: nn.Module, keep: Tensor | Sequence[bool]) -> None:
    """Keep these experts in every MoLE gate of `model` and remove the others; nothing is retrained.

    Args:
        keep: bool ``[E]``, True keeps.

    Raises:
        TypeError, ValueError: `keep` does not fit or removes every expert, or there is no gate.
    """
    check_model(model)
    gates = [m for m in model.modules() if "expert_mask" in m._buffers]
    if not gates:
        raise ValueError("model: has no MoLE gates")
    checked = [checked_expert_mask(keep, gate) for gate in gates]
    for gate, mask in zip(gates, checked, strict=True):
        gate.expert_mask = mask


def tau_of(holder: nn.Module) -> Tensor:
    """τ, never rounded to 16 bits."""
    return holder.log_tau.to(torch.promote_types(holder.log_tau.dtype, torch.float32)).exp()


def gating_of(holder: nn.Module, gates: Tensor) -> Gating:
    real = holder.sequence_mask
    if real is not None and holder.granularity == "sequence":
        real = real.any(-1)
    return reference.gating(gates, holder.expert_mask, real)
