"""The benchmark: its baselines, checks and arithmetic, and the command end to end."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from moelora_ops import backends, bench
from moelora_ops.bench import __main__ as command
from moelora_ops.bench import devices, report, runner
from moelora_ops.bench.baselines import (
    ExpertLoopMoLALinear,
    FastStackedMoLALinear,
    GroupedMoLALinear,
    StackedMoLALinear,
    TouchedLinear,
)
from moelora_ops.bench.devices import Cpu
from moelora_ops.bench.method import DTYPES, Variant
from moelora_ops.bench.mola import MOLA, MoLACase, floors, make_inputs, near_ties, reference_layer
from moelora_ops.bench.numerics import (
    Error,
    InputsError,
    NumericsError,
    budget,
    check_numerics,
    error,
    run,
)
from moelora_ops.bench.runner import Settings

BASELINES = (StackedMoLALinear, FastStackedMoLALinear, ExpertLoopMoLALinear)
TINY = MoLACase("tiny", "fp32", tokens=40, in_features=24, out_features=20, experts=4, rank=3)
QUICK = Settings(rounds=3, seconds=0.1, compile=False)
TINY_OPTIONS = [
    "--tokens", "40", "--in-features", "24", "--out-features", "20", "--experts", "4",
    "--rank", "3",
]  # fmt: skip


@pytest.fixture
def tiny():
    return make_inputs(TINY)


def with_ours(build):
    """The method with another layer in our place."""
    variants = tuple(v if v.baseline else v._replace(build=build) for v in MOLA.variants)
    return MOLA._replace(variants=variants)


class Planted(StackedMoLALinear):
    """Wrong by a thousandth in one gradient, right in y."""

    def forward(self, x):
        y = super().forward(x)
        if y.requires_grad:
            y.register_hook(lambda dy: dy * 1.001)
        return y


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(
    ("tokens", "experts", "rank", "top_k"),
    [
        (0, 4, 2, 2), (1, 4, 3, 2), (3, 1, 2, 1), (31, 8, 2, 2), (32, 8, 2, 2), (40, 8, 4, 1),
        (70, 5, 1, 5),
    ],
)  # fmt: skip
@pytest.mark.parametrize("baseline", BASELINES)
def test_baselines_are_the_reference_in_float64(
    baseline, tokens, experts, rank, top_k, renormalize
):
    case = MoLACase("c", "fp64", max(tokens, 1), 17, 13, experts, rank, top_k)
    layer, x, dy = make_inputs(case)
    x, dy = x[:tokens], dy[:tokens]
    layer.renormalize = renormalize
    got = run(baseline.from_reference(layer), x, dy)
    want = run(reference_layer(layer, torch.float64), x, dy)
    assert got.keys() == {"y", "dx", "dlora_down", "dlora_up", "drouter"} == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("baseline", BASELINES)
def test_baselines_in_every_dtype(baseline, dtype):
    layer, x, dy = make_inputs(replace(TINY, dtype=dtype))
    want = run(reference_layer(layer, torch.float64), x.double(), dy.double())
    literal = run(reference_layer(layer, x.dtype), x, dy)
    check_numerics("baseline", run(baseline.from_reference(layer), x, dy), literal, want, factor=4)


@pytest.mark.parametrize("baseline", BASELINES)
def test_baselines_take_any_leading_shape(baseline, tiny):
    layer, x, _ = tiny
    module = baseline.from_reference(layer)
    y = run(module, x, direction="forward")["y"]
    folded = run(module, x.view(5, 8, -1), direction="forward")["y"]
    torch.testing.assert_close(folded, y.view(5, 8, -1), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_the_grouped_baseline_computes_the_same(dtype, top_k):
    """In the shapes that its kernel takes; one expert gets no token."""
    case = replace(TINY, dtype=dtype, in_features=32, out_features=24, rank=8, top_k=top_k)
    layer, x, dy = make_inputs(case)
    with torch.no_grad():
        layer.router[1] = 0
        layer.router[0] = -layer.router[2]  # of these two one is above 0, so above expert 1
        layer.router[3] = -layer.router[2] * 2
    x = x[~near_ties(x, layer.router, top_k, 0.02)]
    dy = dy[: len(x)]
    want = run(reference_layer(layer, torch.float64), x.double(), dy.double())
    literal = run(reference_layer(layer, x.dtype), x, dy)
    got = run(GroupedMoLALinear.from_reference(layer), x, dy)
    check_numerics("grouped", got, literal, want, factor=4)
    if top_k == 1:
        assert not got["dlora_down"][1].any() and got["dlora_down"][2].any()


def test_the_grouped_baseline_is_for_gpus(tiny):
    layer, _, _ = tiny
    (grouped,) = (v for v in MOLA.variants if v.name == "grouped-mm")
    assert grouped.build(replace(TINY, dtype="bf16", rank=8), layer) is None


def test_baselines_share_parameters(tiny):
    layer, _, _ = tiny
    for baseline in BASELINES:
        shared = dict(baseline.from_reference(layer).named_parameters())
        assert shared.keys() == dict(layer.named_parameters()).keys()
        assert all(shared[name] is p for name, p in layer.named_parameters())


@pytest.mark.parametrize("baseline", BASELINES)
def test_baselines_refuse_dropout(baseline):
    with pytest.raises(ValueError, match="dropout"):
        baseline(nn.Linear(4, 4), 2, dropout=0.1)


def test_float32_logits_decide_what_bfloat16_cannot():
    layer = StackedMoLALinear(nn.Linear(2, 1, bias=False, dtype=torch.bfloat16), 2, 1, 1.0, 1)
    rounded = FastStackedMoLALinear.from_reference(layer)
    x = torch.tensor([[1.0, 2.0**-10]], dtype=torch.bfloat16)
    chosen = []
    with torch.no_grad():
        layer.base.weight.zero_()
        layer.lora_down.copy_(torch.tensor([1.0, 0.0]).expand(2, 1, 2))
        layer.lora_up.copy_(torch.tensor([0.0, 1.0]).view(2, 1, 1))  # y is the chosen expert
        for better in (0, 1):
            layer.router.copy_(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
            layer.router[better, 1] = 1.0  # a lead of 2**-10, an eighth of bfloat16's step at 1
            chosen.append((layer(x).item(), rounded(x).item()))
    assert [right for right, _ in chosen] == [0, 1]
    assert chosen[0][1] == chosen[1][1]  # a tie: the same expert, whichever is better


def test_stacked_compiles_into_one_graph(tiny):
    layer, x, dy = tiny
    stacked = StackedMoLALinear.from_reference(layer)
    torch.compiler.reset()
    compiled = torch.compile(stacked, fullgraph=True, backend="aot_eager")
    got, want = run(compiled, x, dy), run(stacked, x, dy)
    for name in want:
        torch.testing.assert_close(got[name], want[name])


@pytest.mark.parametrize(
    ("case", "direction", "dense", "sparse"),
    [
        # By hand: K (Er + E) + N Er and K (kr + E) + N kr over K N.
        (MoLACase("c", "bf16", 1024, 2048, 2048), "forward", 0.06640625, 0.01953125),
        (MoLACase("c", "fp32", 1, 10, 100, 3, 2, 1), "forward", 0.69, 0.25),
        # Backward adds 2 N Er + 2 K (Er + E) and 2 N kr + 2 K (kr + k); the base doubles.
        (MoLACase("c", "bf16", 1024, 2048, 2048), "train", 0.099609375, 0.0263671875),
        (MoLACase("c", "bf16", 9, 2048, 2048, 32, 1, 4), "train", 0.0703125, 0.015625),
        (MoLACase("c", "fp32", 1, 10, 100, 3, 2, 1), "train", 1.035, 0.355),
        (MoLACase("c", "fp32", 1, 2048, 2048, 8, 8, 8), "train", 0.099609375, 0.099609375),
        # For dx alone half of that is added: N Er + K (Er + E) and N kr + K (kr + k).
        (MoLACase("c", "fp32", 1, 10, 100, 3, 2, 1), "dx", 0.69, 0.24),
    ],
)
def test_floors(case, direction, dense, sparse):
    assert floors(case, direction) == pytest.approx((dense, sparse), rel=1e-12)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_inputs_have_no_near_ties_and_repeat(dtype):
    case = replace(TINY, dtype=dtype, tokens=300, experts=8)
    layer, x, dy = make_inputs(case, seed=3)
    gap = 2 * torch.finfo(x.dtype).eps
    assert not near_ties(x, layer.router, case.top_k, gap).any()
    again = make_inputs(case, seed=3)
    assert torch.equal(x, again[1]) and torch.equal(dy, again[2])
    assert all(map(torch.equal, layer.parameters(), again[0].parameters()))
    assert not torch.equal(x, make_inputs(case, seed=4)[1])


def test_near_ties_finds_them():
    router = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    x = torch.tensor([[1.0, 0.5], [1.0, 0.99], [1.0, -0.5]])
    # Top 1: the gaps relative to the largest logit are 1/3, 0.01/1.99 and 1.
    assert near_ties(x, router, 1, 0.01).tolist() == [False, True, False]
    assert near_ties(x, router, 1, 0.5).tolist() == [True, True, False]
    assert not near_ties(x, router, 3, 10.0).any()


def test_inputs_that_cannot_be_had():
    with pytest.raises(InputsError, match=r"near ties of 2 of 4 experts.*min_gap"):
        make_inputs(TINY, min_gap=3.0)
    method = MOLA._replace(make_inputs=lambda case, seed: make_inputs(case, seed, min_gap=3.0))
    assert "near ties" in runner.run_case(method, TINY, "forward", QUICK)["refused"]


@pytest.mark.parametrize(("rank", "top_k"), [(8, 2), (1, 4), (4, 8)])
def test_experts_contribute_as_much_as_the_base(rank, top_k):
    case = MoLACase("c", "fp32", 200, 64, 64, 8, rank, top_k)
    layer, x, _ = make_inputs(case)
    with torch.no_grad():
        base = layer.base(x)
        ratio = (layer(x) - base).std() / base.std()
    assert 0.5 < ratio < 2


@pytest.mark.parametrize(
    ("field", "value"), [("tokens", 0), ("in_features", -1), ("rank", 0), ("top_k", 9)]
)
def test_impossible_cases_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        replace(TINY, **{field: value})


def test_error_by_hand():
    want = torch.tensor([3.0, -4.0], dtype=torch.float64)
    assert error(torch.tensor([3.0, -4.0]), want) == (0, 0)
    # Differences 0 and 1: rms sqrt(1/2) over sqrt(25/2), largest 1 over 4.
    assert error(torch.tensor([3.0, -3.0]), want) == pytest.approx((0.2, 0.25))
    assert error(torch.tensor([3.0, float("nan")]), want) == (float("inf"), float("inf"))
    assert error(torch.tensor([3.0]), want) == (float("inf"), float("inf"))
    assert error(torch.empty(0), torch.empty(0, dtype=torch.float64)) == (0, 0)
    # Rounding noise has no scale: the error is absolute.
    assert error(torch.tensor([0.5]), torch.tensor([1e-17], dtype=torch.float64)) == (0.5, 0.5)


def test_budget_is_twice_plain_but_no_less_than_rounding():
    assert budget(Error(1e-3, 1e-2), torch.float32) == (2e-3, 4e-2)
    assert budget(Error(0, 0), torch.bfloat16) == pytest.approx((2 * 2**-7 / 12**0.5, 2 * 2**-7))


def test_check_numerics_finds_what_is_planted(tiny):
    layer, x, dy = tiny
    want = run(reference_layer(layer, torch.float64), x.double(), dy.double())
    plain = run(StackedMoLALinear.from_reference(layer), x, dy)
    assert check_numerics("fine", plain, plain, want).keys() == want.keys()

    one_element = {**plain, "y": plain["y"].clone()}
    one_element["y"][7, 3] += 1e-4
    with pytest.raises(NumericsError, match=r"^spot: y: rms .*; y: max error"):
        check_numerics("spot", one_element, plain, want)
    with pytest.raises(NumericsError, match="drouter: rms"):
        check_numerics("g", {**plain, "drouter": plain["drouter"] * 1.001}, plain, want)
    with pytest.raises(NumericsError, match=r"dx: wanted torch\.float32, got torch.float64"):
        check_numerics("wide", {**plain, "dx": plain["dx"].double()}, plain, want)
    with pytest.raises(NumericsError, match=r"wanted .*'dx'.* got"):
        check_numerics("missing", {k: v for k, v in plain.items() if k != "dx"}, plain, want)


def test_run_leaves_gradients_alone(tiny):
    layer, x, dy = tiny
    run(layer, x, dy)
    assert x.grad is None and all(p.grad is None for p in layer.parameters())


def test_summary_by_hand():
    samples = {"base": [1.0, 2.0, 4.0], "v": [2.0, 3.0, 5.0]}
    summary = runner.summarize(samples, floor=0.25)
    # Ratios 2, 1.5, 1.25.
    assert summary["v"] == {
        "median_ms": 3000, "min_ms": 2000, "overhead": 0.5, "overhead_of_minima": 1.0, "tax": 1.5,
        "times_floor": 2.0,
    }  # fmt: skip
    assert summary["base"]["overhead"] == 0 and summary["base"]["times_floor"] is None


def test_rounds_interleave_in_changing_order():
    trace = []
    calls = {name: lambda name=name: trace.append(name) for name in "abc"}
    samples, repeats = runner.time_rounds(calls, Settings(rounds=20, seconds=60.0))
    assert {name: len(times) for name, times in samples.items()} == {"a": 20, "b": 20, "c": 20}
    assert repeats > 100  # appending takes far less than the shortest sample
    order = trace[2::repeats]  # after the two calls that calibrate
    rounds = {tuple(order[i : i + 3]) for i in range(0, len(order), 3)}
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds) and len(rounds) > 1


def test_time_is_limited_and_reported():
    shares = []
    samples, _ = runner.time_rounds(
        {"a": lambda: None}, Settings(rounds=1000, seconds=1e-9), shares.append
    )
    assert len(samples["a"]) == 3 and shares == [1.0] * 3


def test_saved_bytes_by_hand(tiny):
    class Saves(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6))

        def forward(self, x):
            # The product saves x and weight; the sigmoid its output; the last product two views of
            # one storage, namely that output.
            s = (x * self.weight).sigmoid()
            return s[:, :3] * s[:, 3:]

    assert runner.saved_bytes(Saves(), torch.randn(10, 6)) == 10 * 6 * 4
    layer, x, _ = tiny
    assert runner.saved_bytes(layer.base, x) == 0


def test_peak_bytes_by_hand():
    mib = 2**20
    old = [torch.empty(8 * mib, dtype=torch.uint8)]

    def step():
        old.clear()  # freed first: no room that the step needs
        a = torch.empty(3 * mib, dtype=torch.uint8)
        del a
        b = torch.empty(2 * mib, dtype=torch.uint8)
        c = torch.empty(2 * mib, dtype=torch.uint8)
        del b, c

    kept = torch.empty(8 * mib, dtype=torch.uint8)  # from before: not counted
    assert Cpu().peak_bytes(step) == 4 * mib
    del kept


def test_dx_alone_trains_nothing():
    ready = runner.prepare(MOLA, TINY, "dx", QUICK)
    assert all(errors.keys() == {"y", "dx"} for errors in ready.errors.values())
    call = runner.Call(ready.layers["ours"], ready.x, ready.dy, "dx")
    call()
    assert [leaf.shape for leaf in call.leaves] == [ready.x.shape]
    assert call.x.grad.shape == ready.x.shape
    assert all(p.grad is None for p in ready.layer.parameters())
    call.release()
    assert call.x.grad is None


def test_ours_competes_on_several_back_ends():
    """Once on each, whatever is chosen around it."""
    ran_on = set()
    method = with_ours(lambda case, layer: Noted(layer, ran_on))
    settings = QUICK._replace(backends=("reference", "cpu"), variants=("stacked", "ours"))
    record = runner.run_case(method, TINY, "train", settings)
    assert record["variants"].keys() == {"base", "touch", "stacked", "ours-reference", "ours-cpu"}
    assert record["backend"] == "reference, cpu"
    assert ran_on == {"reference", "cpu"}


class Noted(nn.Module):
    """Ours, which notes the back end that it runs on."""

    def __init__(self, layer, ran_on):
        super().__init__()
        self.layer, self.ran_on = layer, ran_on

    def forward(self, x):
        self.ran_on.add(backends.choose(x.device, x.dtype))
        return self.layer(x)


def test_least_bytes_by_hand(tiny):
    layer, x, dy = tiny
    adapter = 4 * 3 * 24 + 4 * 3 * 20 + 4 * 24  # down, up, router
    once = 4 * (40 * 24 + 40 * 20 + adapter)
    for direction, times in (("forward", 1), ("dx", 2), ("train", 3)):
        assert runner.least_bytes(layer, x, dy, direction) == times * once


class FakeCuda:
    """What the benchmark uses of ``torch.cuda``; the device takes 3 ms for a call."""

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            FakeCuda.trace.append("event")

        def synchronize(self):
            FakeCuda.trace.append("wait")

        def elapsed_time(self, end):
            return 3.0

    trace: tuple = ()

    @staticmethod
    def get_device_properties():
        return SimpleNamespace(L2_cache_size=1024, uuid="0")

    @staticmethod
    def synchronize():
        pass

    @staticmethod
    def _sleep(cycles):
        FakeCuda.trace.append(("sleep", cycles))


@pytest.fixture
def cuda(monkeypatch):
    """The benchmark's CUDA device on a fake of ``torch.cuda``, its buffer on the CPU."""
    FakeCuda.trace = []
    fake = SimpleNamespace(
        cuda=FakeCuda, uint8=torch.uint8, int32=torch.int32,
        zeros=lambda *size, dtype, device: torch.zeros(*size, dtype=dtype),
    )  # fmt: skip
    monkeypatch.setattr(devices, "torch", fake)
    return devices.Cuda()


