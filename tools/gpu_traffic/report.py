"""docs/gpu_traffic.md: what operators and their kernels move, side by side for each back end."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

from moelora_ops.backends import strategy
from tools.gpu_emulator import cuda_runtime

from . import model
from .accounts import Account, cuda, triton
from .cases import METHODS, Call, usual
from .recording import Operator, Recording, record_cuda, record_triton

# What a launch of each back end moves.
ACCOUNTS: dict[str, Callable[[Any], Account]] = {"Triton": triton.account, "CUDA": cuda.account}

# What is wanted at T = LARGE, over the least; and launches in each direction and for few tokens.
MOST_DISTINCT, MOST_MOVED = 1.1, 1.7
MOST_LAUNCHES = {"forward": 3, "backward": 5, "decode": 2}
# Of a grouped topk, which has one for each of its two choices in either direction.
MOST_LAUNCHES |= {"grouped_forward": 6, "grouped_backward": 8}

LARGE = 8192
CALLS = (
    *(usual(method, LARGE) for method in METHODS),
    usual("topk", LARGE, train="x"),
    usual("topk", LARGE, dropout=0.05),
    usual("topk", 2048),
    usual("topk", 2 * LARGE),
    *(usual("topk", LARGE, E=64, r=16, strategy=s) for s in ("stacked", "grouped")),
    *(usual(method, T, train="") for method in METHODS for T in (1, 32)),
)


class Figures(NamedTuple):
    """An operator's launches together, in bytes and seconds.

    Attributes:
        least: see :func:`recording.least_bytes`.
        seconds: of the model, without what every launch costs.
    """

    launches: int
    least: int
    moved: int
    distinct: int
    flops: int
    seconds: tuple[float, float]


def figures(operator: Operator, accounts: list[Account]) -> Figures:
    times = [model.seconds(a) for a in accounts]
    return Figures(
        launches=len(operator.launches) + len(operator.torch_kernels),
        least=operator.least,
        moved=sum(a.moved for a in accounts),
        distinct=sum(a.distinct for a in accounts),
        flops=sum(a.flops for a in accounts),
        seconds=(sum(fast for fast, _ in times), sum(slow for _, slow in times)),
    )


def has(backend: str, call: Call) -> bool:
    """Whether a back end has the path that `call` names."""
    return call.strategy in ("auto", *strategy.PATHS[backend.lower()])


def record_all(library: cuda_runtime.Library) -> dict[Call, dict[str, Recording]]:
    """`CALLS` on every back end that has their path, by its name."""
    recorders = {"Triton": record_triton, "CUDA": partial(record_cuda, library)}
    return {
        call: {name: record(call) for name, record in recorders.items() if has(name, call)}
        for call in CALLS
    }


INTRODUCTION = """\
# Traffic of the GPU kernels

What every operator of the GPU back ends moves, counted without a GPU.  `make gpu-traffic` writes
this page.

* **least**: the operator's arguments read once and its results written once.  Where parameters are
  trained dy counts twice, for dx and for the gradient of `lora_up`.
* **moved**: bytes that multiprocessors load and store, over the least.  Every tile of tokens reads
  the experts' rows again, mostly from L2.  Wanted: at most {moved} for topk at T = {large}.
  Few tokens trade bytes for a launch: each block of their second one adds all partial sums.
* **distinct**: bytes that each launch touches, summed over launches, over the least: what device
  memory serves if nothing stays in L2 between launches.  Wanted: at most {distinct} there.
* **launches**: kernels of ours and of PyTorch inside the operator, so without the base GEMM.
  Wanted: at most {forward} forward, {backward} backward, {decode} for a handful of tokens; of a
  grouped topk of two choices, {grouped_forward} and {grouped_backward}.

The launches are those that the package itself makes for these shapes on an H200 (sm_90).  What each
of them moves is a formula over its arguments (`tools/gpu_traffic/accounts`), which
`tests/test_gpu_traffic.py` and `tests/test_cuda_traffic.py` hold against what the
[emulator](gpu_emulator.md) counts on small shapes: loads, stores and tensor-core operations, to the
byte.  With dropout Triton's tiles have fewer tokens (`MASKED_ROWS` in
`moelora_ops/backends/triton/tiles.py` says why).  Grouped, all pairs of an expert and a choice have
as many tokens.  Merged is averaged with weights per sequence, of which there are four.  A dash: the
back end has no such path.

