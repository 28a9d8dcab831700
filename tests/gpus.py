"""The GPU back ends under one name, for tests of what is the same for all."""

import contextlib

import cuda_gpu
import devices
import pytest
import torch
import triton_gpu
from cuda_gpu import names  # noqa: F401 - what was launched
from torch.utils._python_dispatch import TorchDispatchMode

from moelora_ops import ops

WHY_MISSING = {"cuda": cuda_gpu.WHY_MISSING, "triton": triton_gpu.WHY_MISSING}


def make_gpu(backend: str, request):
    """Makes a GPU that `backend` runs on, which takes CPU tensors meanwhile.

    Returns:
        A function of arch, the compute capability of an emulated one (80 or 90), of its number of
        multiprocessors: few of them, if tiles are to be chosen as for many tokens; and of seed,
        from which the order is drawn in which it runs blocks and warps.
    """
    if WHY_MISSING[backend]:
        pytest.skip(WHY_MISSING[backend])
    if backend == "triton":
        return triton_gpu.gpu
    make = cuda_gpu.make_gpu(request)

    @contextlib.contextmanager
    def gpu(arch=90, multiprocessors=None, **options):
        emulated = make("90a" if arch == 90 else str(arch), multiprocessors or 132, **options)
        with devices.on_cpu_tensors("cuda"), emulated as device:
            yield device

    return gpu


# The emulator cannot know the memory of calls that come from a compiled graph.
_OPCHECKS = {
    "cuda": ("test_schema", "test_autograd_registration", "test_faketensor"),
    "triton": "ALL",
}


class _KnownMemory(TorchDispatchMode):
    """Tells the emulator of the memory that an operator is called with by someone else."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == ops.NAMESPACES["cuda"]:
            self.device.take(args)
        return func(*args, **(kwargs or {}))


def opcheck(device, backend: str, operator: str, arguments: tuple) -> None:
    """``torch.library.opcheck`` of an operator by its name; `device` is what :func:`make_gpu` made.

    Triton's launchers name the memory themselves, and a real device needs no names.
    """
    known = _KnownMemory(device) if hasattr(device, "take") else contextlib.nullcontext()
    packet = getattr(getattr(torch.ops, ops.NAMESPACES[backend]), operator)
    with known:
        torch.library.opcheck(packet.default, arguments, test_utils=_OPCHECKS[backend])
