"""MoLE as a stateless function, its gate in rank space."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops, reference
from ..autograd import OutputGateMixture, Shrink, output_gate_mixture
from . import common
from .products import linear_expand

MASK_MODES = ("gate", "input")
GRANULARITIES = ("token", "sequence")


class OutputFactors(NamedTuple):
    """What norms and means of the experts' outputs are made of in rank space.

    With s_i B_i = Q_i R_i the norm of an output s_i B_i H_i is |R_i H_i|: never negative, and
    without the squared condition number of a Gram matrix.

    Attributes:
        factors: ``[E, r, r]``, R_i; of the centred B_i for a LayerNorm.
        means: ``[E * r]``, the mean of each column of s_i B_i; None unless for a LayerNorm.
    """

    factors: Tensor
    means: Tensor | None


@torch.no_grad()
def output_factors(
    lora_up: Tensor, scale: float | Tensor | Sequence[float] = 1.0, centered: bool = False
) -> OutputFactors:
    """:class:`OutputFactors` of frozen experts, to be computed once.

    Args:
        lora_up: ``[E, r, N]``.
        scale: s_i, one number or ``[E]``.
        centered: for ``normalization="layernorm"``.
    """
    num_experts, rank, out_features = lora_up.shape
    scales = common.expert_scales(scale, num_experts, lora_up)
    # In float64, as an error here is the same for every token and does not average out.
    up = lora_up.double() * (scales.view(-1, 1, 1) if isinstance(scales, Tensor) else scales)
    means = up.mean(-1, keepdim=True)
    if centered:
        up = up - means
    factors = up.new_zeros(num_experts, rank, rank)
    factors[:, : min(rank, out_features)] = torch.linalg.qr(up.mT, mode="r").R
    wide = ops.accumulator_dtype(lora_up.dtype)
    return OutputFactors(factors.to(wide), means.flatten().to(wide) if centered else None)


def mole(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_down: Tensor,
    lora_up: Tensor,
    gate: Tensor,
    tau: float | Tensor,
    scale: float | Tensor | Sequence[float] = 1.0,
    normalization: str = "l2",
    expert_mask: Tensor | None = None,
    *,
    mask_mode: str = "gate",
    granularity: str = "token",
    sequence_mask: Tensor | None = None,
    compact: bool = False,
    factors: OutputFactors | None = None,
    base_output: Tensor | None = None,
    return_gates: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """A frozen linear plus frozen LoRAs, gated on their outputs (MoLE, 2404.13628, eqs. 9-12).

    In PyTorch, for a gate per token and ``normalization="l2"``::

        outputs = stack([scale * x @ lora_down[i].T @ lora_up[i] for i in range(E)], dim=-2)
        features = outputs.flatten(-2) / outputs.flatten(-2).norm(dim=-1, keepdim=True)
        g = softmax(features @ gate.flatten(0, 1) / tau)
        y = F.linear(x, weight, bias) + (g[..., None] * outputs).sum(-2)

    but no ``[..., E, N]`` tensor is made: the gate is computed from the experts' hidden.

    Args:
        x: ``[..., K]``; ``[batch, length, K]`` for a gate per sequence.
        weight: ``[N, K]`` or None if `base_output` is given.  Gets a gradient if it requires one.
        bias: ``[N]`` or None.
        lora_down: ``[E, r, K]``, frozen; LoRAs of different ranks are padded with zero rows.
        lora_up: ``[E, r, N]``, frozen.
        gate: e, ``[E, N, E]``; the last index is the expert whose logit it is.  Any floating dtype.
        tau: the temperature, a positive number or a tensor of one element.
        scale: s_i, one number or ``[E]``; not trained.
        normalization: ``"l2"`` over the concatenation of all outputs, ``"l2_per_expert"``,
            ``"layernorm"`` over the concatenation without affine parameters, or ``"none"``.  The
            paper leaves it open (our choice); a norm below 1e-12 counts as 1e-12.
        expert_mask: bool ``[E]``, False removes an expert; at least one must stay.
        mask_mode: ``"gate"``: removed experts still feed the gate; ``"input"``: they do not.
        granularity: ``"token"``, or ``"sequence"``: from the mean of the outputs over a sequence's
            tokens, pooled before they are normalised.
        sequence_mask: bool ``[batch, length]``, False for padding, which a gate per sequence does
            not see.
        compact: `gate` is P ``[E, r, E]`` of the rank-space gate itself (our variant; not with
            ``"layernorm"``).
        factors: of :func:`output_factors`, to save their computation in every call.
        base_output: ``[..., N]``, output of a frozen layer that is not a plain linear; replaces
            weight and bias.
        return_gates: also return g.

    Returns:
        y ``[..., N]`` in x's dtype, or y and g: ``[..., E]`` (``[batch, E]`` per sequence) in
        float32.  Differentiable with respect to x, `gate`, `tau` and the frozen linear.

    Under autocast x, the experts and the linear are cast to the autocast dtype first.

    Raises:
        TypeError: an argument has another dtype than x, or is no tensor.
        ValueError: a shape, device or value is out of range, or the experts require a gradient; the
            message names the argument.
        RuntimeError: a back end was forced that cannot run here.
    """
    low = common.autocast_dtype(x)
    if low is not None:
        x, weight, bias, lora_down, lora_up, base_output = common.autocast(
            low, x, weight, bias, lora_down, lora_up, base_output
        )
    num_experts, rank, _, out_features = common.check_experts(x, lora_down, lora_up)
    common.check_tensors(
        x, out_features, weight, bias, base_output, ("lora_down", lora_down, lora_down.shape),
        ("lora_up", lora_up, lora_up.shape),
    )  # fmt: skip
    for name, t in (("lora_down", lora_down), ("lora_up", lora_up)):
        if t.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: wanted frozen experts, but it requires a gradient")
    common.check_one_of("normalization", normalization, common.NORMALIZATIONS)
    common.check_one_of("mask_mode", mask_mode, MASK_MODES)
    common.check_one_of("granularity", granularity, GRANULARITIES)
    if compact and normalization == "layernorm":
        raise ValueError("normalization: wanted another than 'layernorm' for a compact gate")
    common.check_floating("gate", gate, x.device)
    width = rank if compact else out_features
    if gate.shape != (num_experts, width, num_experts):
        raise ValueError(
            f"gate: wanted shape {[num_experts, width, num_experts]}, got {common.shape(gate)}"
        )
    _check_tau(tau, x)
    _check_masks(expert_mask, sequence_mask, x, num_experts, granularity)
    scales = common.expert_scales(scale, num_experts, x)
    backend = common.backend_for(x, "output_gate")
    if backend == "reference":
        with reference.no_autocast(x.device.type):
            return reference.mole(
                x, weight, bias, lora_down, lora_up, gate, tau, scales, normalization, expert_mask,
                mask_mode=mask_mode, granularity=granularity, sequence_mask=sequence_mask,
                compact=compact, base_output=base_output, return_gates=return_gates,
            )  # fmt: skip

    wide = ops.accumulator_dtype(x.dtype)
    with reference.no_autocast(x.device.type):
        if not isinstance(scales, Tensor):
            scales = torch.full((num_experts,), scales, dtype=wide, device=x.device)
        if factors is None:
            factors = output_factors(lora_up, scales, normalization == "layernorm")
        if not isinstance(tau, Tensor):
            tau = torch.full((1,), tau, dtype=wide, device=x.device)
        tau = tau.to(wide).reshape(1)
        unfed = ~expert_mask if expert_mask is not None and mask_mode == "input" else None
        projection = gate_projection(gate, lora_up, scales, normalization, compact, unfed)
        space = RankSpace(
            projection,
            tau,
            factors,
            scales,
            expert_mask,
            normalization,
            mask_mode == "input",
            out_features,
        )
        if granularity == "sequence":
            return _mole_per_sequence(
                backend, x, weight, bias, lora_down, lora_up, base_output, space, sequence_mask,
                return_gates,
            )  # fmt: skip
        y, gates, *_ = common.run_mixture(
            output_gate_mixture, OutputGateMixture, backend, x, weight, bias, base_output,
            out_features, lora_down.contiguous(), lora_up.contiguous(), projection, tau,
            factors.factors, factors.means, scales, expert_mask, ops.NORMALIZATIONS[normalization],
            mask_mode == "input",
        )  # fmt: skip
    return (y, gates.view(*x.shape[:-1], num_experts)) if return_gates else y


class RankSpace(NamedTuple):
    """A gate for one call: see csrc/mix/output_gate.h, which names them alike.

    Several linears with the same x are one here, whose A are stacked and whose B are the blocks of
    a diagonal (:class:`moelora_ops.nn.SharedGate`).
    """

    projection: Tensor
    tau: Tensor
    factors: OutputFactors
    scales: Tensor
    mask: Tensor | None
    normalization: str
    mask_input: bool
    out_features: int

    def gates(self, hidden: Tensor) -> Tensor:
        """``[..., E * r]`` to ``[..., E]``: docs/math.md, "output_gate", for a few rows."""
        num_experts = len(self.scales)
        per_expert = hidden.unflatten(-1, (num_experts, -1))
        outputs = torch.einsum("eij,...ej->...ei", self.factors.factors, per_expert)
        feeds = self.mask if self.mask_input and self.mask is not None else None
        if feeds is not None:
            outputs = outputs * feeds[:, None]
            per_expert = per_expert * feeds[:, None]
        if self.normalization == "l2":
            per_expert = per_expert / _norm(outputs, (-2, -1)).clamp_min(1e-12)
        elif self.normalization == "l2_per_expert":
            per_expert = per_expert / _norm(outputs, (-1,)).clamp_min(1e-12)
        features = per_expert.flatten(-2)
        if self.normalization == "layernorm":
            features = self._layer_norm(per_expert, outputs, feeds)
        logits = features @ self.projection / self.tau
        if self.mask is not None:
            logits = logits.masked_fill(~self.mask, float("-inf"))
        return logits.softmax(-1)

    def _layer_norm(self, hidden: Tensor, outputs: Tensor, feeds: Tensor | None) -> Tensor:
        means = (self.factors.means.view(hidden.shape[-2:]) * hidden).sum(-1)
        count = hidden.shape[-2] if feeds is None else feeds.sum()
        mean = means.sum(-1, keepdim=True) / count
        spread = (means - mean).square()
        if feeds is not None:
            spread = spread * feeds
        variance = (outputs.square().sum((-2, -1)) / self.out_features + spread.sum(-1)) / count
        deviation = (variance + 1e-5).sqrt().unsqueeze(-1)
        return torch.cat([hidden.flatten(-2), mean], -1) / deviation


def _norm(t: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Euclidean norm, whose gradient at zero is zero."""
    return torch.linalg.vector_norm(t, dim=dims, keepdim=True)


