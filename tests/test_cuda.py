"""The CUDA back end: what nvcc made of its kernels, run by the emulator on CPU tensors.

Every launch goes through the package's own bindings and host launchers, and everything that they
allocate is filled with NaN first.
"""

import re
import subprocess
import sys
from pathlib import Path

import cases
import devices
import pytest
import torch
from cases import Shape, make_inputs, run
from cuda_gpu import make_gpu, names, needs_nvcc

from moelora_ops import functional, ops, use_backend
from moelora_ops.backends import extension
from moelora_ops.reference import keep_mask
from tools.gpu_emulator import cuda_runtime

try:
    import triton
except ImportError:
    triton = None

pytestmark = needs_nvcc

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
SEED = torch.tensor([0x1234567890ABCDE])
cuda_ops = ops.of("cuda")


@pytest.fixture
def gpu(request):
    """Makes a GPU; the cuda back end takes CPU tensors meanwhile."""
    with devices.on_cpu_tensors("cuda"):
        yield make_gpu(request)


def normal(*shape, dtype=F32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---------------------------------------------------------------- topk

TOKEN = {"dropout": 0.3, "dropout_mode": "token", "seed": SEED}
EXPERT = {"dropout": 0.3, "dropout_mode": "expert", "seed": SEED}
SWITCH = {"renormalize": False}
BALANCE = {"balance": True}
FEW, MANY = 1, 132  # multiprocessors: with few, a block owns all features, and the mix if it can


@pytest.mark.parametrize(
    ("shape", "arch", "dtype", "multiprocessors", "options"),
    [
        (Shape(0, 32, 48, 4, 2, 2), "80", BF16, MANY, BALANCE),
        (Shape(1, 64, 128, 8, 8, 2), "90a", BF16, MANY, {}),
        (Shape(1, 64, 128, 8, 8, 2), "80", F64, FEW, BALANCE),
        (Shape(3, 1, 1, 2, 1, 1), "80", F32, FEW, {}),
        (Shape(3, 1, 1, 2, 1, 1), "80", F16, MANY, TOKEN),
        (Shape(5, 33, 47, 4, 3, 2), "80", F16, FEW, SWITCH),
        (Shape(5, 33, 47, 4, 3, 2), "80", F64, MANY, EXPERT | SWITCH | BALANCE),
        (Shape(15, 257, 129, 8, 4, 2), "90a", F32, FEW, TOKEN),
        (Shape(16, 257, 129, 8, 4, 2), "80", BF16, MANY, BALANCE),
        (Shape(17, 128, 64, 1, 8, 1), "80", F32, MANY, EXPERT | BALANCE),
        (Shape(77, 256, 512, 32, 1, 4), "80", BF16, FEW, BALANCE),
        (Shape(77, 256, 512, 32, 1, 4), "90a", BF16, MANY, EXPERT),
        (Shape(130, 200, 136, 8, 8, 2), "90a", BF16, FEW, {}),
        (Shape(130, 200, 136, 8, 8, 2), "80", F16, MANY, TOKEN | SWITCH | BALANCE),
        (Shape(40, 128, 130, 3, 4, 3), "80", F64, FEW, TOKEN),
        (Shape(33, 130, 258, 2, 64, 2), "80", BF16, MANY, TOKEN),
        (Shape(64, 96, 100, 5, 16, 4), "80", F32, MANY, SWITCH),
        (Shape(300, 70, 65, 8, 9, 1), "80", BF16, FEW, {}),
        (Shape(9, 40, 24, 128, 2, 3), "90a", BF16, MANY, BALANCE),
        (Shape(21, 48, 56, 6, 12, 6), "80", F16, FEW, BALANCE),
        (Shape(513, 17, 19, 4, 2, 2), "80", F32, FEW, {}),
    ],
    ids=str,
)
def test_topk_matches_reference(gpu, shape, arch, dtype, multiprocessors, options):
    draws = (6 if shape.T < 10 else 3) if shape.T < 64 else 1
    on = lambda: gpu(arch, multiprocessors)  # noqa: E731
    cases.assert_within_budget(shape, dtype, on, draws, **options)


# A shape that takes wide copies, two blocks of tokens and several of everything else.
STANDARD = Shape(70, 200, 136, 8, 8, 2)


@pytest.mark.skipif(bool(extension.why_missing()), reason=extension.why_missing())
@pytest.mark.parametrize("options", (BALANCE, TOKEN | SWITCH), ids=str)
def test_topk_agrees_with_the_cpu_kernels(gpu, options):
    """In float64, where both are right to the last bits, and in what they save."""
    inputs = make_inputs(Shape(70, 72, 72, 4, 4, 2), F64)  # two segments, as slow as it gets
    for strategy in ("stacked", "grouped"):
        with gpu():
            got = run(functional.mola, inputs, 2, strategy=strategy, **options)
        with use_backend("cpu"):
            want = run(functional.mola, inputs, 2, strategy=strategy, **options)
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12, msg=name)
    arguments = forward_arguments(F32)
    with gpu():
        saved, counts, _ = cuda_ops.topk_forward(*arguments)
    want_saved, want_counts, _ = ops.of("cpu").topk_forward(*arguments)
    choices = slice(-40, None)  # int32 bits
    assert torch.equal(counts, want_counts)
    assert torch.equal(saved.view(torch.int32)[choices], want_saved.view(torch.int32)[choices])
    torch.testing.assert_close(saved[:-40], want_saved[:-40])


