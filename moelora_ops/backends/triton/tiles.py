"""Which tile every kernel takes: a pure function of shapes, dtype and architecture.

No kernel is tuned at run time.  Rules choose; where ``benchmarks/tune_tiles.py`` has measured on a
GPU that other values are faster, its table (``tuned.py``) has them.  ``python -m moelora_ops.info
--tiles`` prints the choices for typical shapes.

Three things bound them (docs/design.md): a token's sums go in an order that depends on the number
of features alone; registers, as the mix comes on top of a product's accumulators; and what the
multiprocessors read again, which is the rows of every expert once per tile of tokens.
"""

from math import prod
from typing import NamedTuple

from ..strategy import DECODE_TOKENS, INGEST, L2, LAUNCH
from .tuned import TABLE


class Arch(NamedTuple):
    """A GPU, as far as tiles depend on it.

    Attributes:
        kind: "cuda" or "hip".
        name: "sm_90", "gfx942".
        multiprocessors: how many blocks of the largest kind run at once.
    """

    kind: str
    name: str
    multiprocessors: int


# Those that tests compile every kernel for, their largest parts: A100, H200, B200, MI300X.
ARCHS = (
    Arch("cuda", "sm_80", 108),
    Arch("cuda", "sm_90", 132),
    Arch("cuda", "sm_100", 148),
    Arch("hip", "gfx942", 304),
)


# Features that a step of a shrink takes.  float32 products add three or six terms a step, so this
# is part of the order of a sum and depends on nothing but the dtype.
SHRINK_STEP = {2: 64, 4: 32}
# A shrink of K features is the sum of at most this many segments...
MOST_SEGMENTS = 8
# ...where the first and the last four are summed left to right before both sums are added.
HALF = 4
_LEAST_SEGMENT = 128
# Rows of a tile that is masked before it is multiplied: too few for sm_90's asynchronous products,
# for whose operands in registers Triton 3.6 overwrites these, and 3.9 the tile, too early.
MASKED_ROWS = 32
# A launch of this many blocks for each multiprocessor keeps a GPU busy.
_FULL = 0.8
# Columns of one accumulator.
MOST_COLUMNS = 128
# The least that tl.dot takes.
LEAST_COLUMNS = 16


# Bytes of shared memory for the buffers of a block; sm_80 has 163 KB.
_BUFFERS = 128 << 10


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of two that is at least n (and 1)."""
    return 1 << max(n - 1, 0).bit_length()


def _stages(wanted: int, arch: Arch) -> int:
    """Buffers of a loop; AMD's blocks have 64 KB of shared memory."""
    return min(wanted, 2) if arch.kind == "hip" else wanted


def segment(features: int) -> int:
    """Features in a segment of a shrink; depends on their number alone."""
    return max(_LEAST_SEGMENT, 64 * cdiv(features, 64 * MOST_SEGMENTS))


Key = tuple[str, str, int, int, int, int]


def key(arch: Arch, product: str, itemsize: int, tokens: int, features: int, rows: int) -> Key:
    """Where the measured values of a product stand in the table; sizes round up to powers of two.

    Args:
        product: "shrink", "expand" or "outer".
    """
    return (arch.name, product, itemsize, *map(power_of_2, (tokens, features, rows)))


def _faster(rule: dict[str, int], key: Key) -> dict[str, int]:
    """The values of `rule`, or those that have been measured to be faster.

    None of them changes the order of a token's sums.
    """
    return rule | TABLE.get(key, {})


def rows_of_product(rows: int, most: int) -> int:
    """Rows of the experts that one tl.dot takes: all, or as many as fit."""
    return min(max(power_of_2(rows), LEAST_COLUMNS), most)


class Shrink(NamedTuple):
    """How a shrink runs.

    Attributes:
        parts: partial sums that are written per result; 1, 2 (halves) or one per segment.
        span: features of a part.
        columns: blocks that share a row tile, each with its part of the rows.
        BT, BK: tokens of a block, features of a step.
        BA, BB: columns of a block in the first and in the second product.
        warps, stages: of a block.
    """

    parts: int
    span: int
    columns: int
    BT: int
    BK: int
    BA: int
    BB: int
    warps: int
    stages: int


