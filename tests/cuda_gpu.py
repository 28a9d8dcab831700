"""A GPU for the tests of the CUDA back end, whose kernels run on CPU tensors there."""

import contextlib
import functools
import shutil

import devices
import pytest

from tools.gpu_emulator import cuda_runtime

WHY_MISSING = "" if shutil.which("nvcc") else "nvcc is not installed"
needs_nvcc = pytest.mark.skipif(bool(WHY_MISSING), reason=WHY_MISSING)


def make_gpu(request):
    """Makes a GPU, emulated unless pytest was told ``--gpu``; see ``devices.on_cpu_tensors``.

    This machine's own has the architecture and the multiprocessors that it has, and no records.
    """
    if devices.real:
        devices.skip_unless_it_runs("cuda")
        return this_gpu
    return functools.partial(emulated_gpu, request.getfixturevalue("cuda_library"))


def emulated_gpu(library, arch="80", multiprocessors=132, **options):
    return cuda_runtime.emulated_cuda(library, arch, multiprocessors=multiprocessors, **options)


@contextlib.contextmanager
def this_gpu(arch="80", multiprocessors=132, **options):
    if options:
        pytest.skip(f"a real device has its own {', '.join(options)}")
    with devices.carried("cuda"):
        yield ThisGpu()


class ThisGpu:
    @property
    def launches(self):
        pytest.skip("the emulator alone records launches")


def names(device):
    """What was launched."""
    return [launch.name.removesuffix("_kernel") for launch in device.launches]
