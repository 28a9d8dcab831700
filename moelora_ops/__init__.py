"""Fused training and inference kernels for routed mixtures of LoRA experts on frozen linears."""

from . import functional, nn, reference
from ._version import __version__
from .adapters import load_adapter, save_adapter
from .backends import set_default_backend, use_backend
from .balance import aux_loss, routing_stats
from .configs import MoLAConfig, PEMTConfig, PEMTSource, PEMTSourceConfig
from .models import apply, fuse
from .pemt import pemt_source, source_weights, task_sparsity_loss

__all__ = [
    "MoLAConfig",
    "PEMTConfig",
    "PEMTSource",
    "PEMTSourceConfig",
    "__version__",
    "apply",
    "aux_loss",
    "functional",
    "fuse",
    "load_adapter",
    "nn",
    "pemt_source",
    "reference",
    "routing_stats",
    "save_adapter",
    "set_default_backend",
    "source_weights",
    "task_sparsity_loss",
    "use_backend",
]