def shrink(
    tokens: int,
    features: int,
    columns_a: int,
    columns_b: int,
    itemsize: int,
    arch: Arch,
    most_columns: int = MOST_COLUMNS,
    products: int = 1,
    whole: bool = False,
    masked: bool = False,
) -> Shrink:
    """The tile of ``[tokens, features] x [features, columns]``.

    Args:
        columns_a, columns_b: of the two products, padding included; columns_b may be 0.
        itemsize: bytes of an element.
        most_columns: of the first product in one block.
        products: how many such products run at once.
        whole: one part has all features.
        masked: threads change a tile of x before it is multiplied.
    """
    length = segment(features)
    segments = 1 if whole else max(cdiv(features, length), 1)
    halves = cdiv(segments, HALF)
    spans = {segments: length, halves: HALF * length, 1: MOST_SEGMENTS * length}
    widest = rows_of_product(columns_a, most_columns)
    # Blocks of 128 tokens read the experts' rows half as often, fewer parts are less to write and
    # to add, narrow columns read x again: the first that fills most of the GPU.
    choices = [(128, 1, widest), (128, halves, widest), (64, halves, widest)]
    choices += [(64, segments, widest >> n) for n in range((widest // LEAST_COLUMNS).bit_length())]
    if widest > 64 and halves > 1:
        del choices[0]
    for BT, parts, most in choices:
        BA, columns, BB = _columns(columns_a, columns_b, most, _most_columns(parts, itemsize, arch))
        if cdiv(tokens, BT) * parts * columns * products >= _FULL * arch.multiprocessors:
            break
    if masked:
        BT = MASKED_ROWS
    BK, stages = SHRINK_STEP[itemsize], 3 if itemsize == 4 else 4
    if tokens <= DECODE_TOKENS:
        # A block is alone and walks few steps: as many of them under way as its memory holds.
        stages = max(stages, min(8, _BUFFERS // ((BT + BA + BB) * BK * itemsize)))
    free = {"BT": BT, "warps": max(BT // 16, 4), "stages": _stages(stages, arch)}
    if tokens > DECODE_TOKENS and not masked:
        free = _faster(free, key(arch, "shrink", itemsize, tokens, features, columns_a))
    return Shrink(parts, spans[parts], columns, BK=BK, BA=BA, BB=BB, **free)


def _most_columns(parts: int, itemsize: int, arch: Arch) -> int:
    """Columns of both products that a block can have before registers spill.

    A block that walks all features has three accumulators of each; a float32 operand is three
    bfloat16 ones.
    """
    if itemsize == 4:
        return 80 if arch.name == "sm_80" else 96
    if parts == 1:
        return 96
    return 128 if arch.name == "sm_80" else 192


def _columns(columns_a: int, columns_b: int, BA: int, most: int) -> tuple[int, int, int]:
    """At most BA columns of the first product in a block, so that both have at most `most`.

    Returns:
        Columns of the first product, blocks that share a row tile, columns of the second.
    """
    while True:
        blocks = cdiv(columns_a, BA)
        BB = rows_of_product(cdiv(columns_b, blocks), MOST_COLUMNS)
        if most >= BA + BB or BA == LEAST_COLUMNS:
            return BA, blocks, BB
        BA //= 2


def fused_shrink(
    tokens: int,
    features: int,
    columns_a: int,
    columns_b: int,
    itemsize: int,
    arch: Arch,
    masked: bool = False,
) -> Shrink | None:
    """The tile of a shrink whose blocks end with the mix; None if it had better be a kernel apart.

    Args:
        columns_a, columns_b: as the mix sees them, padding included.
    """
    tile = shrink(tokens, features, columns_a, columns_b, itemsize, arch, masked=masked)
    # Blocks that share neither a token's features nor its columns.
    whole = tile.parts == tile.columns == 1
    # A mix holds several tiles of its columns; with more of them registers spill.
    few = columns_a <= 64 and columns_b <= (32 if itemsize == 2 else 16)
    return tile if whole and few else None


def grouped_shrink(features: int, rank: int, itemsize: int, arch: Arch, masked: bool) -> Shrink:
    """The tile of a shrink of an expert's own tokens, however many: one part has all features."""
    BA, columns, BB = _columns(
        power_of_2(rank), 0, rows_of_product(rank, MOST_COLUMNS), _most_columns(1, itemsize, arch)
    )
    # Experts' last tiles are half empty, so not more tokens than an asynchronous product wants.
    return Shrink(
        1, MOST_SEGMENTS * segment(features), columns, MASKED_ROWS if masked else 64,
        SHRINK_STEP[itemsize], BA, BB, 4, _stages(3 if itemsize == 4 else 4, arch),
    )  # fmt: skip


class Mix(NamedTuple):
    """How a mix runs as a kernel of its own: tokens of a block, and its warps."""

    BT: int
    warps: int


# Values of hidden that 4 warps mix at once.
_VALUES = 4096


def mix(columns: int, values: int = _VALUES) -> Mix:
    """The tile of a mix with this many columns, padding included: so many values in 4 warps."""
    return Mix(max(1, min(64, values // columns)), 4 if columns <= values else 8)


def own_mix(tokens: int, columns: int) -> int | None:
    """Tokens in the tile of a mix that every block of an expand does by itself.

    None if it had better be a launch: for many tokens, or if a block cannot hold all of them with
    their columns, padding included.  To read eight partial sums of as much takes a block half of
    what a launch costs (by the model of ``strategy``).
    """
    BT = power_of_2(tokens)
    return BT if 0 < tokens <= DECODE_TOKENS and BT * columns <= _VALUES else None


def own_merge(
    tokens: int, sequences: int, down: tuple[int, ...], up: tuple[int, ...], itemsize: int
) -> int | None:
    """Tokens of a tile that holds a sequence, whose merged factors every block makes for itself.

    None if merging had better be a launch, for all sequences at once: for many tokens, or if every
    sequence reading the experts ``[E, r, K]`` and ``[E, r, N]`` takes longer than that launch, or
    one block reading a segment of K.
    """
    E, r, K = down
    length = tokens // max(sequences, 1)
    moved = sequences * itemsize * (prod(down) + prod(up))
    of_block = itemsize * E * min(r, LEAST_COLUMNS) * segment(K)
    few = 0 < tokens <= DECODE_TOKENS and moved <= LAUNCH * L2 and of_block <= LAUNCH * INGEST
    return own_mix(length, power_of_2(r)) if few else None


def routing(num_experts: int) -> Mix:
    """The tile that routes and sorts tokens; large, as what each tile counts is read many times."""
    return Mix(max(1, min(64, 8192 // power_of_2(num_experts))), 8)


class OutputGate(NamedTuple):
    """How the mix of an output gate runs.

    Attributes:
        BT: tokens of a block.
        EP: columns of its logits.
        C: columns of hidden in one product.
        S: columns of each expert that are mixed at once.
        warps: of a block.
    """

    BT: int
    EP: int
    C: int
    S: int
    warps: int


def output_gate(num_experts: int, rank: int) -> OutputGate:
    """The tile of the mix, which depends on nothing else, and so does the order of its sums."""
    E, width = power_of_2(num_experts), power_of_2(rank)
    EP = max(E, LEAST_COLUMNS)
    # Narrow ones take fewer registers; but a rank that is cut into pieces costs their cube.
    C = rows_of_product(E * width, 32 if width <= 64 else 64)
    return OutputGate(16, EP, C, min(width, max(64 // EP, 1)), 4)


class Cosines(NamedTuple):
    """How PEMT's cosines are computed.

    Attributes:
        BT: tokens of a block.
        C: columns of an expert in one product.
        BN: columns of f at once.
        warps: of a block.
    """

    BT: int
    C: int
    BN: int
    warps: int


def cosines(rank: int) -> Cosines:
    """The tile, which depends on nothing else, and so does the order of its sums."""
    return Cosines(16, min(max(power_of_2(rank), LEAST_COLUMNS), 32), 256, 4)


class Expand(NamedTuple):
    """How an expand runs.

    Attributes:
        BT, BN: tokens and columns of a tile.
        BR: rows of the experts in one product.
        walk: tokens that a block walks with its columns of the experts.
        warps, stages: of a block.
    """

    BT: int
    BN: int
    BR: int
    walk: int
    warps: int
    stages: int


def expand(tokens: int, features: int, rows: int, itemsize: int, arch: Arch) -> Expand:
    """The tile of ``[tokens, rows] x [rows, features]``."""
    small = tokens <= 64 or itemsize == 4
    BT, BN = (64, 64) if small else (128, 128)
    BR = rows_of_product(rows, MOST_COLUMNS)
    if itemsize == 4 and rows > 64:
        BR = 32
    free = {"BT": BT, "BN": BN, "warps": 4 if small else 8, "stages": 2}
    if tokens > DECODE_TOKENS:
        free = _faster(free, key(arch, "expand", itemsize, tokens, features, rows))
    BT, BN = free["BT"], free["BN"]
    # Two waves of blocks; a block that walks far reads its columns of the experts once.
    walks = max(1, 2 * arch.multiprocessors // max(cdiv(features, BN), 1))
    walk = BT * max(cdiv(tokens, BT * walks), 1)
    return Expand(BR=BR, walk=walk, **free)


class Outer(NamedTuple):
    """How an outer product runs.

    Attributes:
        BT, BN: tokens of a step, columns of a block.
        BA: rows of the experts of a block.
        splits: parts that the tokens are split into.
        span: tokens of a part.
        warps, stages: of a block.
    """

    BT: int
    BN: int
    BA: int
    splits: int
    span: int
    warps: int
    stages: int


def outer(
    tokens: int, features: int, rows: int, itemsize: int, arch: Arch, experts: int = 1
) -> Outer:
    """The tile of ``[rows, tokens] x [tokens, features]``; features of all products together.

    Args:
        experts: how many such products there are, each of its own tokens.
    """
    # On sm_80 the transposed tile takes registers too.
    narrow = arch.name == "sm_80"
    BT, BN = 32 if narrow or itemsize == 4 else 64, 64 if itemsize == 4 else 128
    free = {"BT": BT, "warps": 4 if itemsize == 4 else 8, "stages": _stages(3, arch)}
    free = _faster(free, key(arch, "outer", itemsize, tokens, features, rows))
    BT = free["BT"]
    BA = rows_of_product(rows, 64 if narrow or itemsize == 4 else MOST_COLUMNS)
    blocks = max(cdiv(features, BN) * cdiv(rows, BA) * experts, 1)
    # One wave of blocks, as parts are written and read again; at most 8, none of fewer than 256
    # tokens.
    splits = max(1, min(8, round(arch.multiprocessors / blocks), tokens // 256))
    span = BT * max(cdiv(tokens, BT * splits), 1)
    return Outer(BN=BN, BA=BA, splits=cdiv(tokens, span), span=span, **free)
