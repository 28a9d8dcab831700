"""Fused training and inference kernels for routed mixtures of LoRA experts on frozen linears."""

from . import functional, nn, reference
from ._version import __version__
from .adapters import load_adapter, save_adapter
from .backends import set_default_backend, use_backend
from .balance import aux_loss, gating_balance_loss, routing_stats
from .configs import (
    LoRAConfig,
    MoLAConfig,
    MoLEConfig,
    MoR1EConfig,
    OrchMoEConfig,
    PEMTConfig,
    PEMTSource,
    PEMTSourceConfig,
    PolytroponConfig,
)
from .intuition import intuition
from .models import adapter_parameters, apply, fuse
from .nn.mole_gate import sequence_mask, set_expert_mask
from .nn.routed_tasks import prompt_mask
from .nn.tasks import task_ids
from .pemt import pemt_source, source_weights, task_sparsity_loss

__all__ = [
    "LoRAConfig",
    "MoLAConfig",
    "MoLEConfig",
    "MoR1EConfig",
    "OrchMoEConfig",
    "PEMTConfig",
    "PEMTSource",
    "PEMTSourceConfig",
    "PolytroponConfig",
    "__version__",
    "adapter_parameters",
    "apply",
    "aux_loss",
    "functional",
    "fuse",
    "gating_balance_loss",
    "intuition",
    "load_adapter",
    "nn",
    "pemt_source",
    "prompt_mask",
    "reference",
    "routing_stats",
    "save_adapter",
    "sequence_mask",
    "set_default_backend",
    "set_expert_mask",
    "source_weights",
    "task_ids",
    "task_sparsity_loss",
    "use_backend",
]
