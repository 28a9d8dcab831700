"""Cosines of a layer's output with every expert's, in rank space: PEMT's task sparsity loss."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import functional

_SMALLEST_NORM = 1e-8  # as torch.nn.functional.cosine_similarity
_BLOCK = 512  # tokens: enough for a product to be worth its call, too few to be seen in memory


def expert_cosines(
    f: Tensor, hidden: Tensor, up_rows: Tensor, factors: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """``cos(f, o_e)`` with every expert's output ``o_e = s_e B_e h_e``; B, s constants.

    In rank space: ``⟨f, B_e h_e⟩ = ⟨B_eᵀ f, h_e⟩`` and ``|B_e h_e| = |R_e h_e|``: no expert's
    output is made.  Of adapter experts b is a column of B, where h is 1, and the shared residual is
    left out (our choice: it says nothing about which expert is used).

    Args:
        f: ``[..., N]``.
        hidden: h ``[..., E, r]``, at least float32.
        up_rows: Bᵀ ``[E, r, N]`` in f's dtype.
        factors: :func:`triangular_factors` of `up_rows`.
        scales: s ``[E]``, in hidden's dtype like `factors`.

    Returns:
        f, for whoever uses it from here on: its gradients meet here in one pass; and the cosines
        ``[..., E]`` in hidden's dtype; a norm below 1e-8 counts as 1e-8, as in PyTorch's
        ``cosine_similarity``.
    """
    return _Cosines.apply(f, hidden, up_rows, factors, scales)


def triangular_factors(up_rows: Tensor) -> Tensor:
    """R of ``B_e = Q_e R_e`` for B ``[N, r]`` given by its rows of Bᵀ ``[E, r, N]``.

    ``|B_e h| = |R_e h|``, with r² numbers instead of N·r; unlike ``hᵀ B_eᵀ B_e h`` it is never
    negative and does not square the condition number.

    Returns:
        ``[E, min(N, r), r]`` in at least float32.
    """
    wide = torch.promote_types(up_rows.dtype, torch.float32)
    return torch.linalg.qr(up_rows.detach().to(wide).transpose(1, 2), mode="r").R


class _Cosines(torch.autograd.Function):
    """``s ⟨g_e, h_e⟩ / (|s R_e h_e| |f|)`` with ``g = Bᵀ f``.

    Apart, each of f's three gradients (from its user, of g, of ``|f|``) would be a ``[T, N]`` of
    its own, and then be added.
    """

    @staticmethod
    def forward(ctx, f, hidden, up_rows, factors, scale):
        ctx.set_materialize_grads(False)
        rows = up_rows.flatten(0, 1).to(f.dtype)  # of another dtype under autocast
        seen = functional.shrink(f, rows).view(hidden.shape)
        f_norm = torch.linalg.vector_norm(f, dim=-1, keepdim=True, dtype=hidden.dtype)
        cosines, norms = (hidden.new_empty(hidden.shape[:-1]) for _ in range(2))
        for out, norm, g, h, m in row_blocks(
            (cosines, 1), (norms, 1), (seen, 2), (hidden, 2), (f_norm, 1)
        ):
            outputs = torch.bmm(h.transpose(0, 1), factors.transpose(1, 2))  # R h: [E, t, r]
            torch.mul(outputs.norm(dim=-1).t(), scale.abs(), out=norm)
            each = scale / _at_least(norm, m)
            torch.mul((g * h).sum(-1), each, out=out)
        ctx.save_for_backward(f, hidden, rows, factors, scale, seen, f_norm, norms, cosines)
        return f.view_as(f), cosines

    @staticmethod
    @once_differentiable
    def backward(ctx, df, dcosines):
        if dcosines is None:
            return df, None, None, None, None
        f, hidden, rows, factors, scale, seen, f_norm, norms, cosines = ctx.saved_tensors
        # Of R h the gradient is along Rᵀ R h.
        gram = torch.bmm(factors.transpose(1, 2), factors)
        df_total, dhidden = f.new_empty(f.shape), hidden.new_empty(hidden.shape)
        for out, dh, dy, v, g, h, m, norm, c, dc in row_blocks(
            (df_total, 1), (dhidden, 2), (df_total if df is None else df, 1), (f, 1), (seen, 2),
            (hidden, 2), (f_norm, 1), (norms, 1), (cosines, 1), (dcosines, 1),
        ):  # fmt: skip
            # Where a norm is clamped it is a constant.
            along = torch.where(m > _SMALLEST_NORM, -(dc * c).sum(-1, keepdim=True) / m.square(), 0)
            torch.mul(v, along, out=out) if df is None else torch.addcmul(dy, v, along, out=out)
            each = (dc * scale / _at_least(norm, m)).unsqueeze(-1)
            functional.expand_((each * h).flatten(1), rows, out)
            away = torch.where(norm > _SMALLEST_NORM, dc * c * (scale / norm).square(), 0)
            within = torch.bmm(h.transpose(0, 1), gram).transpose(0, 1)
            torch.mul(each, g, out=dh).addcmul_(within, away.unsqueeze(-1), value=-1)
        return df_total, dhidden, None, None, None


def _at_least(norm: Tensor, f_norm: Tensor) -> Tensor:
    """The cosines' denominator: of neither norm less than 1e-8."""
    return norm.clamp(min=_SMALLEST_NORM) * f_norm.clamp(min=_SMALLEST_NORM)


def row_blocks(*tensors: tuple[Tensor, int]) -> Iterator[tuple[Tensor, ...]]:
    """The tensors' rows, some at a time; of each, a row is that many of its last dimensions."""
    flat = [t.reshape(-1, *t.shape[t.dim() - dims :]) for t, dims in tensors]
    return zip(*(t.split(_BLOCK) for t in flat), strict=True)
