"""MoLE: trained, frozen LoRAs of one linear, mixed by a gate that sees their outputs (2404.13628).

The gate's input is what the experts say, yet nothing as long as an output is made for it: with
``o_i = s_i B_i h_i`` its products are ``h_iᵀ P_i``, ``P_i = s_i B_iᵀ e_i``, and its norms
``|R_i h_i|``, R_i the triangular factor of ``s_i B_i`` (docs/math.md, "MoLE").
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .. import balance, functional, reference
from ..companions import Companion, plain_name
from ..functional.mole import (
    GRANULARITIES,
    MASK_MODES,
    OutputFactors,
    RankSpace,
    gate_projection,
    output_factors,
    sequence_mean,
)
from ..reference import Gating
from .base import AdapterLinear
from .loras import stack_loras

NORMALIZATIONS = ("l2", "l2_per_expert", "layernorm", "none")


class MoLELinear(AdapterLinear):
    """``y = base(x) + Σ_i g_i s_i B_i A_i x``, g from the experts' outputs, fused.

    With one expert g is 1 and the layer that LoRA.  The paper's equations gate whole transformer
    blocks, where not even a single LoRA would come out as itself; this is the matrix-wise gate that
    it also names (our default).  For gates that several linears share see :class:`SharedGate`,
    for the equations to the letter :class:`moelora_ops.nn.MoLEBlock`.

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
        log_tau: the logarithm of the temperature, zero (our choice; the paper learns τ).

    Buffers:
        lora_down: ``[E, r, in_features]``.
        lora_up: ``[E, r, out_features]``, the B transposed.
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
            _new_gate(self, width, self.num_experts, **self._new)
        self.shared_gate: tuple[SharedGate, ...] = ()  # a tuple, not to be registered
        self.sequence_mask: Tensor | None = None
        self._forget()

    def __setattr__(self, name: str, value) -> None:
        if name == "expert_mask":
            value = _expert_mask(value, self)
        elif name in ("lora_up", "gate"):
            self._forget()
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., in_features]`` to y ``[..., out_features]``."""
        if not self.gated:
            if not self.shared_gate:
                raise RuntimeError("gated: is False, but no SharedGate is connected to this layer")
            return self.shared_gate[0].run(self, x)
        known = self.derived()
        gate, compact = self.gate, self.compact
        if not compact and self._may_keep_projection():
            gate, compact = self._projection(known.scales), True
        y, gates = functional.mole(
            x, lora_down=self.lora_down, lora_up=self.lora_up, gate=gate, tau=_tau(self),
            scale=known.scales, normalization=self.normalization, expert_mask=self.expert_mask,
            mask_mode=self.mask_mode, granularity=self.granularity,
            sequence_mask=self.sequence_mask, compact=compact, factors=known.factors,
            return_gates=True, **self.base_arguments(x),
        )  # fmt: skip
        return self._record(y, _gating(self, gates))

    def derived(self) -> "_Derived":
        """What follows from the frozen experts, computed once."""
        # Compiled code cannot ask for a version; there only what replaces the experts is noticed.
        known = self._derived
        if known is None or not (
            torch.compiler.is_compiling() or known.version == _version(self.lora_up)
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
        key = (self.gate.data_ptr(), _version(self.gate), _version(self.lora_up))
        if self._kept is None or self._kept[0] != key:
            with reference.no_autocast(self.gate.device.type):
                rows = gate_projection(
                    self.gate, self.lora_up, scales, self.normalization, False, None
                )
            self._kept = key, rows.unflatten(0, (self.num_experts, self.rank))
        return self._kept[1]

    def _forget(self) -> None:
        """Whatever was computed from the experts and the gate and kept."""
        self._derived: _Derived | None = None
        self._kept: tuple[tuple[int, ...], Tensor] | None = None

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
        for name in ("lora_down", "lora_up", *(_GATE_STATE if layer.gated else ())):
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
        log_tau: scalar, zero.
        expert_mask: bool ``[E]``.

    Limits: under reentrant gradient checkpointing the followers must be in the same checkpointed
    part as the leaders (a block's are; for a network-wise gate use the other mode).
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
        if type(num_experts) is not int or num_experts < 1:
            raise ValueError(f"num_experts: wanted an int of at least 1, got {num_experts!r}")
        self.leaders, self.followers = list(leaders), list(followers)
        self.out_features, self.ranks = list(out_features), list(ranks)
        self.num_experts = num_experts
        self.granularity, self.normalization, self.mask_mode = granularity, normalization, mask_mode
        self.compact = compact
        width = sum(self.ranks if compact else self.out_features)
        _new_gate(self, width, num_experts, device=device, dtype=dtype)
        self.sequence_mask: Tensor | None = None
        self.routing: Gating | None = None
        self.dprob_sums: Tensor | None = None  # see balance.record
        self._members: tuple[nn.Module, ...] = ()  # the leaders; not to be registered
        self._forget()

    def __setattr__(self, name: str, value) -> None:
        if name == "expert_mask":
            value = _expert_mask(value, self)
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
            return functional.gated(
                x, lora_down=layer.lora_down, lora_up=layer.lora_up, weights=weights,
                scale=layer.derived().scales, **layer.base_arguments(x),
            )  # fmt: skip
        recording = torch.is_grad_enabled()
        is_first = self._input is not x or self._recording != recording or index not in self._hidden
        if is_first:
            self._input, self._recording = x, recording
            self._hidden = self._gate(x)
        weights = self.gates * layer.derived().scales
        if self.granularity == "sequence":
            weights = weights.unsqueeze(-2)
        mixed = (self._hidden.pop(index) * weights.unsqueeze(-1)).flatten(-2)
        if not self._hidden:
            self._input = None  # held no longer than needed
        y = functional.expand(mixed, layer.lora_up.flatten(0, 1), layer.base(x))
        if is_first:
            y, self.routing = balance.record(self, y, _gating(self, self.gates))
        return y

    def _gate(self, x: Tensor) -> dict[int, Tensor]:
        """Sets the gates for x; returns the hidden ``[..., E, r]`` of each leader."""
        _check_sequences(self, x)
        leaders = self._members
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
                self._projection(together.dtype), _tau(self).to(together.dtype),
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

    @torch.no_grad()
    def _block_factors(self) -> OutputFactors:
        """The factors of the one linear that the leaders are together, computed once."""
        parts = tuple(leader.derived() for leader in self._members)
        if self._factors is None or not (
            torch.compiler.is_compiling()
            or all(old is new for old, new in zip(self._factors[0], parts, strict=True))
        ):
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
        self.routing = _gating(self, self.gates)
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
        self._factors: tuple[tuple[_Derived, ...], OutputFactors] | None = None
        self._input: Tensor | None = None
        self._recording = False
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


@contextlib.contextmanager
def sequence_mask(model: nn.Module, mask: Tensor | None) -> Iterator[None]:
    """Tell every MoLE gate in `model`, inside the ``with``, which tokens are real.

    A backward pass that recomputes (gradient checkpointing) belongs inside, too.

    Args:
        mask: bool or integer ``[batch, length]``, zero for padding, such as a tokenizer's attention
            mask; None for no padding.  For a gate from the question alone, mark the question.
    """
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.is_floating_point():
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask: wanted a bool or integer tensor, got {got}")
        mask = mask.bool()
    gates = [module for module in model.modules() if hasattr(module, "sequence_mask")]
    before = [gate.sequence_mask for gate in gates]
    try:
        for gate in gates:
            gate.sequence_mask = mask
        yield
    finally:
        for gate, old in zip(gates, before, strict=True):
            gate.sequence_mask = old


def set_expert_mask(model: nn.Module, keep: Tensor | Sequence[bool]) -> None:
    """Keep these experts in every MoLE gate of `model` and remove the others; nothing is retrained.

    Args:
        keep: bool ``[E]``, True keeps.

    Raises:
        TypeError, ValueError: `keep` does not fit or removes every expert, or there is no gate.
    """
    gates = [m for m in model.modules() if "expert_mask" in m._buffers]
    if not gates:
        raise ValueError("model: has no MoLE gates")
    checked = [_expert_mask(keep, gate) for gate in gates]
    for gate, mask in zip(gates, checked, strict=True):
        gate.expert_mask = mask


def check_arguments(granularity, normalization, mask_mode, gated, compact) -> None:
    """The constructors' contract; a whole model's configuration is checked by it as well."""
    for name, value, wanted in (
        ("granularity", granularity, GRANULARITIES),
        ("normalization", normalization, NORMALIZATIONS),
        ("mask_mode", mask_mode, MASK_MODES),
    ):
        if value not in wanted:
            raise ValueError(f"{name}: wanted one of {wanted}, got {value!r}")
    for name, value in (("gated", gated), ("compact", compact)):
        if not isinstance(value, bool):
            raise TypeError(f"{name}: wanted a bool, got {value!r}")
    if compact and normalization == "layernorm":
        raise ValueError(
            "compact: wanted another normalization than 'layernorm', whose gate needs more than P"
        )


def empty_loras(
    in_features: int, out_features: int, *, rank: int, scales: Sequence[float]
) -> list[tuple[Tensor, Tensor, float]]:
    """LoRAs without values, of the shapes that a layer with this rank and these scales has."""
    return [(torch.empty(rank, in_features), torch.empty(out_features, rank), s) for s in scales]


# ---------------------------------------------------------------- what the gate is made of


class _Derived(NamedTuple):
    """What follows from a layer's frozen experts.

    Attributes:
        version: of ``lora_up`` at the time.
        scales: ``[E]`` in float32 or wider.
        factors: of :func:`output_factors`.
    """

    version: int
    scales: Tensor
    factors: OutputFactors


@torch.no_grad()
def _derive(layer: MoLELinear) -> _Derived:
    up = layer.lora_up.detach()
    wide = torch.promote_types(up.dtype, torch.float32)
    scales = torch.tensor(layer.scales, dtype=wide, device=up.device)
    factors = output_factors(up, scales, layer.normalization == "layernorm")
    return _Derived(_version(layer.lora_up), scales, factors)


def _tau(holder: nn.Module) -> Tensor:
    """τ, never rounded to 16 bits."""
    return holder.log_tau.to(torch.promote_types(holder.log_tau.dtype, torch.float32)).exp()


def _gating(holder: nn.Module, gates: Tensor) -> Gating:
    real = holder.sequence_mask
    if real is not None and holder.granularity == "sequence":
        real = real.any(-1)
    return reference.gating(gates, holder.expert_mask, real)


# ---------------------------------------------------------------- state and checks

_GATE_STATE = ("gate", "log_tau", "expert_mask")


def _new_gate(holder: nn.Module, width: int, num_experts: int, *, device, dtype) -> None:
    dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
    like = {"device": device, "dtype": dtype}
    holder.gate = nn.Parameter(torch.zeros(num_experts, width, num_experts, **like))
    holder.log_tau = nn.Parameter(torch.zeros((), **like))
    everyone = torch.ones(num_experts, dtype=torch.bool, device=device)
    holder.register_buffer("expert_mask", everyone)


def _expert_mask(mask: Tensor | Sequence[bool], holder: nn.Module) -> Tensor:
    """`mask` as a bool tensor for `holder`, checked."""
    if not isinstance(mask, Tensor):
        mask = torch.tensor(mask, device=holder.gate.device)
    if mask.dtype != torch.bool:
        raise TypeError(f"expert_mask: wanted a bool tensor, got {mask.dtype}")
    if mask.shape != (holder.num_experts,):
        raise ValueError(
            f"expert_mask: wanted shape [{holder.num_experts}], got {list(mask.shape)}"
        )
    if not mask.is_meta and not mask.any():
        raise ValueError("expert_mask: wanted at least one True, but every expert is removed")
    return mask.to(holder.gate.device)


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


def _version(t: Tensor) -> int:
    """Grows with every change in place; inference tensors do not count them."""
    return 0 if torch.compiler.is_compiling() or t.is_inference() else t._version
