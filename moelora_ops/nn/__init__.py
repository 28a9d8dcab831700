"""Drop-in layers, and what they need beside them."""

from .base import AdapterLinear
from .lora import LoRALinear
from .loras import LoRA, stack_loras, unstack_loras
from .mola import MoLALinear
from .mole import MoLELinear
from .mole_block import MoLEBlock
from .mor1e import MoR1ELinear
from .orchmoe import OrchMoELinear, PolytroponLinear
from .pemt import PEMTLinear
from .pemt_adapter import PEMTAdapter
from .pemt_source import PEMTSourceLinear
from .routed_tasks import TaskRouters
from .shared_gate import SharedGate
from .task_router import TaskRouter
from .tasks import TaskIds

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
