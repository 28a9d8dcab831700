"""Loads the compiled extension, whose kernels register for the operators of ``ops.py``."""

import contextlib
import importlib
import math
import os
import sys
from collections.abc import Iterator

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


LINEARS = ("auto", "own", "library")

_linear = os.environ.get("MOELORA_LINEAR") or "auto"
if _linear not in LINEARS:
    raise ValueError(f"MOELORA_LINEAR: wanted one of {', '.join(LINEARS)}, got {_linear!r}")

ANY_NUMBER = sys.maxsize

# Most tokens for which our product with a frozen weight beats the library's, per level.  Measured
# on Zen 4 with torch 2.13, whose library used AVX-512 beside every one of them (docs/design.md).
_OWN_LINEAR_TOKENS = {
    "avx512_bf16": {torch.float32: 64, torch.bfloat16: 16, torch.float16: 64},
    "avx512": {torch.float32: 64, torch.bfloat16: 4, torch.float16: 64},
    "avx2": {torch.float32: 16, torch.bfloat16: 2, torch.float16: 16},
    "portable": {torch.float32: 4},
}
# Beyond a few tokens libraries differ by vendor: Intel's own processors have faster ones, and AMX.
_ANY_TOKENS_ON_AMD = {
    "avx512_bf16": (torch.float32, torch.bfloat16, torch.float16),
    "avx512": (torch.float32, torch.float16),
}


def _limits(level: str) -> dict[torch.dtype, int]:
    limits = dict(_OWN_LINEAR_TOKENS.get(level, {}))
    if level != "none" and torch.ops.moelora_ops.cpu_vendor() == "amd":
        limits |= dict.fromkeys(_ANY_TOKENS_ON_AMD.get(level, ()), ANY_NUMBER)
    return limits


_linear_limits = _limits(isa_level())


def set_linear(choice: str) -> None:
    """Which product computes a frozen ``nn.Linear`` on the CPU.

    Args:
        choice: "auto" takes ours where it was measured to be faster than the library's GEMM, "own"
            takes ours for any number of tokens, "library" never does.  The environment variable
            MOELORA_LINEAR sets it too.

    Raises:
        ValueError: `choice` is none of these.
    """
    global _linear
    if choice not in LINEARS:
        raise ValueError(f"choice: wanted one of {', '.join(LINEARS)}, got {choice!r}")
    _linear = choice


@contextlib.contextmanager
def use_linear(choice: str) -> Iterator[None]:
    """:func:`set_linear` for the forward passes inside; their backward follows them."""
    before = _linear
    set_linear(choice)
    try:
        yield
    finally:
        set_linear(before)


def linear_choice() -> str:
    """What :func:`set_linear` set."""
    return _linear


def own_linear_tokens(dtype: torch.dtype) -> int:
    """Most tokens whose frozen linear is ours; ANY_NUMBER without a limit, 0 for none."""
    if _linear == "library" or _error:
        return 0
    return ANY_NUMBER if _linear == "own" else _linear_limits.get(dtype, 0)


def base_product(x: torch.Tensor, weight: torch.Tensor) -> str:
    """Which of ``ops.BASE_PRODUCTS`` computes a frozen linear: x ``[..., K]``, weight ``[N, K]``.

    Backward it is ours only where the number of tokens has no limit: it packs the weight, which for
    one token takes longer than the product.
    """
    most = own_linear_tokens(x.dtype)
    if not most or weight.stride(-1) != 1:
        return ops.LIBRARY
    tokens = math.prod(x.shape[:-1])
    if most == ANY_NUMBER:
        return ops.OWN if tokens > 1 else ops.OWN_FORWARD
    return ops.OWN_FORWARD if tokens <= most else ops.LIBRARY