def gate_projection(
    gate: Tensor,
    lora_up: Tensor,
    scales: Tensor,
    normalization: str,
    compact: bool,
    unfed: Tensor | None,
) -> Tensor:
    """P ``[E * r, E]``: ``s_i B_iᵀ e_i``, and for a LayerNorm one more row, ``-Σ_i 1ᵀ e_i``."""
    if compact:
        return gate.to(scales.dtype).flatten(0, 1)
    # An error in P is the same for every token and does not average out; beside 16-bit experts it
    # is nothing.
    precise = torch.float32 if lora_up.dtype.itemsize < 4 else torch.float64
    gate = gate.to(precise)
    if unfed is not None:
        gate = gate.masked_fill(unfed[:, None, None], 0)
    rows = torch.bmm(lora_up.to(precise), gate) * scales.to(precise)[:, None, None]
    rows = rows.flatten(0, 1)
    if normalization == "layernorm":
        rows = torch.cat([rows, -gate.sum((0, 1)).unsqueeze(0)])
    return rows.to(scales.dtype)


def _mole_per_sequence(
    backend, x, weight, bias, lora_down, lora_up, base_output, space, sequence_mask, return_gates
):
    """Shrink, then the gate of each sequence's mean, then expand: weights need every position."""
    down, up = lora_down.flatten(0, 1).contiguous(), lora_up.flatten(0, 1).contiguous()
    grad = torch.is_grad_enabled()
    rows = x.contiguous()
    hidden = Shrink.apply(backend, rows, down) if grad else ops.of(backend).shrink(rows, down)
    gates = space.gates(sequence_mean(hidden, sequence_mask))
    per_row = (gates * space.scales).repeat_interleave(lora_down.shape[1], -1)
    mixed = hidden * per_row.unsqueeze(-2)
    y = linear_expand(rows, weight, bias, mixed, up, base_output=base_output)
    return (y, gates) if return_gates else y


