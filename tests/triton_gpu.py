"""A GPU for the tests of the Triton back end, whose kernels run on CPU tensors there."""

import contextlib
from types import SimpleNamespace

import devices
import pytest

from moelora_ops.backends import triton

WHY_MISSING = triton.why_missing()
needs_triton = pytest.mark.skipif(bool(WHY_MISSING), reason=WHY_MISSING)

if not WHY_MISSING:
    from triton import JITFunction

    from moelora_ops.backends.triton import launch, tiles
    from tools.gpu_emulator import emulated_gpu


@contextlib.contextmanager
def gpu(arch=90, multiprocessors=None, execute=True, real=None, seed=None):
    """An NVIDIA GPU, which the Triton back end runs on: emulated, or this machine's own.

    Args:
        arch: compute capability of an emulated one, 80 or 90.
        multiprocessors: few of them, if tiles are to be chosen as for many tokens.
        execute: run the kernels; else an emulated one compiles and records them.
        real: this machine's own; by default if pytest was told ``--gpu``.
        seed: an emulated one runs blocks and warps in an order drawn from it.

    Yields:
        what has ``launches``: the emulator's driver, or names and grids alone.
    """
    real = devices.real if real is None else real
    made = _this_gpu() if real else emulated_gpu("cuda", arch, execute, seed=seed)
    with devices.on_cpu_tensors("triton"), made as device, pytest.MonkeyPatch.context() as patch:
        if multiprocessors:
            patch.setattr(launch, "arch", lambda: tiles.Arch("cuda", f"sm_{arch}", multiprocessors))
        yield device


@contextlib.contextmanager
def _this_gpu():
    launches, run = [], JITFunction.run

    def recording_run(self, *arguments, grid, **options):
        launches.append(SimpleNamespace(name=self.__name__, grid=(*grid, 1, 1)[:3]))
        return run(self, *arguments, grid=grid, **options)

    with devices.carried("triton"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", recording_run)
        yield SimpleNamespace(launches=launches)


def names(device):
    """What was launched."""
    return [launched.name for launched in device.launches]