def test_a_gpu_sample_is_one_call_that_the_device_finds_queued(cuda):
    """Timed by the device, which sleeps for twice as long as the host needs to queue the call."""

    def call():
        FakeCuda.trace.append("call")
        time.sleep(2e-3)

    assert cuda.sample(call) == pytest.approx(3e-3)
    assert FakeCuda.trace[:5] == ["call"] * 5  # how long that is
    (_, cycles), *rest = FakeCuda.trace[5:]
    assert cycles / 2e9 > 4e-3 and rest == ["event", "call", "event", "wait"]
    FakeCuda.trace.clear()
    cuda.sample(call)
    assert FakeCuda.trace.count("call") == 1
    cuda.calibrate(call)
    assert cuda.sample(call) and FakeCuda.trace.count("call") == 7


class FakeGpu(Cpu):
    """The CPU under a GPU's rules."""

    copy_rate = 1e9
    graphs = 0

    def captured(self, call):
        if isinstance(call.layer, ExpertLoopMoLALinear):
            raise AssertionError("it waits for the device")
        if isinstance(call.layer, StackedMoLALinear):
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        self.graphs += 1
        return lambda: call()

    def host_seconds(self, call):
        return 0.5

    def clocks(self):
        return {"clocks.sm": "1980 MHz"}

    def facts(self):
        return {
            "name": "NVIDIA Z80", "driver": "1.0", "cuda": "13.0", "triton": "3.6",
            "copy_bytes_per_second": 1e9, "clocks": self.clocks(),
        }  # fmt: skip


