"""Fused training and inference kernels for routed mixtures of LoRA experts on frozen linears."""

from . import functional, nn, reference
from ._version import __version__
from .adapters import load_adapter, save_adapter
from .backends import set_default_backend, use_backend
from .balance import aux_loss, routing_stats
from .configs import MoLAConfig
from .models import apply, fuse

__all__ = [
    "MoLAConfig",
    "__version__",
    "apply",
    "aux_loss",
    "functional",
    "fuse",
    "load_adapter",
    "nn",
    "reference",
    "routing_stats",
    "save_adapter",
    "set_default_backend",
    "use_backend",
]
