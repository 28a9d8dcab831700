"""MoLE, literally: Wu et al., "Mixture of LoRA Experts" (2404.13628), for one linear's experts.

The paper gates whole transformer blocks (eqs. 5-13) and names matrix-wise gates as one of its
granularities; it releases no code.  This is the matrix-wise form, in which an expert is
``E_i(x) = s_i B_i A_i x``.  Every expert's output is materialised, as the paper writes it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import LooksLikeBase
from .mola import no_autocast


class Gating(NamedTuple):
    """By-products of a gate: what the gating balance loss needs.

    Attributes:
        prob_sums: ``[E]``, the gates summed over tokens, or over sequences for a gate per sequence;
            without padding; differentiable.
        rows: int64 scalar, how many were summed.
        expert_mask: bool ``[E]``, the experts that may be used.
    """

    prob_sums: Tensor
    rows: Tensor
    expert_mask: Tensor


def gating(gates: Tensor, expert_mask: Tensor, real: Tensor | None) -> Gating:
    """:class:`Gating` of gates ``[..., E]``; `real` bool ``[...]``, False for padding."""
    rows = gates.reshape(-1, gates.shape[-1])
    if real is None:
        count = torch.full((), len(rows), dtype=torch.int64, device=rows.device)
        return Gating(rows.sum(0), count, expert_mask)
    real = real.reshape(-1, 1)
    return Gating(rows.masked_fill(~real, 0).sum(0), real.sum(), expert_mask)


def expert_outputs(
    x: Tensor, lora_down: Tensor, lora_up: Tensor, scale: float | Tensor = 1.0
) -> Tensor:
    """``E_i(x) = s_i B_i A_i x`` of every expert, ``[..., E, N]`` in x's dtype."""
    num_experts = lora_down.shape[0]
    wide = torch.promote_types(x.dtype, torch.float32)
    scales = torch.as_tensor(scale, dtype=wide, device=x.device).expand(num_experts)
    outputs = [scales[e] * ((x @ lora_down[e].T) @ lora_up[e]) for e in range(num_experts)]
    return torch.stack(outputs, dim=-2).to(x.dtype)


def expert_hidden(x: Tensor, lora_down: Tensor) -> Tensor:
    """``A_i x`` of every expert, ``[..., E, r]``."""
    return torch.stack([x @ down.T for down in lora_down], dim=-2)


def mole_gates(
    outputs: Tensor,
    gate: Tensor,
    tau: float | Tensor,
    normalization: str = "l2",
    expert_mask: Tensor | None = None,
    *,
    mask_mode: str = "gate",
    granularity: str = "token",
    sequence_mask: Tensor | None = None,
    hidden: Tensor | None = None,
) -> Tensor:
    """``softmax(Flatten(Normalization(E_0 ⊕ … ⊕ E_{E-1}))ᵀ e / τ)`` (eqs. 9-11).

    Args:
        outputs: ``[..., E, N]`` of the experts; ``[..., length, E, N]`` for a gate per sequence.
        gate: e, ``[E, N, E]``: the last index is the expert whose logit it is.
        tau: the temperature.
        normalization, expert_mask, mask_mode, granularity, sequence_mask: see :func:`mole`.
        hidden: ``A_i x``, ``[..., E, r]``, for a compact gate, `gate` then being P ``[E, r, E]``:
            with ``P_i = s_i B_iᵀ e_i`` its logits are the same, with any P they are our variant.

    Returns:
        ``[..., E]``, without the length for a gate per sequence; float32, or wider if `outputs` is.
    """
    wide = torch.promote_types(outputs.dtype, torch.float32)
    outputs, gate = outputs.to(wide), gate.to(wide)
    features = outputs if hidden is None else hidden.to(wide)
    if granularity == "sequence":
        outputs, features = (sequence_mean(t, sequence_mask) for t in (outputs, features))
    if expert_mask is not None and mask_mode == "input":
        outputs, features = outputs[..., expert_mask, :], features[..., expert_mask, :]
        gate = gate[expert_mask]
    if normalization == "l2":
        features = features / outputs.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-12)
    elif normalization == "l2_per_expert":
        features = features / outputs.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    elif normalization == "layernorm" and hidden is None:
        features = F.layer_norm(outputs, outputs.shape[-2:])
    elif normalization != "none":
        raise ValueError(f"normalization: wanted one that fits the gate, got {normalization!r}")
    logits = features.flatten(-2) @ gate.flatten(0, 1) / tau
    if expert_mask is not None:
        logits = logits.masked_fill(~expert_mask, float("-inf"))
    return logits.softmax(-1)


def sequence_mean(values: Tensor, sequence_mask: Tensor | None) -> Tensor:
    """Mean of ``[..., length, a, b]`` over the positions that are not padding; zero without any."""
    if sequence_mask is None:
        return values.sum(-3) / max(values.shape[-3], 1)
    # Padding may hold anything, also NaN.
    padding = ~sequence_mask[..., None, None]
    return values.masked_fill(padding, 0).sum(-3) / (~padding).sum(-3).clamp(min=1)


