"""The configuration of each method for a whole model, one file per method."""

from .base import AdapterConfig
from .mola import MoLAConfig
from .orchmoe import OrchMoEConfig, PolytroponConfig
from .pemt import PEMTConfig, PEMTSource, PEMTSourceConfig

__all__ = [
    "AdapterConfig",
    "MoLAConfig",
    "OrchMoEConfig",
    "PEMTConfig",
    "PEMTSource",
    "PEMTSourceConfig",
    "PolytroponConfig",
]
