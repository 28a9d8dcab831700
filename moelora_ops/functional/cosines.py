"""Cosines of a layer's output with every expert's, in rank space: PEMT's task sparsity loss."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import ops
from ..autograd import plain_backward
from . import common
from .products import expand_, shrink

_SMALLEST_NORM = 1e-8  # as torch.nn.functional.cosine_similarity
# Tokens: enough for a product to be worth its call, too few to be seen in memory; a launch is worth
# it for more.
_BLOCK, _GPU_BLOCK = 512, 16384


def expert_cosines(
    f: Tensor, hidden: Tensor, up_rows: Tensor, rotations: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """``cos(f, o_e)`` with every expert's output ``o_e = s_e B_e h_e``; B, s constants.

    In rank space: ``⟨f, B_e h_e⟩ = ⟨B_eᵀ f, h_e⟩`` and ``|B_e h_e| = |R_e h_e|``: no expert's
    output is made.  Of adapter experts b is a column of B, where h is 1, and the shared residual is
    left out (our choice: it says nothing about which expert is used).

    Args:
        f: ``[..., N]``.
        hidden: h ``[..., E, r]`` in float32 (float64 for float64 f).
        up_rows: Bᵀ ``[E, r, N]``, cast to f's dtype.
        rotations: :func:`expert_rotations` of `up_rows`.
        scales: s ``[E]``, in hidden's dtype like `rotations`.

    Returns:
        f, for whoever uses it from here on: its gradients meet here in one pass; and the cosines
        ``[..., E]`` in hidden's dtype; a norm below 1e-8 counts as 1e-8, as in PyTorch's
        ``cosine_similarity``.
    """
    return _Cosines.apply(common.backend_for(f), f, hidden, up_rows, rotations, scales)


def expert_rotations(up_rows: Tensor) -> Tensor:
    """``R_eᵀ`` of ``B_e = Q_e R_e`` for B ``[N, r]`` given by its rows of Bᵀ ``[E, r, N]``.

    ``|B_e h| = |R_e h|``, with r² numbers instead of N·r; unlike ``hᵀ B_eᵀ B_e h`` it is never
    negative and does not square the condition number.

    Returns:
        ``[E, r, r]`` in at least float32; if N < r, R has r - N rows of zeros.
    """
    wide = torch.promote_types(up_rows.dtype, torch.float32)
    factors = torch.linalg.qr(up_rows.detach().to(wide).transpose(1, 2), mode="r").R
    padding = (0, up_rows.shape[1] - factors.shape[1])
    return torch.nn.functional.pad(factors.transpose(1, 2), padding).contiguous()


class _Cosines(torch.autograd.Function):
    """``s ⟨g_e, h_e⟩ / (|s R_e h_e| |f|)`` with ``g = Bᵀ f``.

    Apart, each of f's three gradients (from its user, of g, of ``|f|``) would be a ``[T, N]`` of
    its own, and then be added.
    """

    @staticmethod
    def forward(ctx, backend, f, hidden, up_rows, rotations, scales):
        ctx.set_materialize_grads(False)
        ctx.backend = backend
        vectors, hidden = f.contiguous(), hidden.contiguous()
        rows = up_rows.flatten(0, 1).to(f.dtype)  # of another dtype under autocast
        forward = _cosines if backend == "reference" else ops.of(backend).cosines
        with torch.autocast(f.device.type, enabled=False):
            seen = shrink(vectors, rows)
            cosines, norms, f_norm = forward(vectors, seen, hidden.flatten(-2), rotations, scales)
        ctx.save_for_backward(
            vectors, hidden, rows, rotations, scales, seen, cosines, norms, f_norm
        )
        return f.detach(), cosines  # no view, which nobody could change in place

    @staticmethod
    @plain_backward
    def backward(ctx, df, dcosines):
        if dcosines is None:
            return None, df, None, None, None, None
        f, hidden, rows, rotations, scales, seen, cosines, norms, f_norm = ctx.saved_tensors
        backward = _cosines_backward
        if ctx.backend != "reference":
            backward = ops.of(ctx.backend).cosines_backward
        df_total, dhidden = f.new_empty(f.shape), hidden.new_empty(hidden.shape)
        each_token = [df_total, dhidden.flatten(-2), f, seen, hidden.flatten(-2)]
        each_token += [dcosines.contiguous(), cosines, norms, f_norm.unsqueeze(-1)]
        if df is not None:
            each_token.append(df.contiguous())
        # Through |R h| the gradient is along Rᵀ R h.
        grams = torch.bmm(rotations, rotations.transpose(1, 2))
        for out, dh, v, g, h, dc, c, n, m, *given in _row_blocks(*each_token):
            given, m = given[0] if given else None, m.squeeze(-1)
            dseen = backward(dc, given, v, g, h, grams, scales, c, n, m, out, dh)
            expand_(dseen, rows, out)
        return None, df_total, dhidden, None, None, None


def _row_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors' rows ``[..., columns]``, some at a time; their memory, not copies."""
    block = _BLOCK if tensors[0].device.type == "cpu" else _GPU_BLOCK
    return zip(*(t.view(-1, t.shape[-1]).split(block) for t in tensors), strict=True)


# ---------------------------------------------------------------- the operators in PyTorch


def _cosines(f, seen, hidden, rotations, scales):
    """``ops.cosines``."""
    E, r = rotations.shape[:2]
    per_expert = (*f.shape[:-1], E)
    f_norm = torch.linalg.vector_norm(f, dim=-1, dtype=hidden.dtype).flatten()
    cosines, norms = hidden.new_empty(per_expert), hidden.new_empty(per_expert)
    for c, n, g, h, m in _row_blocks(cosines, norms, seen, hidden, f_norm.unsqueeze(-1)):
        g, h = g.view(-1, E, r), h.view(-1, E, r)
        rotated = torch.bmm(h.transpose(0, 1), rotations)  # [E, t, r]
        torch.mul(rotated.norm(dim=-1).t(), scales.abs(), out=n)
        torch.mul((g * h).sum(-1), scales / _denominators(n, m), out=c)
    return cosines, norms, f_norm


def _cosines_backward(
    dcosines, df_given, f, seen, hidden, grams, scales, cosines, norms, f_norm, df, dhidden
):  # fmt: skip
    """``ops.cosines_backward``."""
    E, r = grams.shape[:2]
    h, m = hidden.view(-1, E, r), f_norm.unsqueeze(-1)
    product = dcosines * cosines
    # Where a norm is clamped it is a constant.
    along = torch.where(m > _SMALLEST_NORM, -product.sum(-1, keepdim=True) / m.square(), 0.0)
    if df_given is None:
        torch.mul(f, along, out=df)
    else:
        torch.addcmul(df_given, f, along, out=df)
    each = (dcosines * scales / _denominators(norms, m)).unsqueeze(-1)
    turn = torch.where(norms > _SMALLEST_NORM, product * (scales / norms).square(), 0.0)
    turned = torch.bmm(h.transpose(0, 1), grams).transpose(0, 1)
    dh = torch.mul(each, seen.view(-1, E, r), out=dhidden.view(-1, E, r))
    dh.addcmul_(turn.unsqueeze(-1), turned, value=-1)
    return (each * h).flatten(1)


def _denominators(norms: Tensor, f_norm: Tensor) -> Tensor:
    """Of the cosines: of neither norm less than the smallest."""
    return norms.clamp(min=_SMALLEST_NORM) * f_norm.clamp(min=_SMALLEST_NORM)