def test_a_gpu_case(monkeypatch, capsys, tmp_path):
    """Graphs instead of calls, a floor by memory, the host's time; in the tables too."""
    gpu = FakeGpu()
    monkeypatch.setattr(devices, "device", lambda name: gpu)
    settings = QUICK._replace(graphs=True)
    record = runner.run_case(MOLA, TINY, "train", settings)
    ours = {"ours", "ours-library"}  # the fake GPU's tensors lie on the CPU
    assert record["variants"].keys() == {"base", "touch", *ours} and gpu.graphs == 4
    skipped = record["skipped"]
    assert "which no CUDA graph can hold" in skipped["expert-loop"]
    why = "CUDA graph: RuntimeError: operation not permitted when stream is capturing"
    assert skipped["stacked"] == why
    layer, x, dy = make_inputs(TINY)
    seconds = runner.least_bytes(layer, x, dy, "train") / 1e9
    base_seconds = record["variants"]["base"]["median_ms"] / 1e3
    assert record["floors"] == {"memory": pytest.approx(seconds / base_seconds)}
    ours = record["variants"]["ours"]
    assert ours["times_floor"] == pytest.approx(ours["overhead"] / record["floors"]["memory"])
    assert ours["host_ms"] == 500 and record["clocks"] == {"clocks.sm": "1980 MHz"}

    document = report.header("mola", settings, ["-m", "bench"]) | {"cases": [record]}
    report.print_record(record)
    report.write_markdown(tmp_path / "run.md", document)
    shown, written = capsys.readouterr().out, (tmp_path / "run.md").read_text()
    assert "tiny fp32 train in CUDA graphs" in shown and "% memory;" in " ".join(shown.split())
    assert "host ms" in shown and "500.000" in shown
    assert ", NVIDIA Z80\n" in written and "driver 1.0, CUDA 13.0, torch " in written
    assert "at the start clocks.sm 1980 MHz." in written and "| 500.000 |" in written
    assert "NVIDIA Z80, torch" in report.draw_plot(document).get_suptitle()


