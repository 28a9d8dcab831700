"""The configuration of each method for a whole model, one file per method."""

from .base import AdapterConfig
from .mola import MoLAConfig

__all__ = ["AdapterConfig", "MoLAConfig"]
