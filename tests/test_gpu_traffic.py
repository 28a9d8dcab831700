"""What the GPU kernels move: formulas against what is executed, and figures against budgets."""

import functools
from pathlib import Path

import pytest
from traffic import FEW, RAGGED, SOME, SPLIT, WHOLE, assert_as_executed, case_name, check_grouped
from triton_gpu import WHY_MISSING

if WHY_MISSING:
    pytest.skip(WHY_MISSING, allow_module_level=True)

from moelora_ops.backends.triton import tiles
from tools.gpu_traffic import model, report
from tools.gpu_traffic.accounts.triton import account
from tools.gpu_traffic.cases import METHODS, Call, Size, usual
from tools.gpu_traffic.recording import record_triton

PAGE = Path(__file__).parents[1] / "docs" / "gpu_traffic.md"

EXECUTED = [
    (Call("topk", WHOLE), FEW, 90),
    (Call("topk", SPLIT, dropout=0.3), SOME, 90),
    (Call("topk", SPLIT), SOME, 80),
    (Call("topk", RAGGED, bias=True, strategy="grouped"), FEW, 90),
    (Call("topk", Size(200, 264, 328, 12), strategy="grouped"), SOME, 80),
    *((Call(method, SPLIT), SOME, 90) for method in METHODS),
    *((Call(method, RAGGED, bias=True), FEW, 90) for method in METHODS),
]


@pytest.mark.parametrize("call, multiprocessors, arch", EXECUTED, ids=case_name)
def test_formulas_equal_what_is_executed(call, multiprocessors, arch):
    recording = record_triton(call, arch=arch, execute=True, multiprocessors=multiprocessors)
    # A masked tile's narrow products are too small for all warps, which repeat some.
    assert_as_executed(recording, call, account, 1.5 if call.dropout else 1)
    for operator in recording.operators:
        direction = operator.name.rpartition("_")[2]
        path = "grouped_" if call.strategy == "grouped" else ""
        assert len(operator.launches) <= report.MOST_LAUNCHES[path + direction]


@functools.cache
def figures(call):
    recording = record_triton(call)
    return {
        o.name: report.figures(o, [account(launch) for launch in o.launches])
        for o in recording.operators
    }


@pytest.mark.parametrize(
    "direction, train", [("forward", "all"), ("backward", "all"), ("backward", "x")]
)
def test_budgets(direction, train):
    f = figures(usual("topk", report.LARGE, train=train))[f"topk_{direction}"]
    assert f.launches <= report.MOST_LAUNCHES[direction]
    assert f.moved <= report.MOST_MOVED * f.least
    assert f.distinct <= report.MOST_DISTINCT * f.least


@pytest.mark.parametrize("method, tokens", [("topk", 1), *((method, 32) for method in METHODS)])
def test_few_tokens(method, tokens):
    """Two launches, whose blocks take in less than what a third launch would cost."""
    call = usual(method, tokens, train="")
    (operator,) = record_triton(call).operators
    assert operator.torch_kernels == []
    assert len(operator.launches) == report.MOST_LAUNCHES["decode"]
    for launch in operator.launches:
        a = account(launch)
        assert a.loads.moved / a.blocks / model.INGEST < model.LAUNCH


def test_grouped_moves_less_for_many_experts():
    check_grouped(figures)


def test_the_least_by_hand():
    """x, dy and dx, weights, what is saved; y only written, and dy twice if weights are trained."""
    T, K, N, R, E = 8192, 4096, 4096, 64, 8
    saved = 4 * T * (R + E + 1)
    forward = 2 * T * K + 2 * R * (K + N) + 2 * E * K + 2 * T * N + saved + 8 * E + 4 * E
    frozen = 2 * T * N + 2 * R * (K + N) + 2 * E * K + saved + 2 * T * K
    trained = frozen + 2 * T * N + 2 * T * K + 2 * R * (K + N) + 2 * E * K
    for train, backward in (("all", trained), ("x", frozen)):
        of = figures(usual("topk", T, train=train))
        assert of["topk_forward"].least == forward
        assert of["topk_backward"].least == backward


def test_another_tile_is_another_figure(monkeypatch):
    """A block that walks half as far reads its columns of the experts twice as often."""
    call = usual("topk", 256, 256, 256, train="")

    def loads():
        (launch,) = (r for r in record_triton(call)["topk_forward"].launches if "expand" in r.name)
        return account(launch).loads.moved

    before, chosen = loads(), tiles.expand
    walk = chosen(256, 256, 64, 2, tiles.Arch("cuda", "sm_90", 132)).walk
    monkeypatch.setattr(tiles, "expand", lambda *a: chosen(*a)._replace(walk=walk // 2))
    assert loads() - before == 256 // walk * 64 * 256 * 2


def test_a_kernel_without_a_row_is_an_error():
    (launch,) = record_triton(usual("topk", 8, 64, 64, train=""))["topk_forward"].launches[:1]
    launch.name = "another"
    with pytest.raises(KeyError, match="another"):
        account(launch)


def test_the_model_takes_the_slowest_resource():
    launch = record_triton(usual("topk", 8192, train=""))["topk_forward"].launches[0]
    a = account(launch)
    assert a.blocks == 128
    fast, slow = model.seconds(a)
    assert fast == a.distinct / 4.3e12 and slow == a.moved / 5.5e12 > fast
    a.flops = 790e12
    assert model.seconds(a) == (132 / 128, 132 / 128)
    assert model.gemm_seconds(8192, 4096, 4096) == 2 * 8192 * 4096**2 / 790e12 + model.LAUNCH


def test_the_page_is_up_to_date():
    """As far as topk goes; `make gpu-traffic` writes all of it."""
    call, text = usual("topk", report.LARGE), PAGE.read_text()
    for row in report.operator_rows(call, {"Triton": record_triton(call)}):
        assert f"| {' | '.join(row[:7])} |" in text
