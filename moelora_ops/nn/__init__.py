"""Drop-in layers, one file per method."""

from .base import AdapterLinear
from .mola import MoLALinear

__all__ = ["AdapterLinear", "MoLALinear"]
