"""What a launch asked of the machine: global memory traffic, tensor-core operations,
instructions.
"""

from dataclasses import dataclass, field

import numpy as np

SECTOR = 32  # bytes: the unit in which L2 and device memory move data


@dataclass
class Flow:
    """Global memory traffic in one direction."""

    # Asked for by active threads.
    bytes: int = 0
    # 32-byte sectors, distinct within each warp instruction: what L2 and multiprocessors exchange.
    sectors: int = 0
    # Distinct within the launch: what device memory must deliver or take at least once.
    distinct_sectors: int = 0
    # Of warps.
    instructions: int = 0
    # Of `bytes`, what threads of a block asked for at one instruction after another one of them.
    repeated: int = 0

    def __add__(self, other: "Flow") -> "Flow":
        return Flow(
            self.bytes + other.bytes,
            self.sectors + other.sectors,
            self.distinct_sectors + other.distinct_sectors,
            self.instructions + other.instructions,
            self.repeated + other.repeated,
        )

    @property
    def fetched(self) -> int:
        """Bytes that a multiprocessor asks L2 for if its own cache serves what is repeated."""
        return self.bytes - self.repeated

    @property
    def sector_bytes(self) -> int:
        return SECTOR * self.sectors

    @property
    def distinct_bytes(self) -> int:
        return SECTOR * self.distinct_sectors


@dataclass
class Traffic:
    """Of one buffer."""

    loads: Flow = field(default_factory=Flow)
    stores: Flow = field(default_factory=Flow)


class FlowCounter:
    """Counts accesses to one buffer in one direction."""

    def __init__(self, address: int, size: int):
        self.flow = Flow()
        self._address, self._size = address, size
        self._first = address // SECTOR
        self._seen = np.zeros((address + size - 1) // SECTOR - self._first + 1, np.bool_)

    def add(self, warps: np.ndarray, addresses: np.ndarray, size: int, block: int) -> None:
        """Accesses of `size` bytes (16 at most), aligned to `size`, by these warps (ascending).

        warps, addresses: int64 [accesses].  block: how many warps a block has.
        """
        flow = self.flow
        flow.bytes += size * len(addresses)
        sectors = addresses // SECTOR - self._first
        self._seen[sectors] = True
        per_warp = _count_distinct(warps * (len(self._seen) + 1) + sectors)
        per_block = _count_distinct(warps // block * self._size + addresses - self._address)
        flow.sectors += per_warp
        flow.repeated += size * (len(addresses) - per_block)
        flow.instructions += int(np.count_nonzero(np.diff(warps))) + 1

    def result(self) -> Flow:
        self.flow.distinct_sectors = int(np.count_nonzero(self._seen))
        return self.flow


def _count_distinct(keys: np.ndarray) -> int:
    steps = np.diff(keys)
    if len(steps) and steps.min() < 0:
        steps = np.diff(np.sort(keys))
    return int(np.count_nonzero(steps)) + 1


@dataclass
class Counts:
    """Of one launch."""

    traffic: dict[str, Traffic]  # by buffer
    tensor_flops: dict[str, int]  # "mma" and "wgmma": two per multiply-add
    instructions: dict[str, int]  # warp instructions by PTX name
    executed: list[int]  # warp instructions by position in the kernel

    @property
    def warp_instructions(self) -> int:
        return sum(self.executed)

    @property
    def loads(self) -> Flow:
        return sum((t.loads for t in self.traffic.values()), Flow())

    @property
    def stores(self) -> Flow:
        return sum((t.stores for t in self.traffic.values()), Flow())
