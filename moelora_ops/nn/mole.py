"""MoLE: trained, frozen LoRAs of one linear, mixed by a gate that sees their outputs (2404.13628).

The gate's input is what the experts say, yet nothing as long as an output is made for it: with
``o_i = s_i B_i h_i`` its products are ``h_iᵀ P_i``, ``P_i = s_i B_iᵀ e_i``, and its norms
``|R_i h_i|``, R_i the triangular factor of ``s_i B_i`` (docs/math.md, "MoLE").
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import functional, reference
from ..functional.mole import OutputFactors, gate_projection, output_factors
from .base import AdapterLinear
from .kept import state_of, to_be_kept
from .loras import stack_loras
from .mole_gate import (
    GATE_STATE,
    check_arguments,
    checked_expert_mask,
    gating_of,
    new_gate,
    tau_of,
)


class Derived(NamedTuple):
    """What follows from a layer's frozen experts.

    Attributes:
        state: of ``lora_up`` at the time, see :func:`state_of`.
        scales: ``[E]`` in float32 or wider.
        factors: of :func:`output_factors`.
    """

    state: tuple
    scales: Tensor
    factors: OutputFactors


class MoLELinear(AdapterLinear):
    """``y = base(x) + Σ_i g_i s_i B_i A_i x``, g from the experts' outputs, fused.

    With one expert g is 1 and the layer that LoRA.  The paper's equations gate whole transformer
    blocks, where not even a single LoRA would come out as itself; this is the matrix-wise gate that
    it also names (our default).  For gates that several linears share see
    :class:`moelora_ops.nn.SharedGate`, for the equations to the letter
    :class:`moelora_ops.nn.MoLEBlock`.

    Args:
        base: the frozen layer, see :class:`AdapterLinear`.
        loras: (A ``[r, in_features]``, B ``[out_features, r]``, scale) of each expert; ranks may
            differ and are padded with zeros.  Copied, and frozen.
        granularity: ``"token"``, a gate per token (our default: causal, and right for any
            batching), or ``"sequence"``, one per sequence from the mean over its tokens (nearer to
            the paper): every token then sees all others of its sequence, also later ones, and with
            a cache of keys and values the sequence is what one call is given.
        normalization: of the experts' outputs, which the paper leaves open: ``"l2"`` over their
            concatenation (our choice), ``"l2_per_expert"``, ``"layernorm"`` over the concatenation
            without affine parameters, ``"none"``.
        mask_mode: what `expert_mask` does: ``"gate"``: the removed experts still feed the gate, the
            others share their weight in proportion (the paper's inference mode 2); ``"input"``:
            they are missing from its input too, and cheaper models can leave them out.
        gated: False for a linear whose weights come from a :class:`SharedGate`.
        compact: train P itself, ``[E, r, E]``, instead of the paper's e.  The same functions can be
            learned with far fewer numbers, but an optimiser moves differently in them: a variant
            of ours.  Not with ``"layernorm"``.
        device, dtype: of the experts; by default those of the base.  The gate is float32 at least:
            in 16 bits its small steps would be lost (our choice).

    Parameters (if gated):
        gate: e of eq. 10, ``[E, out_features, E]``, or P if compact; zero, so that all experts have
            the same weight at first (our choice).
        log_tau: ``[1]``, the logarithm of the temperature, zero (our choice; the paper learns τ).

    Buffers:
        lora_down: ``[E, r, in_features]``.
        lora_up: ``[E, r, out_features]``, the B transposed.  What follows from it is computed once
            and again after a change in place (not by compiled code); one through ``.data`` goes
            unnoticed (of the gate until the next :meth:`train` or :meth:`eval`).
        expert_mask: bool ``[E]`` (if gated), may be assigned at any time, also as a list; False
            removes an expert.

    Attributes:
        sequence_mask: bool, x's leading dimensions, False for padding: not seen by a gate per
            sequence, nor by :func:`moelora_ops.gating_balance_loss`; set it for a whole model with
            :func:`moelora_ops.sequence_mask`.

    The state_dict is that of :class:`moelora_ops.reference.MoLELinear`.

    Shapes: x ``[..., in_features]``, or ``[..., length, in_features]`` for a gate per sequence, to
    y of the same leading dimensions.

    Raises:
        TypeError, ValueError: an argument is out of range; the message names it, and of `loras`
            which one.
    """

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
        check_arguments(granularity, normalization, mask_mode, gated, compact)
        sizes = [getattr(base, name, None) for name in ("in_features", "out_features")]
        if all(isinstance(size, int) for size in sizes):  # else the next line says so
            stack_loras(loras, *sizes, device="meta")  # raises before the base is frozen
        super().__init__(base, device, dtype)
        down, up, self.scales = stack_loras(loras, self.in_features, self.out_features, **self._new)
        self.num_experts, self.rank = down.shape[:2]
        self.granularity, self.normalization, self.mask_mode = granularity, normalization, mask_mode
        self.gated, self.compact = gated, compact
        self.register_buffer("lora_down", down)
        self.register_buffer("lora_up", up)
        if gated:
            width = self.rank if compact else self.out_features
            new_gate(self, width, self.num_experts, **self._new)
        self.shared_gate: tuple[nn.Module, ...] = ()  # a tuple, not to be registered
        self.sequence_mask: Tensor | None = None
        self._forget()

    def __setattr__(self, name: str, value) -> None:
        if name == "expert_mask":
            value = checked_expert_mask(value, self)
        elif name == "lora_up":
            self._forget()
        elif name == "gate":  # FSDP2 does so before and after each call
            self._kept = None
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., in_features]`` to y ``[..., out_features]``."""
        if not self.gated:
            if not self.shared_gate:
                raise RuntimeError("gated: is False, but no SharedGate is connected to this layer")
            return self.shared_gate[0].run(self, x)
        known = self.derived()
        gate, compact = self.gate, self.compact
        if torch.is_grad_enabled():
            self._kept = None  # what follows may be a step of a fused optimiser, see state_of
        if not compact and self._may_keep_projection():
            gate, compact = self._projection(known.scales), True
        y, gates = functional.mole(
            x, lora_down=self.lora_down, lora_up=self.lora_up, gate=gate, tau=tau_of(self),
            scale=known.scales, normalization=self.normalization, expert_mask=self.expert_mask,
            mask_mode=self.mask_mode, granularity=self.granularity,
            sequence_mask=self.sequence_mask, compact=compact, factors=known.factors,
            return_gates=True, **self.base_arguments(x),
        )  # fmt: skip
        return self._record(y, gating_of(self, gates))

    def derived(self) -> Derived:
        """What follows from the frozen experts, computed once."""
        # Compiled code cannot ask for a version; there only what replaces the experts is noticed.
        known = self._derived
        if known is None or not (
            torch.compiler.is_compiling() or known.state == state_of(self.lora_up)
        ):
            known = self._derived = _derive(self)
        return known

    def _may_keep_projection(self) -> bool:
        """Whether P, which costs more than a token, can be kept between calls."""
        return not (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or self.normalization == "layernorm"
        )

    def _projection(self, scales: Tensor) -> Tensor:
        """P ``[E, r, E]`` of the present gate."""
        key = state_of(self.gate, self.lora_up)
        if self._kept is None or self._kept[0] != key:
            with to_be_kept(), reference.no_autocast(self.gate.device.type):
                rows = gate_projection(
                    self.gate, self.lora_up, scales, self.normalization, False, None
                )
            self._kept = key, rows.unflatten(0, (self.num_experts, self.rank))
        return self._kept[1]

    def _forget(self) -> None:
        """Whatever was computed from the experts and the gate and kept."""
        self._derived: Derived | None = None
        self._kept: tuple[tuple[int, ...], Tensor] | None = None

    def train(self, mode: bool = True) -> "MoLELinear":
        """See ``nn.Module.train``."""
        # A gate that is written through .data, as averages of weights are for an evaluation, keeps
        # its version.
        self._kept = None
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self._forget()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    @classmethod
    def from_reference(cls, layer: reference.MoLELinear) -> "MoLELinear":
        """The fused layer that shares `layer`'s base, experts and parameters."""
        with torch.device("meta"):
            shape = {"rank": layer.rank, "scales": layer.scales}
            loras = empty_loras(layer.in_features, layer.out_features, **shape)
        fused = cls(
            layer.base, loras, layer.granularity, layer.normalization, mask_mode=layer.mask_mode,
            gated=layer.gated, compact=layer.compact, device="meta",
        )  # fmt: skip
        for name in ("lora_down", "lora_up", *(GATE_STATE if layer.gated else ())):
            setattr(fused, name, getattr(layer, name))
        fused.shared_gate, fused.sequence_mask = layer.shared_gate, layer.sequence_mask
        return fused.train(layer.training)

    def __getstate__(self):
        return {**super().__getstate__(), "_derived": None, "_kept": None}

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"num_experts={self.num_experts}, rank={self.rank}, granularity={self.granularity}, "
            f"normalization={self.normalization}, mask_mode={self.mask_mode}"
            + (", compact" if self.compact else "")
            + ("" if self.gated else ", shared gate")
        )


def _derive(layer: MoLELinear) -> Derived:
    with to_be_kept():
        up = layer.lora_up.detach()
        wide = torch.promote_types(up.dtype, torch.float32)
        scales = torch.tensor(layer.scales, dtype=wide, device=up.device)
        factors = output_factors(up, scales, layer.normalization == "layernorm")
    return Derived(state_of(layer.lora_up), scales, factors)


def empty_loras(
    in_features: int, out_features: int, *, rank: int, scales: Sequence[float]
) -> list[tuple[Tensor, Tensor, float]]:
    """LoRAs without values, of the shapes that a layer with this rank and these scales has."""
    return [(torch.empty(rank, in_features), torch.empty(out_features, rank), s) for s in scales]
