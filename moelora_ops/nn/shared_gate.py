"""Layer-, block- and network-wise MoLE: one gate for several linears (2404.13628)."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import balance, functional, reference
from ..companions import Companion, plain_name
from ..functional.mole import (
    OutputFactors,
    RankSpace,
    gate_projection,
    output_factors,
    sequence_mean,
)
from ..reference import Gating
from .checks import check_count, check_dtype
from .kept import state_of, to_be_kept
from .mole import Derived, MoLELinear
from .mole_gate import check_arguments, checked_expert_mask, gating_of, new_gate, tau_of


class SharedGate(Companion):
    """One gate for several :class:`MoLELinear`: layer-, block- and network-wise MoLE.

    Its input is the concatenation of the outputs of the experts of its *leaders*, linears that see
    the same x (query, key and value; gate and up projection): every expert is as wide there as all
    of them together.  With leaders alone this is the layer-wise gate.  *Followers* are further
    linears that take over the weights as they are: the rest of the block, or of the network.

    That is our choice, as the paper defines the wider gates by running whole blocks once per
    expert.  Ours costs nothing beyond the experts, is causal per token, and with one expert is that
    LoRA.  A follower needs the same tokens as the leaders, and to run after them.

    What the weights are is a function of x and the parameters alone: leaders that get the same
    tensor share the work, and one that gets another tensor is gated by that.

    Args:
        leaders, followers: qualified names of the layers, see :meth:`attach`.
        out_features: of each leader.
        ranks: of each leader.
        num_experts: E.
        granularity, normalization, mask_mode, compact: see :class:`MoLELinear`.
        device, dtype: of the parameters, float32 at least.

    Parameters and buffers:
        gate: ``[E, Σ out_features, E]``, or ``[E, Σ ranks, E]`` if compact; zero.
        log_tau: ``[1]``, zero.
        expert_mask: bool ``[E]``.

    Limits: under gradient checkpointing the leaders must be in one checkpointed part, since what is
    computed again must be what was computed; with the reentrant mode the followers too (a block's
    are; for a network-wise gate use the other mode).
    """

    arguments: ClassVar[tuple[str, ...]] = (
        "leaders", "followers", "out_features", "ranks", "num_experts", "granularity",
        "normalization", "mask_mode", "compact",
    )  # fmt: skip

    def __init__(
        self,
        leaders: Sequence[str],
        followers: Sequence[str],
        out_features: Sequence[int],
        ranks: Sequence[int],
        num_experts: int,
        granularity: str = "token",
        normalization: str = "l2",
        mask_mode: str = "gate",
        compact: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_arguments(granularity, normalization, mask_mode, True, compact)
        _check_names("leaders", leaders, at_least=1)
        _check_names("followers", followers, at_least=0)
        for name, values in (("out_features", out_features), ("ranks", ranks)):
            good = isinstance(values, Sequence) and all(type(v) is int and v > 0 for v in values)
            if not good or len(values) != len(leaders):
                raise ValueError(
                    f"{name}: wanted a positive int for each of {len(leaders)} leaders, "
                    f"got {values!r}"
                )
        check_count("num_experts", num_experts)
        self.leaders, self.followers = list(leaders), list(followers)
        self.out_features, self.ranks = list(out_features), list(ranks)
        self.num_experts = num_experts
        self.granularity, self.normalization, self.mask_mode = granularity, normalization, mask_mode
        self.compact = compact
        width = sum(self.ranks if compact else self.out_features)
        new_gate(self, width, num_experts, device=device, dtype=dtype)
        self.sequence_mask: Tensor | None = None
        self.routing: Gating | None = None
        self.dprob_sums: Tensor | None = None  # see balance.record
        self._members: tuple[nn.Module, ...] = ()  # the leaders; not to be registered
        self._forget()

    def __setattr__(self, name: str, value) -> None:
        if name == "expert_mask":
            value = checked_expert_mask(value, self)
        if name in ("expert_mask", "sequence_mask"):
            self._seen = None
        super().__setattr__(name, value)

    def attach(self, model: nn.Module, layers: dict[str, nn.Module]) -> None:
        """Connect with the layers of the names that the constructor got."""
        plain = {plain_name(name): layer for name, layer in layers.items()}
        leaders, followers = (
            [plain[name] for name in names if name in plain]
            for names in (self.leaders, self.followers)
        )
        self.connect(leaders, followers)

    def connect(self, leaders: Sequence[nn.Module], followers: Sequence[nn.Module] = ()) -> None:
        """Give `leaders` and `followers` this gate; layers made with ``gated=False``."""
        self._members = tuple(leaders)
        self._forget()
        for layer in (*leaders, *followers):
            layer.shared_gate = (self,)

    def run(self, layer: MoLELinear, x: Tensor) -> Tensor:
        """The output of one of its layers."""
        index = _position(layer, self._members)
        if index is None:
            weights = self._take_over(layer, x)
            if self.granularity == "sequence" and x.dim() != 3:  # x [..., length, in_features]
                weights = weights.unsqueeze(-2).expand(*x.shape[:-1], -1)
            return functional.gated(
                x, lora_down=layer.lora_down, lora_up=layer.lora_up, weights=weights,
                scale=layer.derived().scales, **layer.base_arguments(x),
            )  # fmt: skip
        state = torch.is_grad_enabled(), state_of(x, self.gate, self.log_tau, self.expert_mask)
        is_first = self._input is not x or self._seen != state or index not in self._hidden
        if is_first:
            self._hidden = self._gate(x)
            self._input, self._seen = x, state
        weights = self.gates * layer.derived().scales
        if self.granularity == "sequence":
            weights = weights.unsqueeze(-2)
        mixed = (self._hidden.pop(index) * weights.unsqueeze(-1)).flatten(-2)
        if not self._hidden:
            self._input = None  # held no longer than needed
        up_rows = layer.lora_up.flatten(0, 1)
        y = functional.linear_expand(x, hidden=mixed, rows=up_rows, **layer.base_arguments(x))
        if is_first:
            y, self.routing = balance.record(self, y, gating_of(self, self.gates))
        return y

    def _gate(self, x: Tensor) -> dict[int, Tensor]:
        """Sets the gates for x; returns the hidden ``[..., E, r]`` of each leader."""
        _check_sequences(self, x)
        leaders = self._members
        check_dtype(x, leaders[0].lora_down)
        hidden = [
            functional.shrink(x, layer.lora_down.flatten(0, 1)).unflatten(
                -1, (self.num_experts, layer.rank)
            )
            for layer in leaders
        ]
        # An expert's outputs in all leaders are one output, of a LoRA whose A are stacked and whose
        # B are the blocks of a diagonal: the gate is that of one linear.
        together = torch.cat(hidden, -1).flatten(-2)
        if self.granularity == "sequence":
            together = sequence_mean(together, self.sequence_mask)
        with reference.no_autocast(x.device.type):
            space = RankSpace(
                self._projection(together.dtype), tau_of(self).to(together.dtype),
                self._block_factors(),
                self.log_tau.new_ones(self.num_experts), self.expert_mask, self.normalization,
                self.mask_mode == "input", sum(self.out_features),
            )  # fmt: skip
            self.gates = space.gates(together)
        return dict(enumerate(hidden))

    def _projection(self, wide: torch.dtype) -> Tensor:
        """P of all leaders, by expert and then by leader."""
        if self.compact:
            return self.gate.to(wide).flatten(0, 1)
        unfed = ~self.expert_mask if self.mask_mode == "input" else None
        blocks, rest = [], []
        parts = self.gate.split(self.out_features, 1)
        for leader, part in zip(self._members, parts, strict=True):
            rows = gate_projection(
                part, leader.lora_up, leader.derived().scales, self.normalization, False, unfed
            )
            own = self.num_experts * leader.rank
            blocks.append(rows[:own].unflatten(0, (self.num_experts, leader.rank)))
            rest.append(rows[own:])
        return torch.cat([torch.cat(blocks, 1).flatten(0, 1), sum(rest)])

    def _block_factors(self) -> OutputFactors:
        """The factors of the one linear that the leaders are together, computed once."""
        parts = tuple(leader.derived() for leader in self._members)
        if self._factors is None or not (
            torch.compiler.is_compiling()
            or all(old is new for old, new in zip(self._factors[0], parts, strict=True))
        ):
            with to_be_kept():
                scaled = [
                    leader.lora_up.to(part.scales.dtype) * part.scales[:, None, None]
                    for leader, part in zip(self._members, parts, strict=True)
                ]
                blocks = torch.stack([torch.block_diag(*ups) for ups in zip(*scaled, strict=True)])
                centered = self.normalization == "layernorm"
                self._factors = parts, output_factors(blocks, 1.0, centered)
        return self._factors[1]

    def literal_gates(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The gates for a reference layer: everything materialised, nothing kept."""
        if _position(layer, self._members) is None:
            return self._take_over(layer, x)
        leaders = self._members
        outputs = [
            reference.expert_outputs(x, leader.lora_down, leader.lora_up, leader.scales)
            for leader in leaders
        ]
        hidden = [reference.expert_hidden(x, leader.lora_down) for leader in leaders]
        self.gates = reference.mole_gates(
            torch.cat(outputs, -1), self.gate, self.log_tau.exp(), self.normalization,
            self.expert_mask, mask_mode=self.mask_mode, granularity=self.granularity,
            sequence_mask=self.sequence_mask,
            hidden=torch.cat(hidden, -1) if self.compact else None,
        )  # fmt: skip
        self.routing = gating_of(self, self.gates)
        return self.gates

    def _take_over(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The gates for a follower."""
        gates = self.gates
        if gates is None:
            raise RuntimeError(
                f"shared gate: a follower ran before the leaders {self.leaders} have run"
            )
        lead = x.shape[: -2 if self.granularity == "sequence" else -1]
        if gates.shape[:-1] != lead:
            raise ValueError(
                f"x: wanted leading dimensions {list(gates.shape[:-1])} like those of the gate's "
                f"leaders, got {list(lead)}; such a linear needs a gate of its own"
            )
        if (
            torch.is_grad_enabled()
            and self.training
            and self.gate.requires_grad
            and not gates.requires_grad
        ):
            raise RuntimeError(
                "shared gate: the leaders ran without a graph, so that this follower would not "
                "train the gate; checkpoint with use_reentrant=False"
            )
        return gates

    def _apply(self, fn, recurse=True):
        self._forget()
        return super()._apply(fn, recurse)

    def _forget(self) -> None:
        self.gates: Tensor | None = None
        self._factors: tuple[tuple[Derived, ...], OutputFactors] | None = None
        self._input: Tensor | None = None
        self._seen: tuple | None = None  # under which the input was gated
        self._hidden: dict[int, Tensor] = {}

    def __getstate__(self):
        # What belongs to the last call's graph is not to be copied or pickled.
        names = ("routing", "dprob_sums", "gates", "_factors", "_input")
        return {**self.__dict__, **dict.fromkeys(names), "_hidden": {}}

    def extra_repr(self) -> str:
        return (
            f"{len(self.leaders)} leaders, {len(self.followers)} followers, "
            f"num_experts={self.num_experts}, granularity={self.granularity}, "
            f"normalization={self.normalization}, mask_mode={self.mask_mode}"
            + (", compact" if self.compact else "")
        )


def _check_sequences(holder: nn.Module, x: Tensor) -> None:
    """x and the sequence mask fit together."""
    if holder.granularity == "sequence" and x.dim() < 2:
        raise ValueError(
            f"x: wanted shape [..., length, in_features] for a gate per sequence, "
            f"got {list(x.shape)}"
        )
    mask = holder.sequence_mask
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"sequence_mask: wanted a bool tensor, got {got}")
    if mask.shape != x.shape[:-1]:
        raise ValueError(
            f"sequence_mask: wanted x's leading dimensions {list(x.shape[:-1])}, "
            f"got {list(mask.shape)}"
        )
    if mask.device != x.device:
        raise ValueError(f"sequence_mask: wanted device {x.device} like x, got {mask.device}")


def _check_names(argument: str, names: Sequence[str], at_least: int) -> None:
    good = isinstance(names, Sequence) and not isinstance(names, str)
    if not good or not all(isinstance(n, str) for n in names) or len(names) < at_least:
        raise ValueError(
            f"{argument}: wanted a list of at least {at_least} names of layers, got {names!r}"
        )


def _position(layer: nn.Module, members: Sequence[nn.Module]) -> int | None:
    return next((i for i, member in enumerate(members) if member is layer), None)