def mole(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_down: Tensor,
    lora_up: Tensor,
    gate: Tensor,
    tau: float | Tensor,
    scale: float | Tensor = 1.0,
    normalization: str = "l2",
    expert_mask: Tensor | None = None,
    *,
    mask_mode: str = "gate",
    granularity: str = "token",
    sequence_mask: Tensor | None = None,
    compact: bool = False,
    base_output: Tensor | None = None,
    return_gates: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``y = x Wᵀ + b + Σ_i g_i E_i(x)``, gates g from the experts' outputs ``E_i = s_i B_i A_i x``.

    Args:
        x: ``[..., K]``; ``[..., length, K]`` for a gate per sequence.
        weight, bias: the frozen linear, ``[N, K]`` and ``[N]`` or None; ignored if `base_output`
            is given.
        lora_down: ``[E, r, K]``; A of expert i is ``lora_down[i]``.
        lora_up: ``[E, r, N]``; B of expert i is ``lora_up[i].T``.
        gate: e of eq. 10, ``[E, N, E]``.
        tau: the temperature of eq. 11.
        scale: ``s_i``, one number or ``[E]``.
        normalization: of eq. 9, which the paper leaves open: ``"l2"`` over the concatenation of all
            outputs (our choice), ``"l2_per_expert"``, ``"layernorm"`` over the concatenation,
            without affine parameters, or ``"none"``.  A norm below 1e-12 counts as 1e-12.
        expert_mask: bool ``[E]``, False removes an expert.
        mask_mode: ``"gate"``: removed experts still feed the gate, and the others share their
            weight in proportion (the paper's inference mode 2); ``"input"``: they are missing from
            the gate's input too, as if they had never been there (our choice).
        granularity: ``"token"`` a gate per token; ``"sequence"`` one per sequence, from the mean of
            the outputs over its tokens, pooled before they are normalised.  The paper has one per
            sequence, with rows of e for each position; both of ours fit any length (our choice).
        sequence_mask: bool, x's leading dimensions; False for padding, which a gate per sequence
            does not see.
        compact: `gate` is P ``[E, r, E]``, see :func:`mole_gates`.
        base_output: ``[..., N]``, the frozen layer's output if it is not a plain linear.
        return_gates: also return g.

    Returns:
        y ``[..., N]``, or y and g: ``[..., E]``, for a gate per sequence without the length.
    """
    outputs = expert_outputs(x, lora_down, lora_up, scale)
    hidden = expert_hidden(x, lora_down) if compact else None
    with no_autocast(x.device.type):
        gates = mole_gates(
            outputs, gate, tau, normalization, expert_mask, mask_mode=mask_mode,
            granularity=granularity, sequence_mask=sequence_mask, hidden=hidden,
        )  # fmt: skip
    y = F.linear(x, weight, bias) if base_output is None else base_output
    y = y + mixture(outputs, gates, granularity).to(y.dtype)
    return (y, gates) if return_gates else y


def mixture(outputs: Tensor, gates: Tensor, granularity: str) -> Tensor:
    """``Σ_i g_i E_i`` (eq. 12), ``[..., N]`` in the dtype of the gates."""
    weights = gates.unsqueeze(-2) if granularity == "sequence" else gates
    return (weights.unsqueeze(-1) * outputs).sum(-2)


class MoLELinear(LooksLikeBase, nn.Module):
    """What :class:`moelora_ops.nn.MoLELinear` is checked against: same arguments and state_dict."""

    def __init__(
        self,
        base: nn.Module,
        loras: Sequence[tuple[Tensor, Tensor, float]],
        granularity: str = "token",
        normalization: str = "l2",
        *,
        mask_mode: str = "gate",
        gated: bool = True,
        compact: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        weight = getattr(base, "weight", None)
        if isinstance(weight, Tensor):
            device = weight.device if device is None else device
            dtype = weight.dtype if dtype is None and weight.is_floating_point() else dtype
        like = {"device": device, "dtype": dtype}
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.granularity, self.normalization, self.mask_mode = granularity, normalization, mask_mode
        self.gated, self.compact = gated, compact
        self.scales = [float(scale) for _, _, scale in loras]
        self.num_experts, self.rank = len(loras), max(a.shape[0] for a, _, _ in loras)
        down = torch.zeros(self.num_experts, self.rank, self.in_features, **like)
        up = torch.zeros(self.num_experts, self.rank, self.out_features, **like)
        for i, (a, b, _) in enumerate(loras):
            down[i, : a.shape[0]] = a.detach()
            up[i, : a.shape[0]] = b.detach().T
        self.register_buffer("lora_down", down)
        self.register_buffer("lora_up", up)
        if gated:
            width = self.rank if compact else self.out_features
            wide = {"device": device, "dtype": torch.promote_types(down.dtype, torch.float32)}
            gate = torch.zeros(self.num_experts, width, self.num_experts, **wide)
            self.gate = nn.Parameter(gate)  # in 16 bits its small steps would be lost
            self.log_tau = nn.Parameter(torch.zeros(1, **wide))
            mask = torch.ones(self.num_experts, dtype=torch.bool, device=device)
            self.register_buffer("expert_mask", mask)
        self.shared_gate: tuple = ()
        self.sequence_mask: Tensor | None = None
        self.routing: Gating | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not self.gated:  # the weights come from a gate that several layers share
            gates = self.shared_gate[0].literal_gates(self, x)
            outputs = expert_outputs(x, self.lora_down, self.lora_up, self.scales)
            return y + mixture(outputs, gates, self.granularity).to(y.dtype)
        y, gates = mole(
            x, None, None, self.lora_down, self.lora_up, self.gate, self.log_tau.exp(), self.scales,
            self.normalization, self.expert_mask, mask_mode=self.mask_mode,
            granularity=self.granularity, sequence_mask=self.sequence_mask, compact=self.compact,
            base_output=y, return_gates=True,
        )  # fmt: skip
        real = self.sequence_mask
        if real is not None and self.granularity == "sequence":
            real = real.any(-1)
        self.routing = gating(gates, self.expert_mask, real)
        return y

    def __getstate__(self):
        # The last call's by-products belong to its autograd graph: not to be copied or pickled.
        return {**self.__dict__, "routing": None}
