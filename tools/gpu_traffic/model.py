"""A cost model of one H200: arithmetic on assumed rates, never a time.

Nothing here was measured.  A launch takes as long as its slowest resource; what overlaps badly, the
start of a launch and its tail are one constant.
"""

from moelora_ops.backends.strategy import DEVICE_MEMORY, INGEST, LAUNCH, TENSOR_CORES
from moelora_ops.backends.strategy import L2 as SLOWER_L2

from .accounts import Account

MULTIPROCESSORS = 132
# Between L2 and multiprocessors: published figures of this class, from and to.
L2 = (7.0e12, SLOWER_L2)


def seconds(account: Account) -> tuple[float, float]:
    """The model of one launch without the constant, with the faster and the slower L2."""
    used = min(account.blocks, MULTIPROCESSORS)
    fixed = max(
        account.distinct / DEVICE_MEMORY,
        account.loads.moved / (INGEST * used),
        account.flops / (TENSOR_CORES * used / MULTIPROCESSORS),
    )
    fast, slow = (max(fixed, account.moved / rate) for rate in L2)
    return fast, slow


def gemm_seconds(tokens: int, in_features: int, out_features: int) -> float:
    """The model of a frozen linear in 16 bits: its arithmetic, or reading its operands once."""
    flops = 2 * tokens * in_features * out_features
    moved = 2 * (tokens * in_features + in_features * out_features + tokens * out_features)
    return max(flops / TENSOR_CORES, moved / DEVICE_MEMORY) + LAUNCH
