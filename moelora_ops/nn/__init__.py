"""Drop-in layers, one file per method."""

from .base import AdapterLinear
from .mola import MoLALinear
from .pemt import PEMTAdapter, PEMTLinear, PEMTSourceLinear

__all__ = [
    "AdapterLinear",
    "MoLALinear",
    "PEMTAdapter",
    "PEMTLinear",
    "PEMTSourceLinear",
]
