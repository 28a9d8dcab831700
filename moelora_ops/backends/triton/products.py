"""The operators that are a product alone; their contracts are those of functional/products.py."""

import torch
from torch import Tensor

from . import expand as _expand
from . import launch
from . import outer as _outer
from . import shrink as _shrink


def shrink(x: Tensor, rows: Tensor) -> Tensor:
    """float32 ``[..., R]``: x ``[..., K]`` times rows ``[R, K]``, which has x's dtype."""
    tokens = launch.rows_of(x, "x")
    launch.check_like(rows, x, (rows.shape[0], tokens.columns), "rows")
    hidden = x.new_empty((*x.shape[:-1], rows.shape[0]), dtype=torch.float32)
    parts, _, count = _shrink.run(tokens, rows, out_a=hidden)
    if count > 1:
        _shrink.add(parts, hidden)
    return hidden


def expand(hidden: Tensor, rows: Tensor, y: Tensor, accumulate: bool) -> None:
    """y ``[..., N]`` (+)= hidden, float32 ``[..., R]``, times rows ``[R, N]``, in y's dtype."""
    out = launch.rows_of(y, "y")
    launch.check_wide(hidden, (*y.shape[:-1], rows.shape[0]), "hidden")
    launch.check_like(rows, y, (rows.shape[0], out.columns), "rows")
    _expand.run(out, launch.in_workspace(hidden, y), rows, accumulate=accumulate)


def outer(hidden: Tensor, x: Tensor) -> Tensor:
    """``[R, K]`` in x's dtype: hidden, float32 ``[..., R]``, transposed, times x ``[..., K]``."""
    wide = launch.rows_of(x, "x")
    launch.check_wide(hidden, (*x.shape[:-1], hidden.shape[-1]), "hidden")
    return _outer.run(_outer.Side(wide, launch.in_workspace(hidden, x)))[0]
