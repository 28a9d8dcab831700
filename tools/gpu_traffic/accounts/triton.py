"""What each Triton kernel moves: one row of `KERNELS` per kernel."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from moelora_ops.backends.triton.tiles import cdiv
from tools.gpu_emulator.triton_driver import LaunchRecord
from tools.gpu_traffic import accounts

# Terms that tl.dot multiplies for each product of two numbers.
_TERMS = {"ieee": 1, "tf32": 1, "bf16x6": 6}


class Account(accounts.Account):
    """Of a Triton kernel."""

    def load(self, tensor, elements: int, times: int | Fraction = 1) -> None:
        """`elements` of a tensor are read, so many times on average; of None nothing is."""
        if tensor is not None:
            self.loads.add(elements * tensor.element_size(), times)

    def store(self, tensor, elements: int) -> None:
        """`elements` of a tensor are written, each once; of None nothing is."""
        if tensor is not None:
            self.stores.add(elements * tensor.element_size())

    def dot(self, rows: int, columns: int, inner: int) -> None:
        """A product of matrices on tensor cores."""
        self.flops += 2 * rows * columns * inner * _TERMS[self.PRECISION]


def account(launch: LaunchRecord) -> Account:
    """What `launch` moves.

    Raises:
        KeyError: the kernel has no row.
    """
    result = Account(launch, launch.arguments)
    KERNELS[launch.build.module, launch.name](result)
    return result


# ---------------------------------------------------------------- products


def shrink(k: Account, wide, features: int, *rows: tuple[Any, int, int], segments: int = 1) -> None:
    """``wide [T, segments * features]`` times blocks of rows, up to (tensor, rows, BA) each."""
    tiles, columns, parts = k.grid
    span = k.SPAN if parts > 1 else features
    steps = sum(cdiv(min(span, features - part * span), k.BK) for part in range(parts))
    k.load(wide, k.T * segments * features, columns // segments)
    k.load(k.seed, 1, k.blocks)
    for tensor, count, width in rows:
        if tensor is not None:
            k.load(tensor, count * segments * features, tiles)
            k.dot(tiles * k.BT, columns * width, steps * k.BK)


def _shrink_parts(k: Account) -> None:
    R, parts = k.GROUPS * k.ROWS, k.grid[2]
    shrink(k, k.x, k.K, (k.a, R, k.BA), (k.b, k.ROWS_B, k.BB), segments=k.SPLITS)
    k.store(k.out_a, parts * k.T * k.SPLITS * R)
    k.store(k.out_b, parts * k.T * k.ROWS_B)


def _add_all(k: Account) -> None:
    k.load(k.parts, k.PARTS * k.size)
    k.store(k.out, k.size)


def expand(k: Account, strips: int, segments: int = 1, pairs: Sequence[int] = ()) -> None:
    """``y [T, N]`` from left_a @ a and left_b @ b, whose columns are in `segments`.

    Args:
        pairs: tokens of each expert that has any, if each has an `a` of its own.
    """
    runs = pairs or (k.T,)
    T = sum(runs)
    walks, tiles = (sum(cdiv(run, size) for run in runs) for size in (k.walk, k.BT))
    for left, right, rows, groups, BR, experts in (
        (k.left_a, k.a, k.ROWS, k.GROUPS, k.BR, len(runs)),
        (k.left_b, k.b, k.ROWS_B, 1, k.BRB, 1),
    ):
        if right is not None:
            # Rows that fit one product stay in the block; others are read for each of its tiles.
            kept = groups == 1 and rows <= BR
            k.load(left, T * segments * groups * rows, strips // segments)
            times = Fraction(walks if kept else tiles, experts)
            k.load(right, experts * groups * rows * k.N, times)
            k.dot(tiles * k.BT, strips * k.BN, groups * cdiv(rows, BR) * BR)
    k.load(k.bias, k.N, walks)
    k.load(k.seed, 1, strips * walks)
    if k.ACCUMULATE:
        k.load(k.y, T * k.N)
    k.store(k.y, T * k.N)


def _expand_rows(k: Account) -> None:
    expand(k, k.grid[0], k.SPLITS)


def _outer_side(k: Account, side: str) -> None:
    """``left.T @ wide`` and ``left_b.T @ wide`` of one side, in parts of the tokens."""

    def of_side(name: str) -> Any:
        return getattr(k, name.format(side))

    wide, N, segments = of_side("wide_{}"), of_side("N_{}"), of_side("SPLITS_{}")
    if wide is None:
        return
    strips = segments * cdiv(N // segments, of_side("BN_{}"))
    chunks = of_side("blocks_{}") // strips
    rows = of_side("ROWS_{}") * chunks // cdiv(of_side("ROWS_{}"), of_side("BA_{}"))
    if k.order is not None:
        # The chunks of an expert see its pairs alone, those of all experts together all pairs.
        pairs, chunks = k.T * k.TOP_K, cdiv(of_side("ROWS_{}"), of_side("BA_{}"))
        steps = sum(_steps(k, run) for run in experts_pairs(k))
        k.load(wide, k.T * N, k.TOP_K * chunks)
        k.load(of_side("left_{}"), pairs * of_side("ROWS_{}"), strips)
        k.load(k.order, pairs, 2 * strips * chunks)  # for addresses in wide and in left
        k.load(k.starts, 2, of_side("blocks_{}") * k.grid[1])
        k.store(of_side("out_{}"), k.grid[1] * rows * N)
        k.dot(strips * of_side("BN_{}"), chunks * of_side("BA_{}"), steps * k.BT)
        return
    steps = _steps(k, k.T)
    k.load(wide, k.T * N, chunks)
    for left, out, count, width in (
        (of_side("left_{}"), of_side("out_{}"), rows, of_side("BA_{}")),
        (of_side("left_{}b"), of_side("out_{}b"), of_side("ROWS_{}B"), of_side("BB_{}")),
    ):
        if left is not None:
            k.load(left, k.T * segments * count, strips // segments)
            k.store(out, k.grid[1] * count * N)
            k.dot(strips * of_side("BN_{}"), chunks * width, steps * k.BT)


def _steps(k: Account, tokens: int) -> int:
    """Steps of BT in all parts of so many tokens."""
    return sum(cdiv(min(k.span, tokens - begin), k.BT) for begin in range(0, tokens, k.span))


def _outer_parts(k: Account) -> None:
    for side in ("0", "1"):
        _outer_side(k, side)
    k.load(k.seed, 1, k.blocks_1 * k.grid[1])
    for out, values, _, columns, index, _, rows, _ in k.sums:
        k.load(values, k.T * columns)
        k.load(index, k.T, rows * cdiv(columns, k.BN_SUM))
        k.store(out, k.grid[1] * rows * columns)


def _add_gradients(k: Account) -> None:
    k.load(k.parts, k.PARTS * sum(k.sizes))
    for out, size in zip(k.outs, k.sizes, strict=True):
        k.store(out, size)


# ---------------------------------------------------------------- mixes


def as_executed(k: Account) -> None:
    """A kernel for few tokens: what all of its blocks move is executed here."""
    counts = k.launch.execute(k.grid)
    for total, found in ((k.loads, counts.loads), (k.stores, counts.stores)):
        total.moved, total.distinct = found.fetched, found.distinct_bytes
    k.flops = sum(counts.tensor_flops.values())


def by_tiles(k: Account) -> None:
    """A kernel whose blocks have a tile of tokens each, by the grid's first direction.

    They share only what every tile reads.  What one tile moves is executed here; times the tiles,
    it is what all of them move.
    """
    (blocks, *others), (tiles, rest) = k.grid, divmod(k.T, k.BT)
    if blocks <= 2:
        as_executed(k)
        return
    first, second = (k.launch.execute((n, *others)) for n in (1, 2))
    last = k.launch.execute((1, *others), T=rest) if rest else None
    for total, name in ((k.loads, "loads"), (k.stores, "stores")):
        one, two = getattr(first, name), getattr(second, name)
        more = two.distinct_bytes - one.distinct_bytes
        total.moved += tiles * one.fetched
        total.distinct += one.distinct_bytes + (tiles - 1) * more
        if last:
            shared = one.distinct_bytes - more
            total.moved += getattr(last, name).fetched
            total.distinct += getattr(last, name).distinct_bytes - shared
    k.flops += tiles * sum(first.tensor_flops.values())
    k.flops += sum(last.tensor_flops.values()) if last else 0


def _topk_expand(k: Account) -> None:
    expand(k, k.grid[0] - 1)
    k.load(k.tile_counts, k.tiles * k.E)
    k.load(k.tile_sums, k.tiles * k.E)
    k.store(k.counts, k.E)
    k.store(k.prob_sums, k.E)


# ---------------------------------------------------------------- segments


def experts_pairs(k: Account, slot: int | None = None) -> list[int]:
    """Pairs of each expert that has any, of a slot or of all; evenly if nothing was executed."""
    segments, pairs = k.starts.numel() - 1, k.order.numel()
    places = [i * pairs // segments for i in range(segments + 1)]
    if k.launch.counts is not None:
        places = k.starts.tolist()
    begins = range(0 if slot is None else slot, segments, k.TOP_K)
    slots = k.TOP_K if slot is None else 1
    return [n for i in begins if (n := places[i + slots] - places[i])]


def _sort(k: Account) -> None:
    k.load(k.selected, k.T * k.TOP_K)
    k.load(k.tile_counts, k.tiles * k.TOP_K * k.E, k.blocks)
    k.load(k.tile_sums, k.tiles * k.E)
    k.store(k.order, k.T * k.TOP_K)
    k.store(k.starts, k.E * k.TOP_K + 1)
    k.store(k.counts, k.E)
    k.store(k.prob_sums, k.E)


def _shrink_segments(k: Account) -> None:
    runs, pairs, columns = experts_pairs(k), k.order.numel(), k.grid[1]
    tiles = sum(cdiv(run, k.BT) for run in runs)
    k.load(k.starts, 2 * k.E, k.blocks)
    # For addresses in each of x, out, mixed and weights, which threads share out differently.
    k.load(k.order, pairs, columns * (2 if k.mixed is None else 4))
    k.load(k.x, pairs // k.TOP_K * k.K, k.TOP_K * columns)
    k.load(k.a, len(runs) * k.RANK * k.K, Fraction(tiles, len(runs)))
    k.load(k.seed, 1, tiles * columns)
    k.dot(tiles * k.BT, columns * k.BA, cdiv(k.K, k.BK) * k.BK)
    k.store(k.out, pairs * k.RANK)
    if k.mixed is not None:
        k.load(k.weights, pairs, columns)
        k.store(k.mixed, pairs * k.RANK)


def _expand_segments(k: Account) -> None:
    k.load(k.starts, 2 * k.E, k.blocks)
    k.load(k.order, k.T, 2 * k.grid[0])  # for addresses in left_a and in y
    expand(k, k.grid[0], pairs=experts_pairs(k, k.slot))


# ---------------------------------------------------------------- merged factors


def _merge(k: Account) -> None:
    for experts, merged, features in ((k.down, k.merged_down, k.K), (k.up, k.merged_up, k.N)):
        flat = k.RANK * features
        k.load(experts, k.E * flat, cdiv(k.sequences, k.BS))
        k.load(k.weights, k.sequences * k.E, cdiv(flat, k.BF))
        k.store(merged, k.sequences * flat)


def _shrink_sequences(k: Account) -> None:
    tiles, columns, _ = k.grid
    each = cdiv(k.length, k.BT)
    T = tiles // each * k.length
    k.load(k.x, T * k.K, columns)
    k.load(k.merged, tiles // each * k.RANK * k.K, each)
    k.dot(tiles * k.BT, columns * k.BA, cdiv(k.K, k.BK) * k.BK)
    if k.dhidden is None:
        k.store(k.hidden, T * k.RANK)
    else:
        k.load(k.hidden, T * k.RANK)
        k.store(k.dhidden, T * k.RANK)
    k.store(k.low, T * k.RANK)


def _expand_sequences(k: Account) -> None:
    walks, strips, _ = k.grid
    expand(k, strips, pairs=[k.length] * (walks // cdiv(k.length, k.walk)))


def _outer_sequences(k: Account) -> None:
    T, parts, chunks = k.sequences * k.length, k.grid[1], cdiv(k.ROWS, k.BA)
    for (wide, left, _, N, *_), out in ((k.side_0, k.out_0), (k.side_1, k.out_1)):
        strips = cdiv(N, k.BN)
        k.load(wide, T * N, chunks)
        k.load(left, T * k.ROWS, strips)
        k.dot(strips * k.BN, chunks * k.BA, k.sequences * _steps(k, k.length) * k.BT)
        k.store(out, parts * k.sequences * k.ROWS * N)


def _unmerge(k: Account) -> None:
    for parts, experts, gradient, features in (
        (k.down_parts, k.down, k.dlora_down, k.K), (k.up_parts, k.up, k.dlora_up, k.N),
    ):  # fmt: skip
        flat = k.RANK * features
        # Groups of experts read all gradients, and so does each expert's block of a weight.
        groups = cdiv(k.E, k.BE) if gradient is not None else 0
        readings = groups + (k.E if k.dweights is not None else 0)
        k.load(parts, k.PARTS * k.sequences * flat, readings)
        k.load(gradient if gradient is None else k.weights, k.sequences * k.E, cdiv(flat, k.BF))
        k.load(k.dweights if k.dweights is None else experts, k.E * flat, k.sequences)
        k.store(gradient, k.E * flat)
    k.store(k.dweights, k.sequences * k.E)


# Module and name of a kernel -> its formula.
KERNELS = {
    ("shrink", "shrink_parts"): _shrink_parts,
    ("shrink", "add_all"): _add_all,
    ("expand", "expand_rows"): _expand_rows,
    ("outer", "outer_parts"): _outer_parts,
    ("outer", "add_gradients"): _add_gradients,
    ("topk", "shrink_and_mix"): by_tiles,
    ("topk", "mix"): by_tiles,
    ("topk", "mix_and_expand"): as_executed,
    ("topk", "expand_and_count"): _topk_expand,
    ("topk", "shrink_and_mix_backward"): by_tiles,
    ("topk", "mix_backward"): by_tiles,
    ("grouped", "route"): by_tiles,
    ("grouped", "sort"): _sort,
    ("grouped", "shrink_segments"): _shrink_segments,
    ("grouped", "expand_segments"): _expand_segments,
    ("grouped", "mix_backward"): by_tiles,
    ("gated", "shrink_and_mix"): by_tiles,
    ("gated", "mix"): by_tiles,
    ("gated", "mix_and_expand"): as_executed,
    ("gated", "shrink_and_mix_backward"): by_tiles,
    ("gated", "mix_backward"): by_tiles,
    ("averaged", "mix"): by_tiles,
    ("averaged", "mix_and_expand"): as_executed,
    ("averaged", "mix_backward"): by_tiles,
    ("merged", "merge"): _merge,
    ("merged", "shrink_sequences"): _shrink_sequences,
    ("merged", "expand_sequences"): _expand_sequences,
    ("merged", "merge_and_shrink"): as_executed,
    ("merged", "merge_and_expand"): as_executed,
    ("merged", "outer_sequences"): _outer_sequences,
    ("merged", "unmerge"): _unmerge,
    ("grid", "mix"): by_tiles,
    ("grid", "mix_and_expand"): as_executed,
    ("grid", "mix_backward"): by_tiles,
    ("output_gate", "mix"): by_tiles,
    ("output_gate", "mix_and_expand"): as_executed,
    ("output_gate", "mix_backward"): by_tiles,
}
