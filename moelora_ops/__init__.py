"""Fused training and inference kernels for routed mixtures of LoRA experts on frozen linears."""

from . import functional, nn, reference
from ._version import __version__
from .adapters import load_adapter, save_adapter
from .backends import set_default_backend, use_backend
from .balance import aux_loss, routing_stats
from .configs import (
    MoLAConfig,
    OrchMoEConfig,
    PEMTConfig,
    PEMTSource,
    PEMTSourceConfig,
    PolytroponConfig,
)
from .models import apply, fuse
from .nn.tasks import prompt_mask, task_ids
from .pemt import pemt_source, source_weights, task_sparsity_loss

__all__ = [
    "MoLAConfig",
    "OrchMoEConfig",
    "PEMTConfig",
    "PEMTSource",
    "PEMTSourceConfig",
    "PolytroponConfig",
    "__version__",
    "apply",
    "aux_loss",
    "functional",
    "fuse",
    "load_adapter",
    "nn",
    "pemt_source",
    "prompt_mask",
    "reference",
    "routing_stats",
    "save_adapter",
    "set_default_backend",
    "source_weights",
    "task_ids",
    "task_sparsity_loss",
    "use_backend",
]
