"""The package's GPU back ends on CPU tensors, for as long as an emulator runs their kernels."""

import contextlib
from collections.abc import Iterator
from unittest import mock

from moelora_ops import backends, use_backend


@contextlib.contextmanager
def on_cpu_tensors(backend: str) -> Iterator[None]:
    """Forces `backend`, which takes CPU tensors meanwhile and counts as built."""
    row = backends._BY_NAME[backend]._replace(device="cpu", missing=lambda: "")
    table = tuple(row if other.name == backend else other for other in backends.BACKENDS)
    by_name = {row.name: row for row in table}
    with (
        mock.patch.object(backends, "BACKENDS", table),
        mock.patch.object(backends, "_BY_NAME", by_name),
        use_backend(backend),
    ):
        yield
