"""The truth: each method as its paper states it, eager, literal, independent of the kernels."""

from .base import LooksLikeBase
from .mola import MoLALinear, Routing, mola, no_autocast
from .philox import keep_mask, philox4x32

__all__ = [
    "LooksLikeBase",
    "MoLALinear",
    "Routing",
    "keep_mask",
    "mola",
    "no_autocast",
    "philox4x32",
]