def test_launches(gpu):
    """Beside the base GEMM: 3 or 2 forward, 3 to 5 backward."""
    inputs = make_inputs(STANDARD._replace(T=70), BF16)
    leaves = [t.requires_grad_() for t in (inputs.x, *inputs[3:6])]
    for multiprocessors, first, outer in (
        (MANY, ["shrink", "mix"], ["outer", "add_parts"]),
        (FEW, ["shrink"], ["outer"]),
    ):
        with gpu("80", multiprocessors) as device:
            y = functional.mola(leaves[0], inputs.weight, None, *leaves[1:], 2, 1.0)
            assert names(device) == [*first, "expand"]
            device.launches.clear()
            torch.autograd.grad(y, leaves, inputs.dy)
            assert names(device) == [*first, "expand", *outer]


def test_few_tokens_take_two_launches(gpu):
    """Beside the base GEMM, and with what they save: every block of the expand mixes by itself."""
    inputs = make_inputs(STANDARD._replace(T=32), BF16)
    with gpu() as device:
        functional.mola(
            inputs.x, inputs.weight, None, inputs.lora_down, inputs.lora_up, inputs.router, 2, 1.0
        )
        assert names(device) == ["shrink", "mix_and_expand"]


def test_frozen_experts_cost_no_weight_gradients(gpu):
    inputs = make_inputs(STANDARD, BF16)
    with gpu() as device:
        adapter(inputs, range(STANDARD.T))
    assert names(device) == ["shrink", "mix", "expand", "shrink", "mix", "expand"]


def adapter(inputs, rows, **options):
    """Output and dx of the adapter alone for some tokens."""
    x = inputs.x[rows].detach().requires_grad_()
    base = torch.zeros(len(rows), inputs.lora_up.shape[2], dtype=x.dtype)
    y = functional.mola(
        x, None, None, inputs.lora_down, inputs.lora_up, inputs.router, 2, 2.0, base_output=base,
        **options,
    )  # fmt: skip
    return y.detach(), *torch.autograd.grad(y, x, inputs.dy[rows])


@pytest.mark.parametrize(("arch", "dtype"), [("90a", BF16), ("80", F32)], ids=str)
def test_a_token_does_not_depend_on_its_neighbours(gpu, arch, dtype):
    """The same bits alone and among others, wherever the mix runs, however features are split."""
    inputs = make_inputs(Shape(140, 524, 260, 4, 4, 2), dtype)  # 5 segments of two steps and of one
    with gpu(arch, FEW) as device:
        whole = adapter(inputs, range(140))
    assert [launch.grid[2] for launch in device.launches if "shrink" in launch.name] == [1, 1]
    for multiprocessors in (FEW, MANY):
        with gpu(arch, multiprocessors) as device:
            for rows in ([7], [139, 3], list(range(50, 130))):
                for got, want in zip(adapter(inputs, rows), whole, strict=True):
                    assert torch.equal(got, want[rows])
    assert device.launches[0].grid[2] == 5


