"""The truth: each method as its paper states it, eager, literal, independent of the kernels."""

from .base import LooksLikeBase
from .gated import ACTIVATIONS, gated, weights_per_token
from .mola import MoLALinear, Routing, mola, no_autocast
from .pemt import (
    Agreement,
    Expert,
    PEMTAdapter,
    PEMTLinear,
    PEMTSourceLinear,
    combine_prompts,
    prompt_gate,
    task_sparsity,
)
from .philox import keep_mask, philox4x32

__all__ = [
    "ACTIVATIONS",
    "Agreement",
    "Expert",
    "LooksLikeBase",
    "MoLALinear",
    "PEMTAdapter",
    "PEMTLinear",
    "PEMTSourceLinear",
    "Routing",
    "combine_prompts",
    "gated",
    "keep_mask",
    "mola",
    "no_autocast",
    "philox4x32",
    "prompt_gate",
    "task_sparsity",
    "weights_per_token",
]
