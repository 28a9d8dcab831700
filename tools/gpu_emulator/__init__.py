"""Runs GPU kernels on the CPU."""

from .errors import Fault, Unsupported
from .machine import run
from .ptx import load
from .triton_driver import emulated_gpu

__all__ = ["Fault", "Unsupported", "emulated_gpu", "load", "run"]