def sequence_mean(hidden: Tensor, sequence_mask: Tensor | None) -> Tensor:
    """Mean of ``[..., length, R]`` over the positions that are not padding; zero without any."""
    if sequence_mask is None:
        return hidden.sum(-2) / max(hidden.shape[-2], 1)
    # Padding may hold anything, also NaN.
    padding = ~sequence_mask.unsqueeze(-1)
    return hidden.masked_fill(padding, 0).sum(-2) / (~padding).sum(-2).clamp(min=1)


def _check_tau(tau: float | Tensor, x: Tensor) -> None:
    if isinstance(tau, Tensor):
        common.check_floating("tau", tau, x.device)
        if tau.numel() != 1:
            raise ValueError(f"tau: wanted one element, got {common.shape(tau)}")
    elif not common.is_number(tau) or not 0 < tau < float("inf"):
        raise ValueError(f"tau: wanted a positive finite number, got {tau!r}")


def _check_masks(expert_mask, sequence_mask, x, num_experts, granularity) -> None:
    if expert_mask is not None:
        if not isinstance(expert_mask, Tensor) or expert_mask.dtype != torch.bool:
            got = expert_mask.dtype if isinstance(expert_mask, Tensor) else type(expert_mask)
            raise TypeError(f"expert_mask: wanted a bool tensor, got {got}")
        if expert_mask.shape != (num_experts,):
            raise ValueError(
                f"expert_mask: wanted shape [{num_experts}], got {common.shape(expert_mask)}"
            )
        if expert_mask.device != x.device:
            raise ValueError(f"expert_mask: wanted device {x.device}, got {expert_mask.device}")
        # Reading it would make a GPU wait and stop a graph from being traced.
        readable = x.device.type == "cpu" and not torch.compiler.is_compiling()
        if readable and not expert_mask.any():
            raise ValueError("expert_mask: removes every expert")
    if granularity == "sequence" and x.dim() < 2:
        raise ValueError(f"x: wanted [..., length, in_features], got {common.shape(x)}")
    if sequence_mask is None:
        return
    if not isinstance(sequence_mask, Tensor) or sequence_mask.dtype != torch.bool:
        raise TypeError("sequence_mask: wanted a bool tensor")
    if sequence_mask.shape != x.shape[:-1]:
        raise ValueError(
            f"sequence_mask: wanted shape {list(x.shape[:-1])}, got {common.shape(sequence_mask)}"
        )
