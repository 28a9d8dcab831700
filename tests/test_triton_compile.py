"""Every Triton kernel as the launchers launch it, compiled for four GPUs: what the compiler made.

A longer list of shapes is behind ``python -m tools.gpu_traffic --compile``.
"""

import pytest
import torch
from triton_gpu import WHY_MISSING

if WHY_MISSING:
    pytest.skip(WHY_MISSING, allow_module_level=True)

import triton
import triton.language as tl

from moelora_ops import ops
from tools.gpu_emulator import emulated_gpu
from tools.gpu_emulator.on_cpu import on_cpu_tensors
from tools.gpu_traffic import gates
from tools.gpu_traffic.cases import usual

BRAIN, HALF, FLOAT = torch.bfloat16, torch.float16, torch.float32
LARGE = 8192
A100, H200, B200, MI300 = gates.ARCHS
USUAL = usual("topk", LARGE)
GROUPED = usual("topk", LARGE, E=64, r=16, k=4, strategy="grouped")
CASES = [
    *((USUAL, gpu) for gpu in gates.ARCHS),
    *((GROUPED, gpu) for gpu in (A100, H200)),
    *((GROUPED._replace(train="x"), gpu) for gpu in (B200, MI300)),
    *((usual(method, LARGE), H200) for method in ("gated", "averaged", "grid", "output_gate")),
    (usual("topk", LARGE, dtype=HALF), H200),
    (usual("topk", LARGE, dtype=FLOAT), H200),
    (usual("topk", 32768, train="x"), B200),  # shrinks that end with the mix
    (usual("topk", LARGE, E=128, r=1, k=4), H200),
    (usual("topk", LARGE, E=8, r=64, strategy="stacked"), A100),
    (usual("gated", LARGE, E=1, r=64), MI300),  # plain LoRA
    (usual("output_gate", LARGE), B200),
    (usual("topk", 1, train=""), H200),
    (usual("topk", 32, train=""), B200),
    (usual("gated", 32, train=""), MI300),
    (usual("averaged", 32, train=""), H200),
    (usual("grid", 32, train=""), H200),
    (usual("output_gate", 32, train=""), A100),
]  # fmt: skip


def case_name(value):
    if isinstance(value, tuple) and value in gates.ARCHS:
        return str(value[1])
    s = value.size
    strategy = "" if value.strategy == "auto" else f"-{value.strategy}"
    dtype = str(value.dtype).removeprefix("torch.")
    return f"{value.method}{strategy}-T{s.T}-E{s.E}-r{s.r}-{dtype}"


@pytest.mark.parametrize("call, gpu", CASES, ids=case_name)
def test_kernels(call, gpu):
    kernels = gates.builds(call, *gpu)
    assert len(kernels) >= 2
    # What most users run hides one block's mix and stores behind another's loads.
    blocks = 2 if (call, gpu) == (USUAL, H200) else 1
    missed = {f"{b.module}.{b.name}": gates.problems(b, blocks=blocks) for b in kernels}
    assert not any(missed.values()), missed
    # The gates themselves look at something: each direction has its products.
    assert sum(gates.has_products(build) for build in kernels) >= 2


@pytest.mark.parametrize("gpu", gates.ARCHS, ids=str)
def test_kernels_of_the_cosines(gpu):
    f, hidden, per_expert = torch.zeros(32, 4096, dtype=BRAIN), torch.zeros(32, 384), (32, 6)
    matrices, scales = torch.zeros(6, 64, 64), torch.zeros(6)
    operators, saved = ops.of("triton"), [torch.zeros(per_expert) for _ in range(2)]
    with on_cpu_tensors("triton"), emulated_gpu(*gpu) as driver:
        *_, f_norm = operators.cosines(f, hidden, hidden, matrices, scales)
        operators.cosines_backward(
            saved[0], f, f, hidden, hidden, matrices, scales, *saved, f_norm, f.clone(),
            hidden.clone(),
        )  # fmt: skip
    missed = {launch.name: gates.problems(launch.build) for launch in driver.launches}
    assert len(missed) == 2 and not any(missed.values()), missed


# Kernels that no gate may let pass.


@triton.jit
def spills(x, y, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    v = tl.load(x + at)
    tl.store(y + at, v / tl.sum(tl.sum(v, 0), 0))


@triton.jit
def narrow(x, y, stride, N: tl.constexpr):
    at = tl.arange(0, N)
    a = tl.load(x + at[:, None] * stride + at[None, :])
    tl.store(y + at[:, None] * stride + at[None, :], tl.dot(a, a).to(tl.bfloat16))


@triton.jit
def gathers(order, x, y, stride, N: tl.constexpr):
    at = tl.arange(0, N)
    a = tl.load(x + tl.load(order + at)[:, None] * stride + at[None, :])
    tl.store(y + at[:, None] * N + at[None, :], tl.dot(a, a).to(tl.bfloat16))


def build_of(kernel, *arguments, arch=90, **constants):
    with emulated_gpu("cuda", arch) as gpu:
        kernel[(1,)](*arguments, **constants, enable_fp_fusion=False)
    return gpu.builds[0]


def test_a_spill_is_found():
    x = torch.zeros(128 * 128)
    (found,) = gates.problems(build_of(spills, x, x, N=128, num_warps=1))
    assert found.startswith("spills: ") and "spills: 0 bytes" not in found


def test_narrow_access_is_found():
    x = torch.zeros(64 * 67, dtype=BRAIN)
    wide = torch.zeros(64 * 64, dtype=BRAIN)
    assert gates.problems(build_of(narrow, wide, wide, 64, N=64)) == []
    odd = build_of(narrow, x, x, 67, N=64)
    assert gates.problems(odd, aligned=False) == []
    assert gates.problems(odd) == [
        "0% of the bytes of loads are in accesses of 16",
        "0% of the bytes of stores are in accesses of 16",
    ]


def test_narrow_access_is_found_beside_indices():
    x, order = torch.zeros(64 * 67, dtype=BRAIN), torch.zeros(64, dtype=torch.int32)
    assert gates.problems(build_of(gathers, order, x, x, 64, N=64)) == []
    (found,) = gates.problems(build_of(gathers, order, x, x, 67, N=64))
    assert found == "0% of the bytes of loads are in accesses of 16"


def test_a_product_without_tensor_cores_is_found(monkeypatch):
    wide = torch.zeros(64 * 64, dtype=BRAIN)
    build = build_of(narrow, wide, wide, 64, N=64)
    assert gates.has_products(build)
    monkeypatch.setitem(gates._TENSOR_CORES, 90, "tcgen05")
    assert gates.problems(build) == ["a product without tensor cores"]


def test_too_much_shared_memory_is_found(monkeypatch):
    wide = torch.zeros(64 * 64, dtype=BRAIN)
    build = build_of(narrow, wide, wide, 64, N=64)
    monkeypatch.setitem(gates.SHARED, 90, build.shared - 1)
    (found,) = gates.problems(build)
    assert found.startswith(f"{build.shared} bytes of shared memory")