def test_what_does_not_fit_is_skipped_or_refused():
    class TooLarge(StackedMoLALinear):
        def forward(self, x):
            raise torch.OutOfMemoryError("CUDA")

    large = Variant("large", lambda case, layer: TooLarge.from_reference(layer))
    method = MOLA._replace(variants=(*MOLA.variants, large))
    record = runner.run_case(method, TINY, "forward", QUICK)
    assert record["skipped"]["large"] == "out of memory" and "large" not in record["variants"]
    record = runner.run_case(with_ours(large.build), TINY, "forward", QUICK)
    assert record["refused"] == "out of memory"


@pytest.mark.parametrize("method", bench.METHODS.values(), ids=lambda method: method.name)
def test_gpu_cases(method):
    """Names are keys; gradients are taken where nobody would mind the rounding of one token."""
    names = [case.name for case in method.gpu_cases]
    assert len(set(names)) == len(names)
    for case in method.gpu_cases:
        assert f"-t{case.tokens}" in case.name
        assert case.directions == (
            ("forward", "dx", "train") if case.tokens >= 512 else ("forward",)
        )
        assert all(floor > 0 for d in case.directions for floor in method.floors(case, d))


def test_training_call_makes_fresh_gradients(tiny):
    layer, x, dy = tiny
    call = runner.Call(layer, x, dy, "train")
    call()
    first = layer.lora_up.grad
    call()
    assert layer.lora_up.grad is not first
    torch.testing.assert_close(layer.lora_up.grad, first, rtol=0, atol=0)
    assert x.grad is None  # a leaf of its own


