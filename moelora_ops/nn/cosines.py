"""Cosines of a layer's output with every expert's, in rank space: PEMT's task sparsity loss."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import functional

_SMALLEST_NORM = 1e-8  # as torch.nn.functional.cosine_similarity
_BLOCK = 512  # tokens: enough for a product to be worth its call, too few to be seen in memory


def expert_cosines(
    f: Tensor, hidden: Tensor, up_rows: Tensor, factors: Tensor, scales: Tensor
) -> Tensor:
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
        ``[..., E]`` in hidden's dtype; a norm below 1e-8 counts as 1e-8, as in PyTorch's
        ``cosine_similarity``.
    """
    seen = functional.shrink(f, up_rows.flatten(0, 1)).unflatten(-1, up_rows.shape[:2])
    f_norm = torch.linalg.vector_norm(f, dim=-1, dtype=hidden.dtype)
    return _Cosines.apply(seen, hidden, f_norm, factors, scales)


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
    """``s ⟨g_e, h_e⟩ / (|s R_e h_e| |f|)`` from ``g = Bᵀ f``; keeps g, h and no third."""

    @staticmethod
    def forward(ctx, seen, hidden, f_norm, factors, scale):
        f_norm = f_norm.clamp(min=_SMALLEST_NORM).unsqueeze(-1)
        cosines = hidden.new_empty(hidden.shape[:-1])
        for out, g, h, m in row_blocks(cosines, seen, hidden, f_norm, trailing=(1, 2, 2, 1)):
            norm = (scale * _outputs(h, factors).norm(dim=-1).t()).abs().clamp_(min=_SMALLEST_NORM)
            torch.div(scale * (g * h).sum(-1), norm * m, out=out)
        ctx.save_for_backward(seen, hidden, f_norm, factors, scale, cosines)
        return cosines

    @staticmethod
    @once_differentiable
    def backward(ctx, dcosines):
        seen, hidden, f_norm, factors, scale, cosines = ctx.saved_tensors
        dseen, dhidden = torch.empty_like(seen), torch.empty_like(hidden)
        for dg, dh, g, h, m, c, dc in row_blocks(
            dseen, dhidden, seen, hidden, f_norm, cosines, dcosines, trailing=(2, 2, 2, 2, 1, 1, 1)
        ):
            outputs = _outputs(h, factors)  # [E, t, r]
            plain = outputs.norm(dim=-1).t()
            norm = (scale * plain).abs().clamp_(min=_SMALLEST_NORM)
            each = (dc * scale / (norm * m)).unsqueeze(-1)
            torch.mul(each, h, out=dg)
            torch.mul(each, g, out=dh)
            # Where the norm is clamped it is a constant.
            away = torch.where(norm > _SMALLEST_NORM, dc * c / plain.square(), 0.0)
            outputs.mul_(away.t().unsqueeze(-1))
            dh.sub_(torch.bmm(outputs, factors).transpose(0, 1))
        free = f_norm > _SMALLEST_NORM
        df_norm = torch.where(free, -(dcosines * cosines).sum(-1, keepdim=True) / f_norm, 0.0)
        return dseen, dhidden, df_norm.squeeze(-1), None, None


def _outputs(hidden: Tensor, factors: Tensor) -> Tensor:
    """``R_e h_e``, ``[E, t, r]``."""
    return torch.bmm(hidden.transpose(0, 1), factors.transpose(1, 2))


def row_blocks(*tensors: Tensor, trailing: Sequence[int] = (1, 1)) -> Iterator[tuple[Tensor, ...]]:
    """The tensors' rows, some at a time; the last `trailing` dimensions of each are a row."""
    flat = [t.reshape(-1, *t.shape[t.dim() - n :]) for t, n in zip(tensors, trailing, strict=True)]
    return zip(*(t.split(_BLOCK) for t in flat), strict=True)
