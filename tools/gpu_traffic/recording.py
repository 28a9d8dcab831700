"""A call on an emulated GPU: which launches its operators make, and what they cannot do without."""

import contextlib
import math
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moelora_ops import ops
from moelora_ops.backends.triton import launch, tiles
from tools.gpu_emulator import cuda_runtime, emulated_gpu
from tools.gpu_emulator.on_cpu import on_cpu_tensors

from .cases import Call

# Elements of a tensor that is as long as x or y; nothing touches it unless kernels are executed.
LARGE = 2**22
# Operations of PyTorch that launch nothing; views beside them say so themselves.
_ALLOCATIONS = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})
_BASE_GEMM = torch.ops.aten.addmm_.default
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


@dataclass
class Operator:
    """One call of an operator of ours.

    Attributes:
        name: of the schema.
        launches: records of the emulator.
        torch_kernels: operations of PyTorch inside it that are launches too.
        least: bytes; see :func:`least_bytes`.
        tensors: what it took and made, kept for accounts that depend on what is in it.
    """

    name: str
    launches: list
    torch_kernels: list[str]
    least: int
    tensors: tuple


@dataclass
class Recording:
    """What a call ran.

    Attributes:
        operators: in order; those of the backward pass among them.
        around: operations of PyTorch outside of them, but for the base GEMM.
    """

    operators: list[Operator] = field(default_factory=list)
    around: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> Operator:
        (found,) = (o for o in self.operators if o.name == name)
        return found


def least_bytes(func: torch._ops.OpOverload, arguments: tuple, results) -> int:
    """Each tensor that an operator takes once, and each that it makes once.

    But dy once for dx and once more for the gradient of lora_up.
    """
    named = dict(zip((a.name for a in func._schema.arguments), arguments, strict=True))
    times = {
        "y": 1 + named.get("accumulate", False),
        "dx": named.get("need_dx", True) * (1 + named.get("accumulate", False)),
        "dy": 1 + named.get("need_dparams", False),
    }
    if func._schema.name.endswith("_backward"):
        times["x"] = named.get("need_dparams", False)
    tensors = [t for t in (results if isinstance(results, tuple) else (results,)) if t is not None]
    return sum(t.nbytes for t in tensors) + sum(
        times.get(name, 1) * t.nbytes for name, t in named.items() if isinstance(t, Tensor)
    )


class _Recorder(TorchDispatchMode):
    """Sees every operation of a call; the base GEMM is not ours and is skipped."""

    def __init__(self, launches: list, execute: bool):
        super().__init__()
        self.recording = Recording()
        self.launches, self.execute = launches, execute
        self.torch_kernels = self.recording.around

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ops.NAMESPACES.values():
            return self._operator(func, args)
        if func is _BASE_GEMM and not self.execute:
            return args[0]
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name in _ALLOCATIONS:
            # Tiles that are executed later shall read numbers.
            return result if result.numel() > LARGE else result.zero_()
        if func is not _BASE_GEMM and not func.is_view:
            self.torch_kernels.append(name)
        return result

    def _operator(self, func, args):
        first, self.torch_kernels = len(self.launches), []
        # Past this mode, which then sees what the operator itself calls.
        with self:
            results = func.redispatch(_CPU, *args)
        self.recording.operators.append(
            Operator(
                func._schema.name.split("::")[1],
                self.launches[first:],
                self.torch_kernels,
                least_bytes(func, args, results),
                (args, results),
            )
        )
        self.torch_kernels = self.recording.around
        return results


def record_triton(
    call: Call,
    backend: str = "cuda",
    arch: int | str = 90,
    execute: bool = False,
    multiprocessors: int | None = None,
) -> Recording:
    """Run `call` with the Triton kernels.

    Args:
        backend, arch: of :func:`emulated_gpu`.
        execute: also run the kernels, on random numbers; else nothing is computed.
        multiprocessors: fewer make tiles be chosen as for many tokens.
    """
    with contextlib.ExitStack() as stack:
        gpu = stack.enter_context(emulated_gpu(backend, arch, execute))
        if multiprocessors:
            device = tiles.Arch(backend, f"sm_{arch}", multiprocessors)
            stack.enter_context(mock.patch.object(launch, "arch", lambda: device))
        return _record(call, "triton", gpu.launches, execute)


def record_cuda(
    library: cuda_runtime.Library,
    call: Call,
    arch: int = 90,
    execute: bool = False,
    multiprocessors: int = 132,
) -> Recording:
    """Run `call` with the CUDA kernels, as their own host code launches them.

    Args:
        library: of :func:`cuda_runtime.cached`.
        arch, execute, multiprocessors: as above.
    """
    name = {80: "80", 90: "90a"}[arch]
    with cuda_runtime.emulated_cuda(
        library, name, execute=execute, multiprocessors=multiprocessors
    ) as gpu:
        return _record(call, "cuda", gpu.launches, execute)


def _record(call: Call, backend: str, launches: list, execute: bool) -> Recording:
    """`call` on `backend`, whose launches are appended to a list."""
    tensors = call.inputs(_normal if execute else _placeholder)
    with on_cpu_tensors(backend), _Recorder(launches, execute) as recorder:
        call.run(tensors)
    return recorder.recording


def _placeholder(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros, or what takes no memory."""
    make = torch.empty if math.prod(shape) > LARGE else torch.zeros
    return make(shape, dtype=dtype)


def _normal(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=dtype)