@pytest.mark.parametrize("direction", ["forward", "train"])
def test_a_wrong_layer_is_refused(direction):
    def off_by_a_thousandth(case, layer):
        wrong = StackedMoLALinear.from_reference(layer)
        wrong.alpha *= 1.001
        return wrong

    record = runner.run_case(with_ours(off_by_a_thousandth), TINY, direction, QUICK)
    assert record["refused"].startswith("ours: y: rms error")
    assert "variants" not in record


def test_wrong_gradients_are_refused_in_training():
    method = with_ours(lambda case, layer: Planted.from_reference(layer))
    assert "refused" not in runner.run_case(method, TINY, "forward", QUICK)
    refused = runner.run_case(method, TINY, "train", QUICK)["refused"]
    assert "ours: dx: rms" in refused and "y:" not in refused


def test_a_wrong_baseline_is_refused():
    variants = (
        Variant("stacked", lambda case, layer: nn.Sequential(layer, nn.Hardtanh())),
        *MOLA.variants[1:],
    )
    record = runner.run_case(MOLA._replace(variants=variants), TINY, "forward", QUICK)
    assert record["refused"].startswith("stacked: y:")


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_touching_changes_nothing(dtype):
    base = nn.Linear(12, 7, dtype=dtype)
    x = torch.randn(3, 5, 12, dtype=dtype, requires_grad=True)
    x.data[0, 0, 0], base.weight.data[1] = -0.0, 0.0
    outputs = []
    for layer in (base, TouchedLinear(base)):
        y = layer(x)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        outputs.append((y, dx))
    for want, got in zip(*outputs, strict=True):
        assert torch.equal(want.signbit(), got.signbit()) and torch.equal(want, got)


