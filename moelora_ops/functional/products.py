"""The skeleton's first and last product alone: what gates and losses in rank space are made of.

With them nothing as long as an output has to exist per expert: the inner product of an output
``B_e H_e`` with a vector v is ``<B_eᵀ v, H_e>``.
"""

import torch
import torch.nn.functional as F
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
    _check_output(y)
    if isinstance(rows, Tensor) and rows.dtype != y.dtype and common.autocast_dtype(y) is not None:
        rows = rows.to(y.dtype)
    _check_rows(rows, y, y.shape[-1])
    _check_hidden(hidden, rows, y)
    backend = common.backend_for(y)
    if backend == "reference":
        return _reference_expand(hidden, rows, y)
    base = (None, None, None, y, False, ops.LIBRARY)
    arguments = (*base, backend, hidden.contiguous(), rows.contiguous())
    return (
        ExpandMixture.apply(*arguments)
        if torch.is_grad_enabled()
        else expand_mixture(*arguments)[0]
    )


def expand_(hidden: Tensor, rows: Tensor, y: Tensor) -> Tensor:
    """:func:`expand` in place, for gradients: autograd does not see it.

    Args:
        hidden: ``[..., R]`` in float32 (float64 for float64 y).
        rows: ``[R, N]``, cast to y's dtype.
        y: ``[..., N]``, contiguous; is added to.

    Returns:
        y.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: a back end was forced that cannot run here.
    """
    _check_output(y)
    if not y.is_contiguous():
        raise ValueError(f"y: wanted a contiguous tensor, got strides {list(y.stride())}")
    rows = rows.to(y.dtype)
    _check_rows(rows, y, y.shape[-1])
    _check_hidden(hidden, rows, y)
    backend = common.backend_for(y)
    with torch.no_grad():
        if backend == "reference":
            return y.copy_(_reference_expand(hidden, rows, y))
        ops.of(backend).expand(hidden.contiguous(), rows.contiguous(), y, True)
    return y


def linear_expand(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    hidden: Tensor,
    rows: Tensor,
    *,
    base_output: Tensor | None = None,
) -> Tensor:
    """``x @ weight.T + bias + hidden @ rows``: :func:`expand` onto a frozen linear.

    What is left of a mixture once its mixed hidden is there.

    Args:
        x: ``[..., K]``.
        weight, bias: ``[N, K]`` and ``[N]`` or None, in x's dtype.
        hidden: ``[..., R]`` in float32 (float64 for float64 x).
        rows: ``[R, N]`` in x's dtype.
        base_output: ``[..., N]`` instead of weight and bias; is not changed.

    Returns:
        ``[..., N]`` in x's dtype; differentiable with respect to every tensor.

    Under autocast all but hidden are cast to its dtype first.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: a back end was forced that cannot run here.
    """
    low = common.autocast_dtype(x)
    if low is not None:
        x, weight, bias, rows, base_output = common.autocast(
            low, x, weight, bias, rows, base_output
        )
    common.check_input(x)
    if not isinstance(rows, Tensor) or rows.dim() != 2:
        raise ValueError(f"rows: wanted shape [R, out_features], got {common.shape(rows)}")
    common.check_tensors(
        x, rows.shape[1], weight, bias, base_output, ("rows", rows, tuple(rows.shape))
    )
    _check_hidden(hidden, rows, x)
    backend = common.backend_for(x)
    if backend == "reference":
        with torch.autocast(x.device.type, enabled=False):
            y = F.linear(x, weight, bias) if base_output is None else base_output
        return _reference_expand(hidden, rows, y)
    return common.run_mixture(
        expand_mixture, ExpandMixture, backend, x.contiguous(), weight, bias, base_output,
        rows.shape[1], hidden.contiguous(), rows.contiguous(),
    )[0]  # fmt: skip


def _reference_expand(hidden: Tensor, rows: Tensor, y: Tensor) -> Tensor:
    with torch.autocast(y.device.type, enabled=False):
        return (y.to(hidden.dtype) + hidden @ rows.to(hidden.dtype)).to(y.dtype)


def _check_output(y: Tensor) -> None:
    if not isinstance(y, Tensor) or y.dim() == 0 or not y.is_floating_point():
        raise TypeError(f"y: wanted a floating-point tensor [..., out_features], got {y!r}")


def _check_hidden(hidden: Tensor, rows: Tensor, like: Tensor) -> None:
    """`hidden` has a row for each of `like` and is as wide as the accumulator."""
    wide = ops.accumulator_dtype(like.dtype)
    common.check_floating("hidden", hidden, like.device)
    if hidden.shape != (*like.shape[:-1], rows.shape[0]):
        raise ValueError(
            f"hidden: wanted shape {[*like.shape[:-1], rows.shape[0]]}, got {common.shape(hidden)}"
        )
    if hidden.dtype != wide:
        raise TypeError(f"hidden: wanted dtype {wide} beside {like.dtype}, got {hidden.dtype}")


def _check_rows(rows: Tensor, like: Tensor, columns: int) -> None:
    if not isinstance(rows, Tensor) or rows.dim() != 2 or rows.shape[1] != columns:
        raise ValueError(f"rows: wanted shape [R, {columns}], got {common.shape(rows)}")
    if rows.dtype != like.dtype:
        raise TypeError(f"rows: wanted dtype {like.dtype}, got {rows.dtype}")
    if rows.device != like.device:
        raise ValueError(f"rows: wanted device {like.device}, got {rows.device}")
