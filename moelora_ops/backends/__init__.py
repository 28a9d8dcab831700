"""Which implementation runs: the one dispatch table.

A back end is a name, the device type its kernels live on and a test of whether it can run here.  An
explicit choice never falls back; the automatic one takes what was measured to be fastest for a mix
and architecture (``measured.TABLE``), else the first that fits, and says once if that is the
reference.
"""

import contextlib
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from . import extension, measured, triton


class Backend(NamedTuple):
    """One row of the table.

    Attributes:
        name: what ``use_backend`` takes.
        device: device type its kernels run on; None for any.
        dtypes: what they compute in.
        missing: returns why it cannot run here, or "" if it can.
    """

    name: str
    device: str | None
    dtypes: frozenset[torch.dtype]
    missing: Callable[[], str]


_FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16})

# In order of preference per device.
BACKENDS = (
    Backend("cpu", "cpu", _FLOATS | {torch.float64}, extension.why_missing),
    Backend("cuda", "cuda", _FLOATS | {torch.float64}, extension.why_cuda_missing),
    Backend("triton", "cuda", _FLOATS, triton.why_missing),
    Backend("reference", None, _FLOATS | {torch.float64}, lambda: ""),
)
_BY_NAME = {backend.name: backend for backend in BACKENDS}


_UNFORCED = ""  # a string, so that torch.compile guards on its value


class _Forced(threading.local):
    """What the ``use_backend`` blocks that this thread is in force.

    Not a ContextVar: torch.compile cannot trace one, while it guards on this.

    Attributes:
        name: of the innermost block, which may be None; outside all, ``_UNFORCED``.  Apart from the
            others, so that a graph is compiled once per name and not per way of nesting.
        outer: the names that the blocks' ends restore, innermost last.
    """

    def __init__(self):
        self.name: str | None = _UNFORCED
        self.outer: list[str | None] = []


_forced = _Forced()
_default: str | None = os.environ.get("MOELORA_BACKEND") or None
_said: set[str] = set()


def _check_name(name: str | None) -> None:
    if name is not None and name not in _BY_NAME:
        raise ValueError(f"backend: wanted one of {sorted(_BY_NAME)} or None, got {name!r}")


class use_backend(contextlib.ContextDecorator):
    """Force a back end: ``with use_backend("reference"): ...``; None restores the automatic choice.

    ``use_backend(name)`` takes effect inside a ``with`` block or around a decorated function, for
    the current thread.  ``set_default_backend`` changes the process.  A compiled function follows
    both: torch.compile compiles it anew for each back end that it is called under.

    Raises:
        ValueError: the name is unknown.
    """

    def __init__(self, name: str | None):
        _check_name(name)
        self.name = name

    def __enter__(self):
        _forced.outer.append(_forced.name)
        _forced.name = self.name
        return self

    def __exit__(self, *exc_info):
        _forced.name = _forced.outer.pop()


def set_default_backend(name: str | None) -> None:
    """Set the back end of the whole process outside ``use_backend`` blocks.

    The environment variable MOELORA_BACKEND does the same at import.
    """
    global _default
    _check_name(name)
    _default = name


def choose(device: torch.device, dtype: torch.dtype, mix: str = "") -> str:
    """Name of the back end that runs for tensors on `device` of `dtype`.

    Never by the number of tokens, so that a token's bits do not depend on how many others there
    are; and one for both directions, since backward reads what forward has saved.

    Args:
        mix: whose operators run ("topk", "gated", ...); "" for the products alone.

    Raises:
        RuntimeError: a back end was asked for that cannot run here, or not on these tensors.
    """
    forced = _default if _forced.name == _UNFORCED else _forced.name
    if forced is not None:
        _check_name(forced)
        backend = _BY_NAME[forced]
        why = _unfit(backend, device, dtype)
        if why:
            raise RuntimeError(f"backend {forced!r} was asked for, but {why}")
        return forced
    fastest = _fastest(device, mix)
    if fastest and not _unfit(_BY_NAME[fastest], device, dtype):
        return fastest
    reasons = []
    for backend in BACKENDS:
        why = _unfit(backend, device, dtype)
        if not why:
            if backend.name == "reference":
                _say_once(f"no kernels for {device.type} tensors: {'; '.join(reasons)}")
            return backend.name
        reasons.append(f"{backend.name}: {why}")
    raise RuntimeError(f"no back end computes in {dtype} on {device}: {'; '.join(reasons)}")


def _fastest(device: torch.device, mix: str) -> str:
    """What was measured, or ""."""
    return measured.TABLE.get((mix, architecture(device)), "") if measured.TABLE else ""


def architecture(device: torch.device) -> str:
    """Of a device, as in ``measured.TABLE``: "sm_90", "gfx942"; "" of one that is no GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return ""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


# As torch.compiler.assume_constant_result does, which would import half of the compiler.
architecture._dynamo_marked_constant = True


def _unfit(backend: Backend, device: torch.device, dtype: torch.dtype) -> str:
    if backend.device not in (None, device.type):
        return f"its kernels run on {backend.device} tensors and these are on {device.type}"
    if dtype not in backend.dtypes:
        return f"it does not compute in {dtype}"
    return backend.missing()


def _say_once(message: str) -> None:
    if message not in _said and not torch.compiler.is_compiling():
        _said.add(message)
        warnings.warn(
            f"moelora_ops runs the slower plain PyTorch path: {message}",
            stacklevel=_callers_level(),
        )


def _callers_level() -> int:
    """The stacklevel at which a warning of our caller points to code outside the package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] == "moelora_ops":
        level, frame = level + 1, frame.f_back
    return level


def available() -> Iterator[tuple[str, str]]:
    """(name, why it cannot run here or "") for every back end."""
    for backend in BACKENDS:
        yield backend.name, backend.missing() or _missing_device(backend.device)


def _missing_device(device: str | None) -> str:
    there = device in (None, "cpu") or torch.get_device_module(device).is_available()
    return "" if there else f"there is no {device} device"
