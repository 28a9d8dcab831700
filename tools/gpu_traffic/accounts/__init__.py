"""What a kernel moves, by formula: `triton` and `cuda` have a row for each of a back end's kernels.

A formula sees what a launch was given and nothing else, so that another tile is another figure.  It
names every tensor, how many of its elements are touched, and how many times each.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any


@dataclass
class Flow:
    """Bytes in one direction: those touched, and those that multiprocessors move."""

    distinct: int = 0
    moved: int = 0

    def add(self, touched: int, times: int | Fraction = 1) -> None:
        self.distinct += touched
        self.moved += int(touched * times)


class Account:
    """The account of a launch, whose arguments are its attributes.

    Attributes:
        launch: the record.
        arguments: by name.
        grid: blocks in each direction.
        loads, stores: of all tensors.
        flops: of tensor cores, padding included; two per multiply-add.
    """

    def __init__(self, launch: Any, arguments: dict[str, Any]):
        self.launch, self.arguments, self.grid = launch, arguments, launch.grid
        self.loads, self.stores, self.flops = Flow(), Flow(), 0

    def __getattr__(self, name: str) -> Any:
        return self.arguments[name]

    @property
    def name(self) -> str:
        """Of the kernel."""
        return self.launch.name

    @property
    def blocks(self) -> int:
        x, y, z = self.grid
        return x * y * z

    @property
    def distinct(self) -> int:
        """What device memory gives and takes at least."""
        return self.loads.distinct + self.stores.distinct

    @property
    def moved(self) -> int:
        """What multiprocessors load and store."""
        return self.loads.moved + self.stores.moved
