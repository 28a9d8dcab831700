"""The configuration of each method for a whole model, one file per method."""

from .base import AdapterConfig
from .mola import MoLAConfig
from .pemt import PEMTConfig, PEMTSource, PEMTSourceConfig

__all__ = ["AdapterConfig", "MoLAConfig", "PEMTConfig", "PEMTSource", "PEMTSourceConfig"]
