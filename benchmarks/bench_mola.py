"""The cases of ``python -m moelora_ops.bench mola`` under pytest-benchmark.

    pytest benchmarks/bench_mola.py -k "t1024 and bf16" --benchmark-autosave

Here the variants of a case run one after the other; the command interleaves them, so overheads are
taken there.
"""

import functools

import pytest

from moelora_ops.bench.mola import MOLA
from moelora_ops.bench.numerics import NumericsError
from moelora_ops.bench.runner import BASE, Call, Settings, prepare

CASES = [(case, direction) for case in MOLA.cases for direction in case.directions]


# Memory for one case at a time; the variants of a case are neighbours in the order of the tests.
@functools.lru_cache(maxsize=1)
def _ready(case, direction):
    try:
        return prepare(MOLA, case, direction, Settings())
    except NumericsError as error:
        return error


@pytest.mark.parametrize("variant", [BASE, *(variant.name for variant in MOLA.variants)])
@pytest.mark.parametrize(
    ("case", "direction"), CASES, ids=[f"{c.name}-{c.dtype}-{d}" for c, d in CASES]
)
def test_time(benchmark, case, direction, variant):
    ready = _ready(case, direction)
    if isinstance(ready, NumericsError):
        pytest.fail(f"no figures from wrong numerics: {ready}")
    if variant not in ready.layers:
        pytest.skip(ready.skipped.get(variant, "the same as another variant in this dtype"))
    benchmark.group = f"{case.name} {case.dtype} {direction}: {case}"
    call = Call(ready.layers[variant], ready.x, ready.dy, direction)
    call()
    benchmark(call)
