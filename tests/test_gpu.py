"""The GPU back ends on CUDA tensors, which the emulator has none of: ``pytest --gpu``.

The whole of both case lists; and what takes a device: streams, CUDA graphs, waiting for the host,
memory, the same bits again, a compiler that generates code; what the emulator says beside what the
device does.
"""

import contextlib
from dataclasses import replace

import cases
import devices
import mixes
import pytest
import torch
from cases import Shape
from cuda_gpu import emulated_gpu, this_gpu
from mixes import MIXES
from triton_gpu import gpu as triton_gpu

from moelora_ops import functional, nn, use_backend
from moelora_ops.bench import METHODS, numerics, runner

pytestmark = pytest.mark.gpu

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
SEED = 0x1234567890ABCDE


@pytest.fixture(params=("cuda", "triton"))
def kernels(request):
    """The name of the back end that is forced."""
    devices.skip_unless_it_runs(request.param)
    with use_backend(request.param):
        yield request.param


def skip_float64(kernels, dtype):
    if (kernels, dtype) == ("triton", F64):
        pytest.skip("Triton's kernels do not compute in float64")


# ---------------------------------------------------------------- the shared case lists

# Every case costs Triton some compilations: each gets one of these in each dtype, in turn.
TOPK_OPTIONS = (
    {},
    {"dropout": 0.3, "dropout_mode": "token", "renormalize": False},
    {"balance": True},
    {"dropout": 0.3, "dropout_mode": "expert", "balance": True},
)
TOPK_CASES = [
    (shape, dtype, TOPK_OPTIONS[(i + j) % len(TOPK_OPTIONS)])
    for i, shape in enumerate(cases.SHAPES)
    for j, dtype in enumerate(cases.DTYPES)
]
MIX_CASES = [
    (*case, (F32, BF16, F16)[(i + i // len(mixes.SIZES)) % 3])
    for i, case in enumerate(mixes.cases())
]


@pytest.mark.parametrize(("shape", "dtype", "options"), TOPK_CASES, ids=str)
def test_topk_matches_reference(kernels, shape, dtype, options):
    skip_float64(kernels, dtype)
    if "dropout" in options:
        options = options | {"seed": torch.tensor([SEED], device="cuda")}
    cases.assert_within_budget(shape, dtype, contextlib.nullcontext, device="cuda", **options)


@pytest.mark.parametrize("strategy", ("stacked", "grouped"))
def test_strategies_match_reference(kernels, strategy):
    cases.assert_within_budget(
        Shape(130, 200, 136, 8, 8, 2), F32, contextlib.nullcontext, device="cuda", strategy=strategy
    )


@pytest.mark.parametrize(("name", "variant", "size", "dtype"), MIX_CASES, ids=str)
def test_mixes_match_reference(kernels, name, variant, size, dtype):
    draws = 8 if torch.Size(size.lead).numel() < 64 else 2
    mixes.assert_within_budget(
        contextlib.nullcontext, name, variant, size, dtype, draws, device="cuda"
    )


@pytest.mark.parametrize("name", MIXES)
def test_mixes_match_reference_in_float64(kernels, name):
    skip_float64(kernels, F64)
    variant = next(iter(MIXES[name].variants))
    mixes.assert_within_budget(
        contextlib.nullcontext, name, variant, mixes.SIZES[7], F64, 2, device="cuda"
    )


# Sizes at which nothing is small any more: several tiles in each direction, sums in parts.
@pytest.mark.parametrize("dtype", (BF16, F32), ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(8192, 4096, 4096, 8, 8, 2),
        Shape(1, 4096, 11008, 8, 8, 2),
        Shape(32, 11008, 4096, 8, 16, 2),
        Shape(2049, 1031, 4100, 64, 3, 4),
        Shape(4096, 2048, 2048, 128, 8, 2),
    ],
    ids=str,
)
def test_topk_matches_reference_at_the_sizes_of_models(kernels, shape, dtype):
    cases.assert_within_budget(shape, dtype, contextlib.nullcontext, 1, device="cuda")


# ---------------------------------------------------------------- layers

LAYERS = {name: method.gpu_cases[0] for name, method in METHODS.items()}
LAYERS["orchmoe-average"] = replace(LAYERS["orchmoe"], combine="average")


def method_and_case(name, **sizes):
    case = replace(LAYERS[name], **({"in_features": 1032, "out_features": 520} | sizes))
    return METHODS[name.partition("-")[0]], case


def step(name, tokens=256):
    """A training step in bfloat16, `runner.Call`."""
    method, case = method_and_case(name, tokens=tokens)
    with torch.device("cuda"):
        return runner.Call(*method.make_inputs(case, 0), "train")


def results(call):
    """y and all gradients of one step."""
    call.release()
    y = call.layer(call.x)
    y.backward(call.dy)
    return [y.detach(), *(leaf.grad for leaf in call.leaves)]


@torch.no_grad()
def change(call, seed):
    """Other inputs in the same memory."""
    random = torch.Generator("cuda").manual_seed(seed)
    call.x.normal_(generator=random)
    call.dy.normal_(generator=random)
    for parameter in call.leaves[1:]:
        parameter *= 1.25


def assert_same(got, want):
    """What the library's products may round otherwise is given two roundings."""
    for one, other in zip(got, want, strict=True):
        assert numerics.error(one, other.double()).rms <= 2 * torch.finfo(other.dtype).eps


@pytest.mark.parametrize("name", LAYERS)
def test_every_operator_once(kernels, name):
    """Within its error budget; small enough for compute-sanitizer, which runs this test alone."""
    method, case = method_and_case(name, tokens=128, in_features=264, out_features=136)
    settings = runner.Settings(device="cuda", compile=False, variants=("ours",))
    assert runner.prepare(method, case, "train", settings).errors.keys() == {"ours"}


@pytest.mark.parametrize("name", LAYERS)
def test_the_same_bits_again(kernels, name):
    """While another stream keeps some of the device busy, so that blocks run in other orders."""
    call, noise = step(name, tokens=2048), torch.randn(2048, 2048, device="cuda")
    want, side = results(call), torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(20):
        with torch.cuda.stream(side):
            noise = (noise @ noise).tanh()
        for got, first in zip(results(call), want, strict=True):
            assert torch.equal(got, first)


@pytest.mark.parametrize("name", LAYERS)
def test_a_graph_follows_its_inputs(kernels, name):
    """A captured step, replayed after x, dy and the parameters have changed in place."""
    call, side = step(name), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            results(call)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(call)
    for seed in (1, 2):
        graph.replay()
        before = [t.clone() for t in captured]
        change(call, seed)
        graph.replay()
        assert_same(captured, results(call))
        assert not any(map(torch.equal, captured, before))


@pytest.mark.parametrize("name", LAYERS)
def test_everything_runs_on_the_current_stream(kernels, name):
    """x arrives late on a side stream; what ran on another one would read the old x."""
    call = step(name)
    old = [t.detach().clone() for t in (call.x, call.dy)]
    change(call, 1)
    new = [t.detach().clone() for t in (call.x, call.dy)]
    want = [t.clone() for t in results(call)]

    @torch.no_grad()
    def load(x, dy):
        call.x.copy_(x)
        call.dy.copy_(dy)

    load(*old)
    results(call)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # ten milliseconds or so
        load(*new)
        got = results(call)
    side.synchronize()
    assert_same(got, want)


@pytest.mark.parametrize("name", LAYERS)
def test_the_host_never_waits(kernels, name):
    call = step(name)
    results(call)  # what is computed once may wait
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(call)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.parametrize("name", ("mola", "gated", "mor1e"))
def test_compiled_code_computes_the_same(kernels, name):
    """Forward and backward through the compiler's own code generator, in one graph."""
    call = step(name)
    want = results(call)
    torch.compiler.reset()
    call.layer = torch.compile(call.layer, fullgraph=True)
    assert_same(results(call), want)


def test_autocast(kernels):
    """Float32 parameters under autocast: as if all were bfloat16."""
    layer = nn.MoLALinear(torch.nn.Linear(264, 136), 4, 8, top_k=2).cuda()
    torch.nn.init.normal_(layer.lora_up)
    x = torch.randn(70, 264, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        y = layer(x)
    assert y.dtype == BF16
    assert_same([y], [layer.bfloat16()(x.bfloat16())])


# ---------------------------------------------------------------- bits and bounds


def adapter(inputs, rows):
    """Output and dx of the adapter alone for some tokens."""
    x = inputs.x[rows].detach().requires_grad_()
    base = x.new_zeros(len(rows), inputs.lora_up.shape[2])
    y = functional.mola(
        x, None, None, inputs.lora_down, inputs.lora_up, inputs.router, 2, 2.0, base_output=base
    )
    return y.detach(), *torch.autograd.grad(y, x, inputs.dy[rows])


@pytest.mark.parametrize("dtype", (BF16, F32), ids=str)
def test_a_token_does_not_depend_on_its_neighbours(kernels, dtype):
    """The same bits alone, among a few and among all: every instruction sums in one order."""
    inputs = cases.make_inputs(Shape(8192, 4096, 4096, 8, 8, 2), dtype).to("cuda")
    whole = adapter(inputs, list(range(8192)))
    for rows in ([5000], [8191, 3], list(range(40, 100)), list(range(1000, 3100))):
        for got, want in zip(adapter(inputs, rows), whole, strict=True):
            assert torch.equal(got, want[rows])


def test_large_offsets(kernels):
    """Beyond 2**31 elements of x and of y."""
    inputs = cases.make_inputs(Shape(64, 4096, 4096, 8, 8, 2), BF16).to("cuda")
    copies = 2**31 // (64 * 4096) + 2
    large = inputs._replace(x=inputs.x.repeat(copies, 1), dy=inputs.dy.repeat(copies, 1))
    want = adapter(inputs, list(range(64)))
    for got, small in zip(adapter(large, slice(None)), want, strict=True):
        assert torch.equal(got.view(copies, *small.shape), small.expand(copies, -1, -1))


def test_memory_beside_x(kernels):
    """Saved for backward: at most twice the tensors of rank space."""
    method, case = method_and_case("mola", tokens=8192)
    call = step("mola", tokens=8192)
    assert runner.saved_bytes(call.layer, call.x) <= method.memory_target(case)


# ---------------------------------------------------------------- the emulator


def both(kernels, request):
    """The emulated device and this one."""
    if kernels == "triton":
        return triton_gpu(90, real=False), triton_gpu(90, real=True)
    return emulated_gpu(request.getfixturevalue("cuda_library"), "90a"), this_gpu()


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (Shape(70, 200, 136, 8, 8, 2), BF16),
        (Shape(70, 200, 136, 8, 8, 2), F32),
        (Shape(5, 33, 47, 4, 3, 2), F16),
    ],
    ids=str,
)
def test_the_emulator_agrees_with_the_device(kernels, shape, dtype, request, record_property):
    """The same kernels on the same inputs; how far the results differ is recorded."""
    inputs, found = cases.make_inputs(shape, dtype), []
    with devices.on_cpu_tensors(kernels):
        for device in both(kernels, request):
            with device:
                found.append(cases.run(functional.mola, inputs, shape.k))
    plain = cases.reference_run(inputs, shape.k, dtype)
    emulated, got = found
    counts = [each.pop("counts") for each in (emulated, got, plain)]
    assert torch.equal(counts[0], counts[1])
    for name, value in got.items():
        same = (value == emulated[name]).double().mean().item()
        error = numerics.error(value, emulated[name].double())
        record_property(name, f"{same:.2%} of the same bits, error {error.rms:.1e}")
    want = {name: value.double() for name, value in emulated.items()}
    numerics.check_numerics(str(shape), got, plain, want)
