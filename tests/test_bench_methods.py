"""The benchmark's methods beside MoLA: every variant computes the same, floors and memory."""

import importlib.util
from dataclasses import replace

import pytest
from moles import make_layer
from torch import nn

from moelora_ops.bench import METHODS, runner
from moelora_ops.bench.devices import Cpu
from moelora_ops.bench.gated import GATED, GatedCase
from moelora_ops.bench.mole import MoLECase, StackedMoLELinear
from moelora_ops.bench.mor1e import MOR1E, MoR1ECase
from moelora_ops.bench.orchmoe import ORCHMOE, OrchMoECase
from moelora_ops.bench.pemt import PEMT, PEMTCase

TINY_CASES = [
    (GATED, GatedCase("tiny", "fp64", 12, 10, 8, 3, 4)),
    (GATED, GatedCase("tiny", "fp32", 256, 10, 8, 3, 4, trained=True)),
    (PEMT, PEMTCase("tiny", "fp64", 24, 10, 8, 3, 4, 4)),
    (PEMT, PEMTCase("tiny", "bf16", 256, 64, 48, 3, 8, 4)),
]


@pytest.mark.parametrize("direction", ["forward", "dx", "train"])
@pytest.mark.parametrize(("method", "case"), TINY_CASES, ids=lambda v: f"{v.name}-{v}"[:30])
def test_benchmark_competes_on_the_same_function(method, case, direction):
    """Every variant keeps to its error budget, or this raises."""
    ready = runner.prepare(method, case, direction, runner.Settings(compile=False))
    peft = ["peft-xlora"] if method is GATED and importlib.util.find_spec("peft") else []
    baselines = ["base", "touch", "stacked", "expert-loop", *peft]
    assert list(ready.layers) == [*baselines, "ours", "ours-library"]
    assert not ready.coarse
    assert all(("dx" in errors) == (direction != "forward") for errors in ready.errors.values())
    assert runner.saved_bytes(ready.layers["ours"], ready.x) <= method.memory_target(case)


def test_benchmark_floors_by_hand():
    gated = GatedCase("c", "fp32", 1, in_features=30, out_features=20, experts=2, rank=3)
    assert GATED.floors(gated, "forward").dense == pytest.approx(6 * 50 / 600)
    assert GATED.floors(gated, "train").dense == pytest.approx(2 * 6 * 50 / 1200)
    trained = replace(gated, trained=True)
    assert GATED.floors(trained, "train").dense == pytest.approx(3 * 6 * 50 / 1200)
    assert GATED.floors(trained, "dx").dense == pytest.approx(2 * 6 * 50 / 1200)
    pemt = PEMTCase("c", "fp32", 1, 30, 20, experts=2, rank=3, bottleneck=5)
    assert PEMT.floors(pemt, "forward").dense == pytest.approx((6 * 50 + 2 * 5 * 20) / 600)
    loss = 2 * 6 * (20 + 3)
    want = (2 * 6 * 50 + 6 * 5 * 20 + loss) / 1200
    assert PEMT.floors(pemt, "train").dense == pytest.approx(want)
    want = (2 * 6 * 50 + 4 * 5 * 20 + loss) / 1200
    assert PEMT.floors(pemt, "dx").dense == pytest.approx(want)
    grid = MoR1ECase("c", "fp32", 1, 30, 20, rank_down=2, rank_up=3)
    work = 30 * (2 + 6) + 20 * 3
    for direction, want in (("forward", work / 600), ("dx", 2 * work / 1200)):
        assert MOR1E.floors(grid, direction).dense == pytest.approx(want)
    assert MOR1E.floors(grid, "train").dense == pytest.approx(3 * work / 1200)
    skills = OrchMoECase("c", "fp32", 256, 30, 20, skills=4, rank=3, combine="average")
    # Of 128 tokens each merges four factors once.
    dense, sparse = 256 * 4 * 3 * 50, (256 + 2 * 4) * 3 * 50
    base = 256 * 30 * 20
    assert ORCHMOE.floors(skills, "forward") == pytest.approx((dense / base, sparse / base))
    assert ORCHMOE.floors(skills, "dx") == pytest.approx((dense / base, sparse / base))
    assert ORCHMOE.floors(skills, "train").dense == pytest.approx(3 * dense / (2 * base))


def test_a_step_needs_ten_times_less_memory_than_the_authors_form():
    """At E = 6, r = 64, N = 768, beside what the frozen linear and the adapter need.

    With more tokens the ratio grows: some scratch is of a fixed number of tokens.
    """
    step, x, dy = PEMT.make_inputs(PEMTCase("c", "fp32", 1024, in_features=64), 0)
    rivals = {v.name: v.build(None, step) for v in PEMT.variants if not v.compiled}
    rivals["neither"] = nn.Sequential(step.base, step.layer.adapter)
    peaks = {}
    for name in ("neither", "expert-loop", "ours"):
        call = runner.Call(rivals[name], x, dy, "train")
        call()
        peaks[name] = Cpu().peak_bytes(call)
    extra = {name: peaks[name] - peaks["neither"] for name in ("expert-loop", "ours")}
    assert extra["ours"] > 1024 * 6 * 64 * 4  # the hidden of every expert
    assert extra["expert-loop"] >= 10 * extra["ours"]


@pytest.mark.parametrize("direction", ("forward", "train"))
@pytest.mark.parametrize("dtype", ("bf16", "fp32"))
def test_the_benchmarks_variants_compute_the_same(dtype, direction):
    case = MoLECase("tiny", dtype, tokens=64, in_features=96, out_features=80, experts=4, rank=6)
    ready = runner.prepare(METHODS["mole"], case, direction, runner.Settings(compile=False))
    assert {"base", "stacked", "eager", "ours"} <= ready.layers.keys()


def test_the_benchmarks_arithmetic():
    case = MoLECase("floor", "fp32", 1024, 2048, 2048)
    method = METHODS["mole"]
    assert method.floors(case, "forward").dense == 128 / 1024
    # Frozen experts: as much again in backward as the base has, and P with its gradient.
    assert method.floors(case, "train").dense == 128 / 1024 + 128 * 8 / (1024 * 2048)
    assert {c.experts * c.rank for c in method.cases} == {128, 24}
    assert {c.tokens for c in method.cases} == {1, 8, 64, 512, 1024}
    with pytest.raises(ValueError, match="rank: wanted at least 1, got 0"):
        MoLECase("bad", "fp32", 1, 1, 1, rank=0)


def test_the_baselines_refuse_what_they_do_not_compute():
    with pytest.raises(ValueError, match="l2 gates per token only"):
        StackedMoLELinear.of(make_layer(normalization="none"))
