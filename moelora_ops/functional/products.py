"""Two of the skeleton's three products alone: what gates and losses in rank space are made of.

With them nothing as long as an output has to exist per expert: the inner product of an output
``B_e H_e`` with a vector v is ``<B_eᵀ v, H_e>``.
"""

import torch
from torch import Tensor

from .. import ops
from ..autograd import ExpandMixture, Shrink, expand_mixture
from . import common


def shrink(x: Tensor, rows: Tensor) -> Tensor:
    """``x @ rows.T`` for a few skinny rows, summed and returned in float32 (float64 for float64).

    Args:
        x: ``[..., K]``.
        rows: ``[R, K]`` in x's dtype.

    Returns:
        ``[..., R]``; differentiable with respect to both.

    Under autocast both are cast to its dtype first.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: a back end was forced that cannot run here.
    """
    low = common.autocast_dtype(x)
    if low is not None:
        x, rows = common.autocast(low, x, rows)
    common.check_input(x)
    _check_rows(rows, x, x.shape[-1])
    backend = common.backend_for(x)
    if backend == "reference":
        wide = ops.accumulator_dtype(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return x.to(wide) @ rows.to(wide).t()
    x, rows = x.contiguous(), rows.contiguous()
    if torch.is_grad_enabled():
        return Shrink.apply(backend, x, rows)
    return ops.of(backend).shrink(x, rows)


def expand(hidden: Tensor, rows: Tensor, y: Tensor) -> Tensor:
    """``y + hidden @ rows``, summed in float32 (float64 for float64) and rounded once.

    Args:
        hidden: ``[..., R]`` in float32 (float64 for float64 y).
        rows: ``[R, N]`` in y's dtype.
        y: ``[..., N]``; is not changed.

    Returns:
        ``[..., N]`` in y's dtype; differentiable with respect to all three.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: a back end was forced that cannot run here.
    """
    if not isinstance(y, Tensor) or y.dim() == 0 or not y.is_floating_point():
        raise TypeError(f"y: wanted a floating-point tensor [..., out_features], got {y!r}")
    if isinstance(rows, Tensor) and rows.dtype != y.dtype and common.autocast_dtype(y) is not None:
        rows = rows.to(y.dtype)
    _check_rows(rows, y, y.shape[-1])
    wide = ops.accumulator_dtype(y.dtype)
    common.check_floating("hidden", hidden, y.device)
    if hidden.shape != (*y.shape[:-1], rows.shape[0]):
        raise ValueError(
            f"hidden: wanted shape {[*y.shape[:-1], rows.shape[0]]}, got {common.shape(hidden)}"
        )
    if hidden.dtype != wide:
        raise TypeError(f"hidden: wanted dtype {wide} for y in {y.dtype}, got {hidden.dtype}")
    backend = common.backend_for(y)
    if backend == "reference":
        with torch.autocast(y.device.type, enabled=False):
            return (y.to(wide) + hidden @ rows.to(wide)).to(y.dtype)
    base = (None, None, None, y, False, ops.LIBRARY)
    arguments = (*base, backend, hidden.contiguous(), rows.contiguous())
    return (
        ExpandMixture.apply(*arguments)
        if torch.is_grad_enabled()
        else expand_mixture(*arguments)[0]
    )


def _check_rows(rows: Tensor, like: Tensor, columns: int) -> None:
    if not isinstance(rows, Tensor) or rows.dim() != 2 or rows.shape[1] != columns:
        raise ValueError(f"rows: wanted shape [R, {columns}], got {common.shape(rows)}")
    if rows.dtype != like.dtype:
        raise TypeError(f"rows: wanted dtype {like.dtype}, got {rows.dtype}")
    if rows.device != like.device:
        raise ValueError(f"rows: wanted device {like.device}, got {rows.device}")
