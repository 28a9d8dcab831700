"""The truth: each method as its paper states it, eager, literal, independent of the kernels."""

from .averaged import averaged
from .base import LooksLikeBase
from .gated import ACTIVATIONS, gated, weights_per_token
from .lora import LoRALinear
from .mola import MoLALinear, Routing, mola, no_autocast
from .mole import (
    Gating,
    MoLELinear,
    expert_hidden,
    expert_outputs,
    gating,
    mixture,
    mole,
    mole_gates,
    sequence_mean,
)
from .mor1e import MOR1E_MODES, NO_SCORES, AmbientScores, MoR1ELinear, Scores, mor1e
from .orchmoe import (
    OrchMoELinear,
    PolytroponLinear,
    gumbel_sigmoid,
    skill_weights,
    task_router,
)
from .pemt import (
    Agreement,
    Expert,
    PEMTAdapter,
    PEMTLinear,
    PEMTSourceLinear,
    combine_prompts,
    prompt_gate,
    prompt_query,
    task_sparsity,
)
from .philox import keep_mask, philox4x32

__all__ = [
    "ACTIVATIONS",
    "MOR1E_MODES",
    "NO_SCORES",
    "Agreement",
    "AmbientScores",
    "Expert",
    "Gating",
    "LoRALinear",
    "LooksLikeBase",
    "MoLALinear",
    "MoLELinear",
    "MoR1ELinear",
    "OrchMoELinear",
    "PEMTAdapter",
    "PEMTLinear",
    "PEMTSourceLinear",
    "PolytroponLinear",
    "Routing",
    "Scores",
    "averaged",
    "combine_prompts",
    "expert_hidden",
    "expert_outputs",
    "gated",
    "gating",
    "gumbel_sigmoid",
    "keep_mask",
    "mixture",
    "mola",
    "mole",
    "mole_gates",
    "mor1e",
    "no_autocast",
    "philox4x32",
    "prompt_gate",
    "prompt_query",
    "sequence_mean",
    "skill_weights",
    "task_router",
    "task_sparsity",
    "weights_per_token",
]
