"""Measures tiles of the Triton products on this GPU, and writes those that beat the rules.

    python benchmarks/tune_tiles.py           # into moelora_ops/backends/triton/tuned.py
    python benchmarks/tune_tiles.py --list    # what would be measured

For every product and size it varies one value at a time from the rule's tile and goes on from the
best.  A tile that gives other bits than the rule's where it must not, errs more, or asks for more
than a block can have is passed over.  Entries of other architectures stay in the table.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # these sources, whatever is installed

from triton.runtime.errors import OutOfResources  # noqa: E402

from benchmarks import table_module  # noqa: E402
from moelora_ops import ops  # noqa: E402
from moelora_ops.backends.triton import launch, tiles, tuned  # noqa: E402
from moelora_ops.bench import devices  # noqa: E402
from moelora_ops.bench.method import LLAMA_7B, generator  # noqa: E402

# What may be tried beside the rule's own values.
VALUES = {
    "shrink": {"BT": (64, 128), "warps": (4, 8), "stages": (2, 3, 4, 5)},
    "expand": {"BT": (64, 128), "BN": (64, 128, 256), "warps": (4, 8), "stages": (1, 2, 3)},
    "outer": {"BT": (32, 64), "warps": (4, 8), "stages": (2, 3, 4)},
}
TOKENS = (512, 2048, 8192)
ROWS = (32, 64, 128)
ROUNDS = 15
WORTH = 0.97  # of the rule's time; less is noise

Clock = Callable[[Callable[[], object]], float]


class Size(NamedTuple):
    """A product: ``[tokens, features]`` and rows of the experts.

    Attributes:
        product: "shrink", "expand" or "outer".
    """

    product: str
    tokens: int
    features: int
    rows: int
    dtype: torch.dtype

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.product} T={self.tokens} features={self.features} R={self.rows} {dtype}"

    def key(self) -> tiles.Key:
        """Of this GPU in the table."""
        sizes = (self.dtype.itemsize, self.tokens, self.features, self.rows)
        return tiles.key(launch.arch(), self.product, *sizes)

    def rule(self) -> dict[str, int]:
        """The tile without the table."""
        sizes = (self.tokens, self.features, self.rows)
        columns_b = (0,) if self.product == "shrink" else ()
        with mock.patch.dict(tiles.TABLE, clear=True):
            tile = getattr(tiles, self.product)(
                *sizes, *columns_b, self.dtype.itemsize, launch.arch()
            )
        return {name: getattr(tile, name) for name in VALUES[self.product]}


def sizes() -> Iterator[Size]:
    """What is measured; the outer products of both sides of a layer run at once."""
    linears = set(LLAMA_7B.values())
    features = {
        "shrink": {n for linear in linears for n in linear},
        "expand": {n for linear in linears for n in linear},
        "outer": {sum(linear) for linear in linears},
    }
    for dtype in (torch.bfloat16, torch.float32):
        for product in VALUES:
            for n in sorted(features[product]):
                yield from (Size(product, T, n, R, dtype) for T in TOKENS for R in ROWS)


def call_of(size: Size, device: str) -> Callable[[], Tensor]:
    """A function that runs the product on random numbers and returns its result."""
    triton_ops = ops.of("triton")
    with torch.device(device):
        g = generator(0)
        wide = torch.randn(size.tokens, size.features, generator=g).to(size.dtype)
        rows = torch.randn(size.rows, size.features, generator=g).to(size.dtype)
        hidden = torch.randn(size.tokens, size.rows, generator=g)

    def expand() -> Tensor:
        triton_ops.expand(hidden, rows, wide, False)
        return wide

    return {
        "shrink": lambda: triton_ops.shrink(wide, rows),
        "expand": expand,
        "outer": lambda: triton_ops.outer(hidden, wide),
    }[size.product]


def is_right(size: Size, got: Tensor, want: Tensor) -> bool:
    """Whether a tile's result may stand for the rule's: to the bit, where that is promised."""
    if size.product != "outer":
        return torch.equal(got, want)
    error = (got.double() - want.double()).norm() / want.double().norm()
    return bool(error <= 4 * torch.finfo(size.dtype).eps)


def compete(
    size: Size, call: Callable[[], Tensor], tile: dict[str, int], other: dict[str, int],
    want: Tensor, clock: Clock,
) -> float:  # fmt: skip
    """Time of `other` over that of `tile`, the median of interleaved rounds; inf if it is wrong."""
    with mock.patch.dict(tiles.TABLE, {size.key(): other}):
        try:
            if not is_right(size, call().clone(), want):
                return float("inf")
        except OutOfResources:
            return float("inf")
    ratios = []
    for _ in range(ROUNDS):
        seconds = []
        for values in (tile, other):
            with mock.patch.dict(tiles.TABLE, {size.key(): values}):
                seconds.append(clock(call))
        ratios.append(seconds[1] / seconds[0])
    return statistics.median(ratios)


def tune(size: Size, clock: Clock, device: str = "cuda") -> dict[str, int]:
    """The values that beat the rule's, or nothing."""
    rule = best = size.rule()
    call = call_of(size, device)
    with mock.patch.dict(tiles.TABLE, {size.key(): rule}):
        want = call().clone()
    for name, values in VALUES[size.product].items():
        ratios = {
            value: compete(size, call, best, best | {name: value}, want, clock)
            for value in values
            if value != best[name]
        }
        if ratios and min(ratios.values()) < WORTH:
            best = best | {name: min(ratios, key=ratios.__getitem__)}
    return {name: value for name, value in best.items() if value != rule[name]}


def write(path: Path, table: dict[tiles.Key, dict[str, int]], gpu: str) -> None:
    """The module ``tuned`` with these entries."""
    table_module.write(
        path, "Tiles that were measured to be faster than the rules.",
        "``tiles.key`` -> values instead of the rule's.",
        "dict[tuple[str, str, int, int, int, int], dict[str, int]]", table,
        f"``benchmarks/tune_tiles.py`` writes this; last on {gpu}.",
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """0: measured, or listed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="print what is measured and stop")
    parser.add_argument("--product", nargs="+", choices=list(VALUES), default=list(VALUES))
    parser.add_argument("--out", type=Path, metavar="FILE", default=Path(tuned.__file__))
    arguments = parser.parse_args(argv)
    chosen = [size for size in sizes() if size.product in arguments.product]
    if arguments.list:
        print(*chosen, sep="\n")
        return 0
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here: --list shows what would be measured")
    clock, table = devices.device("cuda").sample, dict(tiles.TABLE)
    for size in chosen:
        values = tune(size, clock)
        table.pop(size.key(), None)
        if values:
            table[size.key()] = values
        print(f"{size}: {values or 'the rule'}", flush=True)
        write(arguments.out, table, torch.cuda.get_device_name())  # what is done is kept
    return 0


if __name__ == "__main__":
    sys.exit(main())
