"""Triton kernels: implementations of the operators' second namespace (``ops.of("triton")``).

A kernel family is a file (shrink, expand, outer), and so is a mix, which composes the families'
device functions into kernels of its own and implements its operators on them.  Nothing here imports
triton before an operator runs.

The operators run on CUDA tensors (ROCm's are CUDA tensors to torch), and on CPU tensors under a
Triton driver that emulates a GPU, which is how they are tested where there is none.
"""

import contextlib
import importlib
import importlib.util
from importlib import metadata

import torch

from ... import ops

# Operator -> the module here that implements it, under its name.
_MODULES = {
    "shrink": "products",
    "expand": "products",
    "outer": "products",
    "topk_forward": "topk",
    "topk_backward": "topk",
    "gated_forward": "gated",
    "gated_backward": "gated",
    "averaged_forward": "averaged",
    "averaged_backward": "averaged",
    "grid_forward": "grid",
    "grid_backward": "grid",
    "output_gate_forward": "output_gate",
    "output_gate_backward": "output_gate",
    "cosines": "cosines",
    "cosines_backward": "cosines",
}

_OLDEST = (3, 6)


def version() -> str:
    """Triton's version, or "" if it is not installed."""
    # Not by importing it, which takes longer than all of this package.
    for name in ("triton", "triton-rocm", "pytorch-triton", "pytorch-triton-rocm"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return ""


def _find_missing() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    found = version()
    if found and tuple(int(n) for n in found.split(".")[:2]) < _OLDEST:
        return f"triton {found} is too old, wanted {'.'.join(map(str, _OLDEST))} or later"
    return ""


_missing = _find_missing()


def why_missing() -> str:
    """Why the Triton kernels cannot run, or "" if they can."""
    return _missing


def _register(name: str, module: str) -> None:
    function = None

    def run(*arguments):
        nonlocal function
        if function is None:
            function = getattr(importlib.import_module(f".{module}", __name__), name)
        device = arguments[0].device
        if device.type != "cuda":
            return function(*arguments)
        with torch.cuda.device(device):
            return function(*arguments)

    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)


_library = torch.library.Library(ops.NAMESPACES["triton"], "IMPL")
for _name, _module in _MODULES.items():
    _register(_name, _module)