def test_prob_sums_of_many_tokens(gpu):
    cases.assert_prob_sums_within_budget(gpu, 4000, 0, strategy="stacked")


def test_few_tokens_with_dropout(gpu):
    """Two launches, and the bits of many tokens."""
    inputs = make_inputs(STANDARD, BF16)
    with gpu() as device:
        many = adapter(inputs, range(40), **EXPERT)
        assert names(device)[:3] == ["shrink", "mix", "expand"]
        device.launches.clear()
        few = adapter(inputs, range(20), **EXPERT)
        assert names(device)[:3] == ["shrink", "mix_and_expand", "shrink"]
    for got, want in zip(few, many, strict=True):
        assert torch.equal(got, want[:20])


@pytest.mark.parametrize("mode", ("token", "expert"))
@pytest.mark.parametrize("dtype", (F32, F16), ids=str)
def test_dropout_masks_are_those_of_the_reference(gpu, dtype, mode):
    """Bit for bit: with one-hot rows the output shows each feature's mask, as does dx."""
    features, p = 70, 0.4
    x = torch.ones(3, features, dtype=dtype, requires_grad=True)
    eye = torch.eye(features, dtype=dtype).expand(2, features, features).contiguous()
    router = torch.tensor([[1.0], [-1.0]], dtype=dtype).expand(2, features).contiguous()
    for value, expert in ((0, 0), (2**63 - 2, 1), (-1, 0)):
        seed = torch.tensor([value])
        with gpu():
            y = functional.mola(
                x, None, None, eye, eye, -router if expert else router, 1, 1.0, dropout=p,
                dropout_mode=mode, seed=seed, base_output=torch.zeros(3, features, dtype=dtype),
            )  # fmt: skip
            (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        want = keep_mask(seed, 3, features, p, expert=expert if mode == "expert" else 0)
        assert torch.equal(y != 0, want)
        assert torch.equal(dx != 0, want)


def routed(x, router):
    """y and the routing of experts in rank space."""
    E, K = router.shape
    return functional.mola(
        x, None, None, normal(E, 8, K, dtype=x.dtype, seed=1),
        normal(E, 8, 136, dtype=x.dtype, seed=2), router, 2, 1.0,
        base_output=torch.zeros(x.shape[0], 136, dtype=x.dtype), return_routing=True,
    )  # fmt: skip


@pytest.mark.parametrize(("arch", "dtype"), [("80", F32), ("90a", BF16)], ids=str)
def test_a_token_that_is_not_finite_spoils_no_other(gpu, arch, dtype):
    """It selects experts that exist, its row is NaN, and all other rows keep their bits."""
    x, router = normal(70, 200, dtype=dtype), normal(8, 200, dtype=dtype)
    router[:, 5] = -1
    spoiled = x.clone()
    spoiled[3] = float("nan")
    spoiled[4, 0] = float("inf")  # logits of +inf and -inf
    spoiled[66, 5] = float("inf")  # all -inf
    others = [t for t in range(70) if t not in (3, 4, 66)]
    for multiprocessors in (FEW, MANY):
        with gpu(arch, multiprocessors):
            y, routing = routed(spoiled, router)
            want, _ = routed(x, router)
        assert torch.equal(y[others], want[others])
        assert y[[3, 4, 66]].isnan().all()
        assert routing.counts.sum() == 140 and routing.counts.min() >= 0


def test_ties_go_to_the_lower_index(gpu):
    with gpu():
        _, routing = routed(torch.zeros(4, 200), normal(8, 200))
    assert routing.counts.tolist() == [4, 4, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("distance", (41, 48))
def test_strided_rows(gpu, distance):
    """Rows that are apart, with wide copies and without; what lies between y's is left alone."""
    inputs = make_inputs(Shape(9, 40, 40, 4, 3, 2), BF16)
    memory = torch.full((9, distance), float("nan"), dtype=BF16)
    memory[:, :40] = inputs.x
    y_memory = torch.full((9, distance), 7.0, dtype=BF16)
    arguments = [
        memory[:, :40], inputs.lora_down, inputs.lora_up, inputs.router, inputs.bias, None,
        y_memory[:, :40], 2, 0.5, True, 0.0, False, True, False,
    ]  # fmt: skip
    with gpu():
        cuda_ops.topk_forward(*arguments)
        arguments[0], arguments[6] = inputs.x, torch.empty_like(inputs.x)
        cuda_ops.topk_forward(*arguments)
    assert torch.equal(y_memory[:, :40], arguments[6])
    assert (y_memory[:, 40:] == 7).all()


def test_large_offsets(gpu):
    """Rows beyond 2**31 elements: strides are 64-bit."""
    x = torch.empty(2**31 + 16, dtype=BF16).as_strided((2, 16), (2**31, 1))
    i = make_inputs(Shape(2, 16, 24, 4, 2, 2), BF16)
    x.copy_(i.x)
    with gpu():
        got = functional.mola(x, i.weight, None, i.lora_down, i.lora_up, i.router, 2, 1.0)
        want = functional.mola(i.x, i.weight, None, i.lora_down, i.lora_up, i.router, 2, 1.0)
    assert torch.equal(got, want)


@pytest.mark.parametrize("strategy", ("stacked", "grouped"))
def test_gradcheck(gpu, strategy):
    """Finite differences in float64 through the real kernels."""
    i = make_inputs(Shape(3, 5, 4, 3, 2, 2), F64)
    leaves = [t.requires_grad_() for t in (i.x, i.lora_down, i.lora_up, i.router)]

    def function(x, *parameters):
        y, routing = functional.mola(
            x, i.weight, i.bias, *parameters, 2, 0.7, renormalize=False, return_routing=True,
            strategy=strategy, **EXPERT,
        )  # fmt: skip
        return y, routing.prob_sums

    with gpu():
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


# ---------------------------------------------------------------- what was compiled

needs_disassembler = pytest.mark.skipif(
    triton is None, reason="triton, which brings a disassembler, is not installed"
)
# Architectures, and the PTX that is compiled for them where the extension has no code: of its own
# sm_100a has nothing in csrc, and it is enough to see the sources that have all products in them.
MADE_FROM = {"80": "80", "90a": "90a", "100a": "80"}
ALL_PRODUCTS = ("shrink", "expand", "outer", "topk", "grouped")


def cuobjdump(*arguments, **options):
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run(
        [tool, *arguments], check=True, capture_output=True, text=True, **options
    ).stdout


def assembled(ptx, arch):
    """ptxas' report and the binary."""
    target = ptx.with_name(f"{ptx.stem}.sm_{arch}.cubin")
    report = target.with_suffix(".txt")
    if not report.exists():
        done = subprocess.run(
            ["nvcc", f"-arch=sm_{arch}", "-cubin", "-Xptxas=-v", ptx, "-o", target],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        report.write_text(done.stderr)
    return report.read_text(), target


@pytest.fixture(scope="session")
def binaries(cuda_library, tmp_path_factory):
    """arch -> the machine code of every source: what ships, if the extension was built for all of
    these and from the sources as they are; else it is made from the PTX that the tests execute.
    """
    newest = max(path.stat().st_mtime for path in cuda_runtime.sources())
    module = None if extension.why_cuda_missing() else sys.modules["moelora_ops._C"].__file__
    if module and Path(module).stat().st_mtime > newest:
        folder = tmp_path_factory.mktemp("binaries")
        cuobjdump("-xelf", "all", module, cwd=folder)
        shipped = {arch: sorted(folder.glob(f"*.sm_{arch}.cubin")) for arch in MADE_FROM}
        if all(shipped.values()):
            return shipped
    made = {}
    with cuda_runtime.compilers() as pool:
        for arch, from_arch in MADE_FROM.items():
            sources = [
                path
                for path in cuda_library.ptx(from_arch)
                if arch != "100a" or path.name.split(".")[0] in ALL_PRODUCTS
            ]
            made[arch] = pool.map(lambda path, arch=arch: assembled(path, arch)[1], sources)
    return {arch: list(cubins) for arch, cubins in made.items()}


def same_in_every_build(symbol):
    """A mangled name without what nvcc makes anonymous namespaces unique by."""
    return re.sub(r"(_GLOBAL__N__)[0-9a-f]{8}(_\d+_\w+?_)[0-9a-f]{8}", r"\1\2", symbol)


@needs_disassembler
@pytest.mark.parametrize("arch", MADE_FROM)
def test_registers_hold_everything(cuda_library, binaries, arch):
    """Of as many blocks as a kernel's launch bounds promise; what is spilled goes to the stack,
    where merged factors alone have an array.
    """
    threads = {
        same_in_every_build(name): int(most) * int(blocks or 1)
        for ptx in cuda_library.ptx(MADE_FROM[arch])
        for name, most, blocks in re.findall(
            r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+), 1, 1(?:\s*\.minnctapersm (\d+))?",
            ptx.read_text(),
        )
    }
    seen = set()
    for cubin in binaries[arch]:
        kernels = re.findall(
            r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)",
            cuobjdump("--dump-resource-usage", cubin),
        )
        for symbol, registers, stack, local in kernels:
            array = {"merge": 88, "unmerge": 128}.get(kernel_name(symbol), 0)
            assert int(stack) <= array and local == "0", symbol
            given = -(-int(registers) // 8) * 8
            assert given * threads[same_in_every_build(symbol)] <= 65536, symbol
            seen.add(same_in_every_build(symbol))
    assert seen and (seen == threads.keys() or arch == "100a")


def symbols(cubin):
    return re.findall(r"Function (\w+):", cuobjdump("--dump-resource-usage", cubin))


def disassembled(cubin):
    """Symbol -> machine code; it takes seconds."""
    parts = cuobjdump("--dump-sass", cubin).split("Function : ")[1:]
    return {part.split()[0]: part for part in parts}


def kernel_name(symbol):
    return cuda_runtime.plain_name(symbol).removesuffix("_kernel")


@needs_disassembler
@pytest.mark.parametrize("arch", MADE_FROM)
def test_instructions_are_those_for_16_bit_types(binaries, arch):
    """Tensor cores, and 16 bytes at a time in both directions."""
    product = ("HMMA.16816.F32", "LDGSTS.E.BYPASS.128")
    wanted = {
        "shrink": (*product, "LDSM.16.M88.4"),
        "expand": (*product, "LDSM.16.MT88.4", "STG.E.128"),
        "mix_and_expand": (*product, "LDSM.16.MT88.4", "STG.E.128"),
        "outer": (*product, "LDSM.16.MT88.4"),
    }
    # Of segments too.
    wanted |= {f"{name}_segments": wanted[name] for name in ("shrink", "expand")}
    found = set()
    for cubin in binaries[arch]:
        chosen = {
            symbol: kernel_name(symbol)
            for symbol in symbols(cubin)
            if kernel_name(symbol) in wanted and re.search("__nv_bfloat16|__half", symbol)
        }
        # One architecture's instances for every mix say enough; of the others, each product's.
        if found.issuperset(chosen.values()) and arch != "90a":
            continue
        code = disassembled(cubin)
        for symbol, name in chosen.items():
            found.add(name)
            missing = [i for i in wanted[name] if i not in code[symbol]]
            assert not missing, (symbol, missing)
    assert found == set(wanted)


@needs_disassembler
def test_wgmma_is_there_for_its_device_alone(binaries):
    for arch, found in (("90a", True), ("80", False)):
        of_wgmma = {
            cubin: [symbol for symbol in symbols(cubin) if kernel_name(symbol) == "wgmma_shrink"]
            for cubin in binaries[arch]
        }
        ((cubin, kernels),) = ((c, symbols) for c, symbols in of_wgmma.items() if symbols)
        assert len(kernels) == 2  # types
        code = disassembled(cubin)
        for symbol, dtype in zip(sorted(kernels), ("BF16", ""), strict=True):
            wanted = (f"HGMMA.64x192x16.F32{dtype and '.' + dtype} ", "LDGSTS.E.BYPASS.128")
            assert all((instruction in code[symbol]) == found for instruction in wanted), symbol
            assert "HMMA" not in code[symbol]


def test_products_that_may_wait_for_each_other_do(cuda_library):
    """Else ptxas says that it has put wgmma in a row."""
    (shrink,) = (ptx for ptx in cuda_library.ptx("90a") if ptx.name.startswith("shrink."))
    report, _ = assembled(shrink, "90a")
    assert "wgmma_shrink_kernel" in report and "serialized" not in report


# ---------------------------------------------------------------- contracts


def forward_arguments(dtype=BF16):
    i = make_inputs(STANDARD._replace(T=20), dtype)
    y = torch.zeros(20, STANDARD.N, dtype=dtype)
    return (
        i.x, i.lora_down, i.lora_up, i.router, None, None, y, 2, 0.5, True, 0.0, False, True, True,
    )  # fmt: skip


def backward_arguments(dtype=BF16):
    arguments = forward_arguments(dtype)
    x, lora_down, lora_up, router = arguments[:4]
    saved, _, prob_sums = cuda_ops.topk_forward(*arguments)
    return (
        normal(20, STANDARD.N, dtype=dtype), x, lora_down, lora_up, router, None, saved,
        torch.ones_like(prob_sums), torch.zeros_like(x), 2, 0.5, True, 0.0, False, True, True,
        True, True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("position", "bad", "name"),
    [
        (0, normal(20, 199, dtype=BF16), "x"),
        (0, normal(20, 200), "lora_down"),
        (2, normal(8, 7, 136, dtype=BF16), "lora_up"),
        (3, normal(7, 200, dtype=BF16), "router"),
        (6, normal(19, 136, dtype=BF16), "y"),
        (7, 9, "top_k"),
        (7, 0, "top_k"),
    ],
)
def test_operators_called_directly_do_not_leave_their_memory(gpu, position, bad, name):
    arguments = list(forward_arguments())
    arguments[position] = bad
    with gpu() as device, pytest.raises(RuntimeError, match=name):
        cuda_ops.topk_forward(*arguments)
    assert not device.launches


@pytest.mark.parametrize(
    ("position", "shape", "name"),
    [(0, (20, 135), "dy"), (6, (7,), "saved"), (7, (7,), "dprob_sums"), (8, (19, 200), "dx")],
)
def test_backward_called_directly_does_not_leave_its_memory(gpu, position, shape, name):
    with gpu():
        arguments = list(backward_arguments())
        arguments[position] = torch.zeros(shape, dtype=arguments[position].dtype)
        with pytest.raises(RuntimeError, match=name):
            cuda_ops.topk_backward(*arguments)


def test_a_launch_that_fails_names_its_kernel(gpu):
    """Less shared memory than a block needs: the error of the runtime, not of the emulator."""
    with gpu(shared_bytes=50_000), pytest.raises(RuntimeError, match="shrink: invalid argument"):
        cuda_ops.topk_forward(*forward_arguments())


def test_experts_beyond_shared_memory_are_refused(gpu):
    x, rows = normal(1, 8), normal(2, 500, 8)
    with gpu(shared_bytes=4000), pytest.raises(RuntimeError, match="bytes of a token"):
        cuda_ops.topk_forward(
            x, rows, rows, normal(2, 8), None, None, x.clone(), 1, 1.0, True, 0.0, False, True, True
        )
