"""Loads the compiled extension, whose kernels register for the operators of ``ops.py``."""

import importlib
import os

import torch

from .. import ops  # the schemas must exist before the kernels register

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


def _without_cuda_kernels() -> list[str]:
    name = ops.NAMESPACES["cuda"]
    return [
        operator
        for operator in vars(ops.of("cuda"))
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{name}::{operator}", "CUDA")
    ]


_without = [] if _error else _without_cuda_kernels()
_cuda_error = _error
if _without:
    _cuda_error = (
        "the compiled extension has no CUDA kernels (install where there is nvcc)"
        if len(_without) == len(vars(ops.of("cuda")))
        else f"the compiled extension has no CUDA kernels for {', '.join(_without)}"
    )


def why_cuda_missing() -> str:
    """Why the compiled CUDA kernels cannot run, or "" if they can."""
    return _cuda_error


def isa_level() -> str:
    """The instruction set level of the CPU kernels (environment MOELORA_CPU_ISA overrides it)."""
    return "none" if _error else torch.ops.moelora_ops.cpu_isa()


_small_linear = os.environ.get("MOELORA_SMALL_LINEAR", "1") != "0"

# Most tokens for which our dot kernel beats the library GEMM on a frozen linear, per level.
# Measured on Zen 4 with torch 2.13, whose library used AVX-512 beside every one of them.
_SMALL_LINEAR_TOKENS = {
    "avx512_bf16": {torch.float32: 64, torch.bfloat16: 16, torch.float16: 64},
    "avx512": {torch.float32: 64, torch.bfloat16: 4, torch.float16: 64},
    "avx2": {torch.float32: 16, torch.bfloat16: 2, torch.float16: 16},
    "portable": {torch.float32: 4},
}
_small_linear_limits = _SMALL_LINEAR_TOKENS.get(isa_level(), {})


def set_small_linear(enabled: bool) -> None:
    """Whether a frozen linear of a few tokens runs on our dot kernel, not on the library GEMM.

    On by default (environment MOELORA_SMALL_LINEAR=0 turns it off): there the library is far from
    memory speed.
    """
    global _small_linear
    _small_linear = bool(enabled)


def small_linear_enabled() -> bool:
    """What :func:`set_small_linear` set."""
    return _small_linear


def small_linear_tokens(dtype: torch.dtype) -> int:
    """Most tokens that :func:`small_linear_enabled` applies to at this instruction set level."""
    return _small_linear_limits.get(dtype, 0) if _small_linear else 0
