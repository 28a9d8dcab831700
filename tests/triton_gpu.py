"""An emulated GPU for the tests of the Triton back end, whose kernels run on CPU tensors there."""

import contextlib

import pytest

from moelora_ops import backends, use_backend
from moelora_ops.backends import triton

WHY_MISSING = triton.why_missing()
needs_triton = pytest.mark.skipif(bool(WHY_MISSING), reason=WHY_MISSING)

if not WHY_MISSING:
    from moelora_ops.backends.triton import launch, tiles
    from tools.gpu_emulator import emulated_gpu


@contextlib.contextmanager
def gpu(arch=90, multiprocessors=None, execute=True):
    """An emulated NVIDIA GPU, which the Triton back end runs on.

    Args:
        arch: compute capability, 80 or 90.
        multiprocessors: few of them, if tiles are to be chosen as for many tokens.
        execute: run the kernels; else they are compiled and recorded.

    Yields:
        the emulator's driver: ``launches``, ``builds``.
    """
    table = tuple(
        row._replace(device="cpu") if row.name == "triton" else row for row in backends.BACKENDS
    )
    with (
        pytest.MonkeyPatch.context() as patch,
        emulated_gpu("cuda", arch, execute=execute) as device,
    ):
        patch.setattr(backends, "BACKENDS", table)
        patch.setattr(backends, "_BY_NAME", {row.name: row for row in table})
        if multiprocessors:
            patch.setattr(launch, "arch", lambda: tiles.Arch("cuda", f"sm_{arch}", multiprocessors))
        with use_backend("triton"):
            yield device


def names(device):
    """What was launched."""
    return [launched.name for launched in device.launches]
