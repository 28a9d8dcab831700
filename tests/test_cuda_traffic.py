"""What the CUDA kernels move: formulas against what is executed, and figures against budgets."""

import functools
from pathlib import Path

import pytest
from cuda_gpu import needs_nvcc
from traffic import FEW, RAGGED, SOME, SPLIT, WHOLE, assert_as_executed, case_name, check_grouped

from tools.gpu_emulator.cuda_runtime import arguments
from tools.gpu_traffic import model, report
from tools.gpu_traffic.accounts import cuda
from tools.gpu_traffic.cases import METHODS, Call, Size, usual
from tools.gpu_traffic.recording import record_cuda

pytestmark = needs_nvcc

PAGE = Path(__file__).parents[1] / "docs" / "gpu_traffic.md"
MANY = 132
# Warps of whole rounds: what the gate's tables are read for a last one is not quite what it is.
RAGGED = RAGGED._replace(T=72)
EXECUTED = [
    (Call("topk", WHOLE), FEW, 90),
    (Call("topk", SPLIT, dropout=0.3), SOME, 80),
    (Call("topk", Size(70, 264, 136, 12)), MANY, 90),
    *(
        (Call("topk", Size(140, 72, 136, 20)), FEW, arch) for arch in (80, 90)
    ),  # several tiles of rows
    (Call("topk", Size(768, 64, 512, 4, 4), bias=True), FEW, 90),  # blocks of four strips
    (Call("topk", Size(200, 264, 136, 12), strategy="grouped"), SOME, 80),
    *((Call(m, Size(12, 264, 136), train=""), MANY, 80) for m in METHODS if m != "topk"),
    *((Call("topk", Size(T, 264, 328), train=""), MANY, 90) for T in (1, 32)),
    *((Call(method, RAGGED, bias=True), FEW, 90) for method in METHODS),
    (Call("averaged", Size(130, 64, 48, 8, 8), train="x"), MANY, 80),
]


@pytest.mark.parametrize("call, multiprocessors, arch", EXECUTED, ids=case_name)
def test_formulas_equal_what_is_executed(cuda_library, call, multiprocessors, arch):
    recording = record_cuda(cuda_library, call, arch, True, multiprocessors)
    assert_as_executed(recording, call, cuda.account)


@pytest.fixture(scope="module")
def figures(cuda_library):
    """figures(call): of each operator."""

    @functools.cache
    def figures(call):
        operators = record_cuda(cuda_library, call).operators
        return {
            o.name: report.figures(o, [cuda.account(launch) for launch in o.launches])
            for o in operators
        }

    return figures


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("direction", ("forward", "backward"))
def test_budgets(figures, method, direction):
    operator = METHODS[method].operator or method
    f = figures(usual(method, report.LARGE))[f"{operator}_{direction}"]
    assert f.launches <= report.MOST_LAUNCHES[direction]
    assert f.distinct <= report.MOST_DISTINCT * f.least
    if method != "output_gate":  # has twice the rows
        assert f.moved <= report.MOST_MOVED * f.least


def test_grouped_moves_less_for_many_experts(figures):
    check_grouped(figures)


def test_a_launch_is_known_by_its_declaration(cuda_library):
    launch = record_cuda(cuda_library, usual("topk", 64, 128, 256, train="")).operators[0].launches
    shrink, mix, expand = (one.given for one in launch)
    assert (shrink.element, shrink.flags, shrink.values["finish"]) == (2, (False,), None)
    assert (mix.element, mix.values["T"], mix.values["mix"].k) == (2, 64, 2)
    p = expand.values["p"]
    assert (p.T, p.columns, p.rows.R, p.rows.r, p.statistics.E) == (64, 256, 64, 8, 8)
    assert p.h == mix.values["mix"].mixed and p.bias is None and p.batch.count == 1
    with pytest.raises(TypeError, match="expand_kernel: p has 215 bytes"):
        launch = launch[2]
        arguments.read(launch.name, launch.symbol, [launch.parameters[0][:-1]])


def test_a_kernel_without_a_row_is_an_error(cuda_library):
    launch = record_cuda(cuda_library, usual("topk", 8, 64, 64, train="")).operators[0].launches[0]
    assert cuda.account(launch).flops
    launch.name = "another"
    with pytest.raises(KeyError, match="another"):
        cuda.account(launch)


@pytest.mark.parametrize("method", METHODS)
def test_few_tokens(cuda_library, method):
    """Two launches, whose blocks take in less than what a third launch would cost."""
    (operator,) = record_cuda(cuda_library, usual(method, 32, train="")).operators
    assert len(operator.launches) == report.MOST_LAUNCHES["decode"]
    for launch in operator.launches:
        a = cuda.account(launch)
        assert a.loads.moved / a.blocks / model.INGEST < model.LAUNCH


def test_the_page_is_up_to_date(cuda_library):
    """As far as topk goes; `make gpu-traffic` writes all of it."""
    call, text = usual("topk", report.LARGE), PAGE.read_text()
    for row in report.operator_rows(call, {"CUDA": record_cuda(cuda_library, call)}):
        (line,) = (s for s in text.splitlines() if s.startswith(f"| {row[0]} | {row[1]} |"))
        assert line.endswith(f"| {' | '.join(row[-5:])} |")