class CoarseIn16Bits(StackedMoLALinear):
    """The right function; in 16 bits it rounds its output to 3 bits where 8 would do."""

    def forward(self, x):
        y = super().forward(x)
        return y if x.dtype.itemsize > 2 else y.to(torch.float8_e4m3fn).to(y.dtype)


def test_a_coarse_baseline_competes_and_is_marked(capsys):
    coarse = Variant("coarse", lambda case, layer: CoarseIn16Bits.from_reference(layer))
    method = MOLA._replace(variants=(*MOLA.variants, coarse))
    case = replace(TINY, dtype="bf16")
    record = runner.run_case(method, case, "forward", QUICK)
    (why,) = record["coarse"].values()
    assert why.startswith("coarse: y: rms error")
    assert record["variants"]["coarse"]["min_ms"] > 0
    assert record["variants"]["coarse"]["errors"]["y"]["rms"] > 0.02
    report.print_record(record)
    shown = " ".join(capsys.readouterr().out.split())
    assert "coarse † │" in shown and "† coarse: y: rms error" in shown


def test_what_is_wrong_in_16_bits_and_in_32_is_refused():
    wrong = Variant("wrong", lambda case, layer: nn.Sequential(layer, nn.Hardtanh()))
    ours = CoarseIn16Bits.from_reference
    for method, name in (
        (MOLA._replace(variants=(*MOLA.variants, wrong)), "wrong"),
        (with_ours(lambda case, layer: ours(layer)), "ours"),  # the allowance is for baselines
    ):
        record = runner.run_case(method, replace(TINY, dtype="bf16"), "forward", QUICK)
        assert record["refused"].startswith(f"{name}: y: rms")


