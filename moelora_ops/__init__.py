"""Fused training and inference kernels for routed mixtures of LoRA experts on frozen linear layers."""

from . import functional, nn, reference
from ._version import __version__
from .backends import set_default_backend, use_backend

__all__ = ["__version__", "functional", "nn", "reference", "set_default_backend", "use_backend"]
