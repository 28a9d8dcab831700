"""What each kernel of csrc/cuda moves: one row of `KERNELS` per kernel, one of `MIXES` per mix.

Where all warps of a block read what depends on no token, say the columns of a table, it counts once
for each of their rounds.
"""

from tools.gpu_emulator.cuda_runtime import Launch

from . import merged, products, segments
from .common import Account

# Name of a kernel -> its formula.
KERNELS = {
    "shrink_kernel": products.mma_shrink,
    "wgmma_shrink_kernel": products.wgmma_shrink,
    "add_kernel": products.add,
    "round_kernel": products.round_coefficients,
    "expand_kernel": products.mma_expand,
    "outer_kernel": products.outer,
    "add_parts_kernel": products.add_parts,
    "mix_kernel": products.mix_alone,
    "mix_and_expand_kernel": products.mix_and_expand,
    "sort_kernel": segments.sort,
    "shrink_segments_kernel": segments.shrink_segments,
    "expand_segments_kernel": segments.expand_segments,
    "merge_kernel": merged.merge,
    "merge_and_expand_kernel": products.merge_and_expand,
    "unmerge_kernel": merged.unmerge,
}


def account(launch: Launch) -> Account:
    """What `launch` moves.

    Raises:
        KeyError: the kernel or its mix has no row.
    """
    result = Account(launch)
    KERNELS[launch.name](result)
    return result
