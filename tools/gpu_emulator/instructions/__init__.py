"""Decoders of all instructions, one family per file.  Importing this registers them."""

from . import (  # noqa: F401
    arithmetic,
    atomics,
    control,
    conversion,
    copy_async,
    load_store,
    logic,
    mbarrier,
    mma,
    move,
    tma,
    warp,
    wgmma,
)