def test_a_compiler_that_fails_is_a_reason(monkeypatch):
    def no_compiler(*_, **__):
        def fail(x):
            raise RuntimeError("no C++ compiler\nand a long trace")

        module = nn.Module()
        module.forward = fail
        return module

    monkeypatch.setattr(torch, "compile", no_compiler)
    settings = QUICK._replace(compile=True, variants=("stacked-compiled", "ours"))
    record = runner.run_case(MOLA, TINY, "forward", settings)
    assert record["skipped"] == {"stacked-compiled": "torch.compile: RuntimeError: no C++ compiler"}
    assert record["variants"].keys() == {"base", "touch", "ours"}


def test_command_end_to_end(tmp_path, capsys):
    files = {kind: tmp_path / f"run.{kind}" for kind in ("json", "markdown", "plot")}
    outputs = [text for kind, path in files.items() for text in (f"--{kind}", str(path))]
    argv = ["mola", *TINY_OPTIONS, "--dtype", "bf16", "fp32", "--quick", "--threads", "1", *outputs]
    threads = torch.get_num_threads()
    assert command.main(argv) == 0
    assert torch.get_num_threads() == threads

    document = json.loads(files["json"].read_text())
    assert document["command"].startswith("python -m moelora_ops.bench mola --tokens 40")
    assert document["info"]["torch"] == torch.__version__ and document["info"]["machine"]["cpu"]
    cases = document["cases"]
    assert [(c["dtype"], c["direction"]) for c in cases] == [
        ("bf16", "forward"), ("bf16", "train"), ("fp32", "forward"), ("fp32", "train"),
    ]  # fmt: skip
    for case in cases:
        names = {"base", "touch", "stacked", "expert-loop", "ours", "ours-library"}
        names |= {"stacked-16bit"} if case["dtype"] == "bf16" else set()
        assert case["variants"].keys() == names and case["rounds"] == 3
        assert all(v["min_ms"] > 0 for v in case["variants"].values())
        for key in ("saved_bytes", "peak_bytes"):
            assert (key in case["variants"]["ours"]) == (case["direction"] == "train")
        assert case["variants"]["ours"]["errors"]["y"]["rms"] > 0
        assert "stacked-compiled" in case["skipped"]
    assert cases[3]["variants"]["base"]["saved_bytes"] == 0
    assert cases[3]["memory_target"] == 8 * 40 * (4 * 3 + 4)

    assert files["plot"].read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    markdown = files["markdown"].read_text()
    assert markdown.count("| ours |") == 4
    shown = capsys.readouterr().out
    assert "custom bf16 train: T=40 K=24 N=20 E=4 r=3 k=2" in shown and "x floor" in shown


def test_command_fails_when_a_case_is_refused(tmp_path, capsys, monkeypatch):
    method = with_ours(lambda case, layer: layer.base)
    monkeypatch.setitem(bench.METHODS, "mola", method)
    path = tmp_path / "run.json"
    argv = ["mola", *TINY_OPTIONS, "--dtype", "fp32", "--direction", "forward", "--quick"]
    outputs = ["--json", path, "--markdown", tmp_path / "run.md", "--plot", tmp_path / "run.png"]
    assert command.main([*argv, *map(str, outputs)]) == 1
    assert "refused" in capsys.readouterr().out
    (case,) = json.loads(path.read_text())["cases"]
    assert "ours: y: rms" in case["refused"] and "variants" not in case
    assert "Refused: ours" in (tmp_path / "run.md").read_text()


def test_plot_has_one_panel_per_case():
    def record(case, **overheads):
        variants = {name: {"overhead": overhead} for name, overhead in overheads.items()}
        return {
            "case": case, "dtype": "bf16", "direction": "forward", "graphs": False, "shape": "T=1",
            "floors": {"dense": 0.06, "sparse": 0.02}, "variants": {"base": {}, **variants},
            "coarse": {"loop": "loop: y: rms error"} if "loop" in variants else {},
        }  # fmt: skip

    cases = [
        record("a", stacked=0.13, loop=4.0, ours=-0.05),
        record("b", ours=0.5),
        record("c", ours=0),
    ]
    facts = {"machine": {"cpu": "z80"}, "threads": 1, "torch": "2.10"}
    refused = {"refused": "wrong"}
    figure = report.draw_plot(
        {"method": "mola", "info": facts, "device": None, "cases": [*cases, refused]}
    )
    panels = figure.axes
    assert [panel.get_title() for panel in panels] == [f"{c} bf16 forward: T=1" for c in "abc"]
    stacked, loop, ours = (bar.get_width() for bar in panels[0].patches)
    # The loop's bar is cut, and labelled with its figure all the same.
    assert stacked == pytest.approx(13) and ours == pytest.approx(-5) and 13 < loop < 20
    assert [t.get_text() for t in panels[0].texts] == [" +13.0 %", " +400.0 % (cut)", " -5.0 %"]
    assert [t.get_text() for t in panels[0].get_yticklabels()] == ["stacked", "loop †", "ours"]
    assert [line.get_xdata()[0] for line in panels[0].lines] == [6.0, 2.0]


