"""The GPU back ends under one name, for tests of what is the same for all."""

import contextlib

import cuda_gpu
import devices
import pytest
import triton_gpu
from cuda_gpu import names  # noqa: F401 - what was launched

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
