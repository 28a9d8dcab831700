"""Which path a top-k mixture takes: all experts (stacked), the chosen ones (grouped), few tokens.

On a CPU a measured rule decides, on a GPU a model of an H200 with 4096 features on either side: not
times, but enough to order the paths.  A path that a back end does not have is never chosen.
"""

import torch

# Back end -> the paths that it has.
PATHS = {
    "cpu": ("stacked", "grouped"),
    "cuda": ("stacked", "grouped", "decode"),
    "triton": ("stacked", "grouped", "decode"),
}
# Most tokens of the decode path.
DECODE_TOKENS = 32

# The model: bytes per second of device memory, between L2 and multiprocessors and into one of them,
# operations per second of tensor cores on 16-bit numbers, seconds that a launch costs beside its
# work.
DEVICE_MEMORY = 4.3e12
L2 = 5.5e12
INGEST = 0.75 * 64 * 1.755e9
TENSOR_CORES = 790e12
LAUNCH = 3e-6
# Of a forward pass; a grouped one has one for each choice beside these.
_LAUNCHES = {"stacked": 3, "grouped": 4, "decode": 2}
_FEATURES = 4096
_MANY = 8192


def seconds(path: str, rows: int, top_k: int, tokens: int, dtype: torch.dtype) -> float:
    """The model of a forward pass beyond the frozen linear on a GPU.

    Args:
        path: "stacked", "grouped" or "decode".
        rows: E * r.
    """
    size, launches = dtype.itemsize, _LAUNCHES[path]
    if path == "grouped":
        launches += top_k
        # x is read for the router and gathered for each choice, and y written once and added to for
        # each other one; a token's own rows are too few for anything else to count.
        wide, again, flops = 3 * top_k, 0, 0
    else:
        # Every tile of tokens reads all rows again, and every strip of columns what is mixed of
        # them; in tiles half as large beyond the rows that one product takes.  A float32 product is
        # six of bfloat16.
        wide, again = 2, rows / (64 if rows <= 128 else 32)
        flops = 4 * tokens * rows * _FEATURES * (6 if size == 4 else 1)
    moved = size * _FEATURES * (wide * tokens + 2 * rows)
    through_l2 = size * _FEATURES * (wide + again) * tokens
    work = max(moved / DEVICE_MEMORY, through_l2 / L2, flops / TENSOR_CORES)
    if path == "decode":
        # Each block of 64 columns adds eight partial sums and mixes by itself.
        work += _FEATURES // 64 * 8 * 4 * tokens * rows / L2
    return work + launches * LAUNCH


def is_stacked(
    backend: str, strategy: str, num_experts: int, rank: int, top_k: int, dtype: torch.dtype
) -> bool:
    """Whether kernels compute all experts (``stacked``) or a token's chosen ones (``grouped``).

    Never by the number of tokens, so that the bits of a token do not depend on how many others
    there are.

    On a CPU flops decide: grouped kernels touch k*r rows of a token, one token at a time; stacked
    ones touch all E*r rows but share each load between several tokens.  That measured 6 to 17 %
    faster at k = E and no faster at k = 6 of 8 (docs/design.md).  On a GPU stacked products are
    bound by the memory that x takes until E*r is a few hundreds.
    """
    if strategy != "auto":
        return strategy == "stacked"
    if "grouped" not in PATHS[backend]:
        return True
    if backend == "cpu":
        return 8 * top_k > 7 * num_experts
    rows = num_experts * rank
    stacked = seconds("stacked", rows, top_k, _MANY, dtype)
    return stacked <= seconds("grouped", rows, top_k, _MANY, dtype)


def choose(
    backend: str, num_experts: int, rank: int, top_k: int, tokens: int, dtype: torch.dtype
) -> str:
    """The path that ``strategy="auto"`` takes."""
    if not is_stacked(backend, "auto", num_experts, rank, top_k, dtype):
        return "grouped"
    if "decode" not in PATHS[backend] or tokens > DECODE_TOKENS:
        return "stacked"
    # The same sums as stacked, in the same order.
    rows = num_experts * rank
    return min(("stacked", "decode"), key=lambda p: seconds(p, rows, top_k, tokens, dtype))