def test_list_and_selection(capsys):
    assert command.main(["mola", "--list", "--case", "t1", "dense", "--dtype", "bf16"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "t1       bf16  T=1 K=4096 N=4096 E=8 r=8 k=2  forward",
        "dense    bf16  T=1024 K=2048 N=2048 E=8 r=8 k=8  forward, train",
    ]
    argv = ["mola", "--list", "--device", "cuda", "--case", "up-t1", "--direction", "all"]
    assert command.main(argv) == 0
    assert capsys.readouterr().out.splitlines() == [
        "up-t1    bf16  T=1 K=4096 N=11008 E=8 r=8 k=2  forward, dx, train"
    ]
    assert command.main(["mola", "--list", "--rank", "4", "--direction", "train"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "custom   bf16  T=1024 K=2048 N=2048 E=8 r=4 k=2  train",
        "custom   fp32  T=1024 K=2048 N=2048 E=8 r=4 k=2  train",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top-k", "9"], "top_k: wanted 1..experts=8, got 9"),
        (["--tokens", "0"], "tokens: wanted at least 1, got 0"),
        (["--rounds", "0"], "--rounds: wanted more than 0, got 0"),
        (["--case", "t3"], "invalid choice"),
        (["--case", "qkvo-t8", "t1"], "--case: not for cpu: qkvo-t8"),
        (["--device", "cuda", "--case", "qkvo-t8", "t1"], "--case: not for cuda: t1"),
        (["--graphs"], "--graphs: wanted --device cuda, got cpu"),
        (["--backend", "cpu", "gpu"], "invalid choice"),
        (["--dtype", "int8"], "invalid choice"),
        (["--json", "no/such/folder/run.json"], "no/such/folder/run.json: its folder does not"),
    ],
)
def test_bad_options_are_named(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["mola", *options])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_an_error(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        command.main(["mola", "--device", "cuda"])
    assert stop.value.code == 2
    assert "device: wanted cuda, but there is no CUDA device" in capsys.readouterr().err


def test_what_is_measured_is_kept_whatever_comes_after(tmp_path, monkeypatch):
    def fails_later(method, case, direction, *arguments):
        if case.dtype == "fp32":
            raise KeyboardInterrupt
        return {"case": case.name, "refused": "wrong"}

    monkeypatch.setattr(command, "run_case", fails_later)
    monkeypatch.setattr(report, "print_record", lambda record: None)
    path = tmp_path / "run.json"
    with pytest.raises(KeyboardInterrupt):
        command.main(["mola", "--case", "t8", "--json", str(path)])
    assert json.loads(path.read_text())["cases"] == [{"case": "t8", "refused": "wrong"}]


@pytest.mark.parametrize("package", ["rich", "matplotlib"])
def test_missing_optional_packages_are_named(package, tmp_path, capsys, monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    plot = tmp_path / "run.png"
    argv = ["mola", *TINY_OPTIONS, "--dtype", "fp32", "--direction", "forward", "--quick"]
    with pytest.raises(SystemExit) as stop:
        command.main([*argv, "--plot", str(plot)])
    assert stop.value.code == 2 and not plot.exists()
    assert f"needs {package}, which is not installed: pip install" in capsys.readouterr().err


def test_a_back_end_that_cannot_run_is_an_error(capsys, monkeypatch):
    def cannot_run(device, dtype):
        raise RuntimeError("backend 'cpu' was asked for, but it is not built")

    monkeypatch.setattr(backends, "choose", cannot_run)
    with pytest.raises(SystemExit) as stop:
        command.main(["mola", "--backend", "cpu"])
    assert stop.value.code == 2 and "it is not built" in capsys.readouterr().err


def test_commit_is_none_without_git(monkeypatch):
    def no_git(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    assert report._commit() is None


def test_module_runs():
    argv = [sys.executable, "-m", "moelora_ops.bench", "mola", "--list"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == len(MOLA.cases)
