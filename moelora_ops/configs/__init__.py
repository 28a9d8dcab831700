"""The configuration of each method for a whole model, one file per method."""

from .base import AdapterConfig
from .lora import LoRAConfig
from .mola import MoLAConfig
from .mole import MoLEConfig
from .mor1e import MoR1EConfig
from .orchmoe import OrchMoEConfig, PolytroponConfig
from .pemt import PEMTConfig, PEMTSource, PEMTSourceConfig

__all__ = [
    "AdapterConfig",
    "LoRAConfig",
    "MoLAConfig",
    "MoLEConfig",
    "MoR1EConfig",
    "OrchMoEConfig",
    "PEMTConfig",
    "PEMTSource",
    "PEMTSourceConfig",
    "PolytroponConfig",
]
