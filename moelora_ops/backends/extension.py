"""Loads the compiled extension, whose kernels register for the operators of ``ops.py``."""

import importlib
import os

from .. import ops  # noqa: F401  the schemas must exist before the kernels register

_error = ""

try:
    importlib.import_module("moelora_ops._C")
except ImportError as error:
    _error = (
        "the compiled extension is not built (install with a C++ compiler and --no-build-isolation)"
        if "moelora_ops._C" in str(error)
        else f"the compiled extension does not load: {error}"
    )


def why_missing() -> str:
    """Why the compiled kernels cannot run, or "" if they can."""
    return _error


def isa_level() -> str:
    """The instruction set level of the CPU kernels (environment MOELORA_CPU_ISA overrides it)."""
    import torch

    return "none" if _error else torch.ops.moelora_ops.cpu_isa()


# Up to a few tokens the extension's own product replaces the library GEMM for the frozen linear,
# which is far from memory speed there (docs/design.md).  MOELORA_SMALL_LINEAR=0 turns it off.
_small_linear = os.environ.get("MOELORA_SMALL_LINEAR", "1") != "0"


def set_small_linear(enabled: bool) -> None:
    """Whether a frozen linear of a few tokens runs on our dot kernel, not on the library GEMM."""
    global _small_linear
    _small_linear = bool(enabled)


def small_linear_enabled() -> bool:
    return _small_linear
