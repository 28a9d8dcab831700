"""Drop-in layers, one file per method."""

from .base import AdapterLinear
from .lora import LoRALinear
from .loras import LoRA, stack_loras, unstack_loras
from .mola import MoLALinear
from .mole import MoLELinear, SharedGate
from .mole_block import MoLEBlock
from .mor1e import MoR1ELinear
from .orchmoe import OrchMoELinear, PolytroponLinear
from .pemt import PEMTAdapter, PEMTLinear, PEMTSourceLinear
from .tasks import TaskIds, TaskRouter, TaskRouters

__all__ = [
    "AdapterLinear",
    "LoRA",
    "LoRALinear",
    "MoLALinear",
    "MoLEBlock",
    "MoLELinear",
    "MoR1ELinear",
    "OrchMoELinear",
    "PEMTAdapter",
    "PEMTLinear",
    "PEMTSourceLinear",
    "PolytroponLinear",
    "SharedGate",
    "TaskIds",
    "TaskRouter",
    "TaskRouters",
    "stack_loras",
    "unstack_loras",
]
