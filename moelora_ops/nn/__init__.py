"""Drop-in layers, one file per method."""

from .base import AdapterLinear
from .lora import LoRALinear
from .loras import LoRA, stack_loras, unstack_loras
from .mola import MoLALinear
from .mole import MoLELinear, SharedGate
from .pemt import PEMTAdapter, PEMTLinear, PEMTSourceLinear

__all__ = [
    "AdapterLinear",
    "LoRA",
    "LoRALinear",
    "MoLALinear",
    "MoLELinear",
    "PEMTAdapter",
    "PEMTLinear",
    "PEMTSourceLinear",
    "SharedGate",
    "stack_loras",
    "unstack_loras",
]