**The model is not a time, and nothing here was timed.**  It is arithmetic on assumed rates of one
H200: for each launch the slowest of device memory ({memory:.1f} TB/s), L2 ({l2} TB/s), what one
multiprocessor takes in ({ingest:.0f} GB/s) and tensor cores ({tensor:.0f} TFLOP/s); and
{launch:.0f} µs to start and to drain.  Beside it stands the same model of the frozen linear.
"""


def _microseconds(seconds: tuple[float, float]) -> str:
    low, high = (f"{1e6 * s:.0f}" if s > 0.5e-6 else "<1" for s in seconds)
    return low if low == high else f"{low}-{high}"


def _table(header: str, rows: Iterable[Iterable[Any]]) -> str:
    columns = [c.strip() for c in header.split("|")]
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def call_name(call: Call) -> str:
    s = call.size
    shape = f"T={s.T} K={s.K} N={s.N} E={s.E} r={s.r}"
    return shape + (f" k={s.k}" if "top_k" in METHODS[call.method].options(s) else "")


def operator_name(call: Call, operator: Operator) -> str:
    frozen = call.train == "x" and operator.name.endswith("_backward")
    strategy = "" if call.strategy == "auto" else f", {call.strategy}"
    strategy += ", merged" * (call.method == "merged")
    return f"{operator.name}{', frozen' * frozen}{', dropout' * bool(call.dropout)}{strategy}"


def operator_rows(call: Call, recordings: Mapping[str, Recording]) -> list[list[str]]:
    """Rows of the first table: operators of `call`, and of each back end's recording of it."""
    rows = []
    for i, operator in enumerate(next(iter(recordings.values())).operators):
        if call.train == "x" and not operator.name.endswith("_backward"):
            continue
        row = [operator_name(call, operator), call_name(call), f"{operator.least / 1e6:.1f}"]
        gemm = model.gemm_seconds(call.size.T, call.size.K, call.size.N)
        for name, account in ACCOUNTS.items():
            if name not in recordings:
                row += ["-"] * 4
                continue
            found = recordings[name].operators[i]
            f = figures(found, [account(launch) for launch in found.launches])
            start = f.launches * model.LAUNCH
            row += [
                f"{f.launches}",
                f"{f.moved / f.least:.2f}",
                f"{f.distinct / f.least:.2f}",
                _microseconds(tuple(s + start for s in f.seconds)),
            ]
        rows.append([*row, _microseconds((gemm, gemm))])
    return rows


def kernel_rows(recording: Recording, account: Callable[[Any], Account]) -> list[list[str]]:
    """Rows of a back end's own table: every launch of a call."""
    rows = []
    for operator in recording.operators:
        for launch in operator.launches:
            a = account(launch)
            rows.append(
                [
                    operator.name,
                    a.name,
                    f"{a.blocks} x {launch.threads}",
                    f"{a.loads.moved / 1e6:.1f}",
                    f"{a.stores.moved / 1e6:.1f}",
                    f"{a.distinct / 1e6:.1f}",
                    f"{a.flops / 1e9:.1f}",
                    _microseconds(model.seconds(a)),
                ]
            )
    return rows


def write(recordings: dict[Call, dict[str, Recording]]) -> str:
    """The page.

    Args:
        recordings: of `CALLS`, by the name of a back end.
    """
    text = INTRODUCTION.format(
        moved=MOST_MOVED, distinct=MOST_DISTINCT, large=LARGE, **MOST_LAUNCHES,
        memory=model.DEVICE_MEMORY / 1e12, l2="-".join(f"{r / 1e12:g}" for r in sorted(model.L2)),
        ingest=model.INGEST / 1e9, tensor=model.TENSOR_CORES / 1e12, launch=model.LAUNCH * 1e6,
    )  # fmt: skip
    header = "operator | size, bfloat16 | least, MB"
    for name in ACCOUNTS:
        header += f" | {name}: launches | moved | distinct | model, µs"
    rows = [row for call, found in recordings.items() for row in operator_rows(call, found)]
    parts = [text, "## Operators\n", _table(header + " | model of the linear, µs", rows)]
    for name, account in ACCOUNTS.items():
        parts.append(f"\n## Kernels: {name}\n")
        for call, found in recordings.items():
            if name in found and (call == usual(call.method, LARGE) or call.strategy == "grouped"):
                path = ", grouped" if call.strategy == "grouped" else ""
                parts.append(f"{call.method}{path}, {call_name(call)}, bfloat16; MB and GFLOP:\n")
                header = (
                    "operator | kernel | blocks x threads | loads | stores | distinct"
                    " | tensor cores | model, µs, without the start"
                )
                parts.append(_table(header, kernel_rows(found[name], account)) + "\n")
    return "\n".join(parts).rstrip() + "\n"
