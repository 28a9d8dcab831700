"""How the tests reach a GPU (devices.py, triton_gpu.py), as far as that shows without one."""

import contextlib

import devices
import pytest
import torch
import triton_gpu
from cases import Shape, make_inputs, run

from moelora_ops import functional, ops, use_backend
from moelora_ops.backends import extension


@pytest.mark.skipif(bool(extension.why_missing()), reason=extension.why_missing())
@pytest.mark.parametrize("backend", ("cuda", "triton"))
def test_carried_operators_run_elsewhere(backend):
    """On the C++ kernels, as if the CPU were a device: forward and backward to the bit."""
    # In float32 both back ends take the same way around their operators, by the library's products.
    inputs = make_inputs(Shape(70, 33, 47, 4, 3, 2), torch.float32)
    with use_backend("cpu"), extension.use_linear("library"):
        want = run(functional.mola, inputs, 2, strategy="grouped")
    with devices.on_cpu_tensors(backend), devices.carried(backend, "cpu", ops.of("cpu")):
        got = run(functional.mola, inputs, 2, strategy="grouped")
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_arguments_travel_with_all_of_their_memory():
    """Strides, offsets and sharing stay; what is written comes back, between rows as well."""
    memory = torch.arange(24.0).view(4, 6)
    x, y = memory[:, 1:3], memory[1:, 4:]
    seen = {}

    def operator(there_x, there_y, nothing, number):
        seen.update(x=there_x.clone(), stride=there_y.stride(), rest=(nothing, number))
        assert there_x.data_ptr() != x.data_ptr()
        there_y.fill_(-1.0)
        torch.as_strided(there_y, (1,), (1,), 0).fill_(-2.0)  # a bug: nobody's memory
        return there_x.sum(), there_x + there_y[0]

    want = x.clone()
    results = devices._carry(operator, "cpu", x, y, None, 2)
    assert torch.equal(seen["x"], want) and seen["stride"] == (6, 1) and seen["rest"] == (None, 2)
    assert (y == -1).all() and memory[0, 0] == -2
    assert torch.equal(memory[:, 1:3], want)
    assert results[0] == want.sum() and torch.equal(results[1], want - 1)


@triton_gpu.needs_triton
def test_what_a_real_gpu_launches_is_recorded(monkeypatch):
    """Names and grids, as the emulator's driver records them of the same launches."""
    monkeypatch.setattr(devices, "carried", lambda backend: contextlib.nullcontext())
    x, rows = torch.ones(70, 200), torch.ones(8, 200)
    emulated = triton_gpu.emulated_gpu("cuda", 90)
    with emulated as driver, triton_gpu.gpu(real=True) as device:
        ops.of("triton").shrink(x, rows)
    wanted = [(launch.name, launch.grid) for launch in driver.launches]
    assert [(launch.name, launch.grid) for launch in device.launches] == wanted != []


def test_a_back_end_that_is_not_there_is_skipped(monkeypatch):
    monkeypatch.setattr(devices.backends, "available", lambda: [("cuda", "no nvcc")])
    with pytest.raises(pytest.skip.Exception, match="cuda: no nvcc"):
        devices.skip_unless_it_runs("cuda")
