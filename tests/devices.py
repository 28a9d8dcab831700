"""Where GPU kernels run in the tests: on the emulator, or with ``pytest --gpu`` on a CUDA device.

Tests that know the emulator hand CPU tensors to the operators of a GPU back end.  With ``--gpu``
each call is carried to the device: the same tests, and the same bits go in.  Tests that need CUDA
tensors, streams or graphs are marked ``gpu``, and run with ``--gpu`` alone.
"""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moelora_ops import backends, ops
from tools.gpu_emulator.on_cpu import on_cpu_tensors  # noqa: F401 - for the tests

real = False  # set by conftest.py: pytest --gpu


def skip_unless_it_runs(backend: str) -> None:
    """Skip this test where `backend` does not run, say because it was not built."""
    if why := dict(backends.available())[backend]:
        pytest.skip(f"{backend}: {why}")


@contextlib.contextmanager
def carried(
    backend: str, device: str = "cuda", operators: ops.Operators | None = None
) -> Iterator[None]:
    """The operators of `backend`, called on CPU tensors, run on copies of them on `device`.

    Args:
        backend: whose operators are called.
        device: where they run.
        operators: what runs there, by default the operators themselves.
    """
    with _Carrier(vars(operators or ops.of(backend)), ops.NAMESPACES[backend], device):
        yield


class _Carrier(TorchDispatchMode):
    """Takes the calls of a namespace.

    Registering other kernels would not end with the test: PyTorch keeps a Python kernel that was
    overridden for whoever calls it under a mode.
    """

    def __init__(self, operators: dict[str, Callable], namespace: str, device: str):
        super().__init__()
        self.operators, self.namespace, self.device = operators, namespace, device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != self.namespace:
            return func(*args, **(kwargs or {}))
        assert not kwargs  # our operators are called with positions alone
        return _carry(self.operators[func._schema.name.split("::")[1]], self.device, *args)


def _carry(operator: Callable, device: str, *arguments):
    """Call `operator` on copies on `device`, and copy back what it returns and changes.

    Storages travel whole and once: strides, the memory between rows and what arguments share stay
    as they are.
    """
    copies: dict[int, tuple[Tensor, Tensor]] = {}

    def there(t):
        if not isinstance(t, Tensor):
            return t
        here = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())
        _, copy = copies.setdefault(here.data_ptr(), (here, here.to(device, copy=True)))
        return torch.empty(0, dtype=t.dtype, device=device).set_(
            copy.untyped_storage(), t.storage_offset(), t.shape, t.stride()
        )

    results = operator(*map(there, arguments))
    for here, copy in copies.values():
        here.copy_(copy)
    if results is None:
        return None
    if isinstance(results, Tensor):
        return results.cpu()
    return tuple(result.cpu() for result in results)
