"""PEMT's stage 2: frozen source experts, a prompt gate and a serial adapter (2402.15082)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import functional, reference
from ..reference import Agreement, Expert
from .base import AdapterLinear
from .checks import check_bool, check_choice, check_count, check_dtype
from .kept import state_of, to_be_kept
from .loras import stack_loras
from .pemt_adapter import PEMTAdapter, required_ffn_input, share_parameters

ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh")
GATE_QUERIES = (None, "input", "encoder")


class _Frozen(NamedTuple):
    """What the cosines need of the experts' second halves.

    Attributes:
        up_rows: Bᵀ ``[E, r', N]``; with biases ``r' = r + 1`` and the last row is b.
        rotations: see :func:`moelora_ops.functional.expert_rotations`.
        scales: s ``[E]``.
    """

    up_rows: Tensor
    rotations: Tensor
    scales: Tensor


class PEMTLinear(AdapterLinear):
    """Stage 2: frozen source experts, weighted by how much the prompt correlates with them, fused.

        z = base(x) + Σ_e g_e s_e B_e φ(A_e x + a_e) + b_e    source experts, frozen
        f = z + U gelu_tanh(D z + b_D) + b_U                  :class:`PEMTAdapter`, if any

    The gate is one softmax per sequence, ``g = softmax(q W_g)``: q is the mean over the first
    `prompt_length` positions, where a T5-type model has the task's prompt, of x (in an encoder) or
    of the final encoder output (in a decoder).

    Args:
        base: the frozen layer, W_o of the feed-forward; see :class:`AdapterLinear`.
        loras: experts of the source tasks, each a tuple ``(A [r, in], B [out, r], scale)``, for
            adapters ``(A, B, scale, a [r], b [out])``, such as
            :class:`moelora_ops.reference.Expert`.  Ranks may differ; lower ones are padded with
            zeros.  They are copied and frozen.  What follows from them is computed once and again
            after a change in place (not by compiled code); one through ``.data`` goes unnoticed.
        activation: φ: None for LoRAs, ``"gelu_tanh"`` for PEMT's adapters, ``"relu"``, ``"gelu"``.
        gate_query: ``"input"`` takes q from x, ``"encoder"`` from `encoder_states`; None for no
            gate, then forward needs `weights`.
        gate_features: width of q for ``"encoder"``.
        prompt_length: P >= 1, for a gate.
        bottleneck: of the target adapter; None for none, then f = z.
        residual: experts are adapters with a residual from the feed-forward's input v; it is added
            once, since the weights sum to 1.
        sparsity: while training, keep in ``layer.agreement`` what the task sparsity loss needs.
        device, dtype: of the new parameters; by default those of the base.

    Parameters:
        lora_down, lora_up: ``[E, r, in_features]`` and ``[E, r, out_features]``, frozen.
        down_bias, up_bias: ``[E, r]`` and ``[E, out_features]`` of adapter experts, frozen.
        gate: W_gᵀ ``[E, in_features or gate_features]``, zero, so that it starts uniform.
        adapter: see :class:`PEMTAdapter`.

    ``layer.agreement`` holds the last call's weights, and cosines if `sparsity`.

    Shapes: x ``[batch, length, in_features]`` to f ``[batch, length, out_features]``; with
    `weights` and no gate also ``[batch, in_features]``.

    Raises:
        TypeError, ValueError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        base: nn.Module,
        loras: Sequence[Expert | tuple],
        *,
        activation: str | None = None,
        gate_query: str | None = None,
        gate_features: int | None = None,
        prompt_length: int | None = None,
        bottleneck: int | None = None,
        residual: bool = False,
        sparsity: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        ranks, scales, biases = _describe(loras, base)
        check_arguments(
            ranks, scales, biases, activation, gate_query, gate_features, prompt_length,
            bottleneck, residual, sparsity,
        )  # fmt: skip
        super().__init__(base, device, dtype)
        self.num_experts, self.rank = len(ranks), max(ranks)
        self.ranks, self.scales, self.biases = ranks, scales, biases
        self.activation, self.residual, self.sparsity = activation, residual, sparsity
        self.gate_query, self.prompt_length, self.bottleneck = gate_query, prompt_length, bottleneck
        self.gate_features = self.in_features if gate_query == "input" else gate_features
        stack = stack_loras(
            [lora[:3] for lora in loras], self.in_features, self.out_features, **self._new
        )
        self.lora_down = nn.Parameter(stack.lora_down, requires_grad=False)
        self.lora_up = nn.Parameter(stack.lora_up, requires_grad=False)
        self.down_bias = self.up_bias = self.gate = self.adapter = None
        if biases:
            self.down_bias = self._stack_biases([lora[3] for lora in loras], self.rank)
            self.up_bias = self._stack_biases([lora[4] for lora in loras], self.out_features)
        if gate_query is not None:
            self.gate = self._new_parameter(self.num_experts, self.gate_features)
        if bottleneck is not None:
            self.adapter = PEMTAdapter(self.out_features, bottleneck, **self._new)
        # Set by the model's hooks, taken by forward.
        self.encoder_states: Tensor | None = None
        self.ffn_input: Tensor | None = None
        self.agreement: Agreement | None = None
        self._frozen: tuple[list, tuple, _Frozen] | None = None
        self.reset_parameters()

    def _stack_biases(self, biases: list[Tensor], length: int) -> nn.Parameter:
        """Frozen ``[E, length]``; what a bias lacks is zero."""
        stack = torch.zeros(len(biases), length, **self._new)
        for row, bias in zip(stack, biases, strict=True):
            row[: len(bias)].copy_(bias.detach())
        return nn.Parameter(stack, requires_grad=False)

    def reset_parameters(self) -> None:
        """Initialise the gate and the adapter anew; the experts stay."""
        if self.gate is not None:
            nn.init.zeros_(self.gate)
        if self.adapter is not None:
            self.adapter.reset_parameters()

    def forward(
        self,
        x: Tensor,
        weights: Tensor | None = None,
        *,
        encoder_states: Tensor | None = None,
        ffn_input: Tensor | None = None,
    ) -> Tensor:
        """x ``[batch, length, in_features]`` to f ``[batch, length, out_features]``.

        Args:
            x: the feed-forward's inner activation u.
            weights: g ``[batch, E]``, summing to 1, instead of the gate's.
            encoder_states: ``[batch, L, gate_features]``, for ``gate_query="encoder"``; by default
                what the hooks of :func:`moelora_ops.apply` have brought.
            ffn_input: v ``[batch, length, out_features]``, for `residual`; by default likewise.

        Raises:
            ValueError: something is missing, or the prompt is longer than the input.
        """
        encoder_states = self.encoder_states if encoder_states is None else encoder_states
        ffn_input = self.ffn_input if ffn_input is None else ffn_input
        self.encoder_states = self.ffn_input = None
        if self.residual:
            required_ffn_input(ffn_input)
        if weights is not None and weights.shape != (len(x), self.num_experts):
            raise ValueError(
                f"weights: wanted shape {[len(x), self.num_experts]}, got {list(weights.shape)}"
            )
        compares = self.training and self.sparsity
        # The cosines take the experts as constants; the mixture may use what is made for them then.
        shares = compares and not any(p.requires_grad for p in self._experts())
        queries = weights is None and self.gate_query == "input"
        query = hidden = None
        if queries:
            self._check_states("x", x)
        if queries or compares:
            length, rows = self.prompt_length if queries else 0, self.lora_down.detach()
            # dx of our functions is nobody else's: it may be added to.
            own_dx = not shares or self.base_is_linear()
            check_dtype(x, self.lora_down)
            x, query, hidden = _Taps.apply(x, length, rows if compares else None, own_dx)
        if weights is None:
            weights = self._gate(query, encoder_states)
        if compares:
            frozen, hidden = self._frozen_outputs(), self._hidden(hidden)
        if shares:
            z = self._mixture(x, hidden, weights, frozen)
        else:
            z = functional.gated(
                x, lora_down=self.lora_down, lora_up=self.lora_up, weights=weights,
                scale=self.scales, activation=self.activation, down_bias=self.down_bias,
                up_bias=self.up_bias, **self.base_arguments(x),
            )  # fmt: skip
        if self.residual:
            z = z + ffn_input.to(z.dtype)
        f = z if self.adapter is None else self.adapter(z)
        cosines = None
        if compares:
            f, cosines = functional.expert_cosines(f, hidden, *frozen)
        # A call inside a backward recomputes a checkpoint.  Keeping its graph would keep the
        # activations that checkpointing exists to free; the first call's is the one in the loss.
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            self.agreement = Agreement(weights, cosines)
        return f

    def _gate(self, query: Tensor | None, encoder_states: Tensor | None) -> Tensor:
        """``[batch, E]`` in at least float32; `query` is the mean of x's first positions."""
        if self.gate is None:
            raise ValueError("weights: wanted [batch, E], as the layer has no gate, got None")
        if self.gate_query == "encoder":
            if encoder_states is None:
                raise ValueError(
                    "encoder_states: wanted the final encoder output, from which this layer takes "
                    "its weights, got None"
                )
            self._check_states("encoder_states", encoder_states)
            query = reference.prompt_query(encoder_states, self.prompt_length)
        return reference.prompt_gate(query, self.gate)

    def _check_states(self, name: str, states: Tensor) -> None:
        if states.dim() != 3 or states.shape[-1] != self.gate_features:
            raise ValueError(
                f"{name}: wanted shape [batch, length, {self.gate_features}], "
                f"got {list(states.shape)}"
            )
        if states.shape[1] < self.prompt_length:
            raise ValueError(
                f"{name}: wanted at least the prompt's {self.prompt_length} positions, "
                f"got {states.shape[1]}"
            )

    def _experts(self) -> list[nn.Parameter]:
        every = (self.lora_down, self.lora_up, self.down_bias, self.up_bias)
        return [p for p in every if p is not None]

    def _hidden(self, hidden: Tensor) -> Tensor:
        """``φ(A x + a)`` from ``A x``, and a one for b, ``[..., E, r']``."""
        hidden = hidden.unflatten(-1, (self.num_experts, self.rank))
        if self.biases:
            hidden = hidden + self.down_bias.detach()
        hidden = reference.ACTIVATIONS[self.activation](hidden)
        return torch.cat([hidden, torch.ones_like(hidden[..., :1])], -1) if self.biases else hidden

    def _mixture(self, x: Tensor, hidden: Tensor, weights: Tensor, frozen: _Frozen) -> Tensor:
        """z from the hidden that the cosines need as well."""
        shares = (weights.to(hidden.dtype) * frozen.scales).unsqueeze(-1)
        shares = shares.reshape(len(weights), *[1] * (x.dim() - 2), *shares.shape[1:])
        mixed = (hidden * shares).flatten(-2)
        up_rows = frozen.up_rows.flatten(0, 1)
        return functional.linear_expand(x, hidden=mixed, rows=up_rows, **self.base_arguments(x))

    def _frozen_outputs(self) -> _Frozen:
        """Made once for as long as the experts stay."""
        ups = [t for t in (self.lora_up, self.up_bias) if t is not None]
        # Of parameters that FSDP2 gathers, a version says nothing; frozen ones stay as they are.
        trained = any(t.requires_grad for t in ups)
        known, state = self._frozen, (self.scales, state_of(*ups))
        # Compiled code cannot ask for a version; there only what replaces the experts is noticed.
        if (
            known is None
            or trained
            or not (
                all(old is new for old, new in zip(known[0], ups, strict=True))
                and (torch.compiler.is_compiling() or known[1] == state)
            )
        ):
            with to_be_kept(), reference.no_autocast(self.lora_up.device.type):
                up_rows = self.lora_up.detach()
                if self.biases:
                    up_rows = torch.cat([up_rows, self.up_bias.detach()[:, None]], 1)
                rotations = functional.expert_rotations(up_rows)
                made = _Frozen(up_rows, rotations, rotations.new_tensor(self.scales))
            known = ups, (list(self.scales), state[1]), made
            self._frozen = None if trained else known
        return known[2]

    def _apply(self, fn, recurse=True):
        self._frozen = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        self._frozen = None
        super()._load_from_state_dict(*args, **kwargs)

    @classmethod
    def from_reference(cls, layer: reference.PEMTLinear) -> "PEMTLinear":
        """The fused layer that shares `layer`'s base and parameters."""
        base = layer.base
        fused = cls(
            base, empty_experts(base, layer.ranks, layer.scales, layer.biases),
            activation=layer.activation, gate_query=layer.gate_query,
            gate_features=layer.gate_features, prompt_length=layer.prompt_length,
            residual=layer.residual, sparsity=layer.sparsity, device="meta",
        )  # fmt: skip
        share_parameters(fused, layer, ("lora_down", "lora_up", "down_bias", "up_bias", "gate"))
        fused.bottleneck = layer.bottleneck
        if layer.adapter is not None:
            fused.adapter = PEMTAdapter.from_reference(layer.adapter)
        return fused.train(layer.training)

    def __getstate__(self):
        # What belongs to the last call's autograd graph is not to be copied or pickled.
        graph = ("encoder_states", "ffn_input", "agreement", "_frozen")
        return {**super().__getstate__(), **dict.fromkeys(graph)}

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"ranks={self.ranks}, scales={self.scales}, activation={self.activation}, "
            f"gate_query={self.gate_query}, prompt_length={self.prompt_length}, "
            f"residual={self.residual}, sparsity={self.sparsity}"
        )


class _Taps(torch.autograd.Function):
    """x itself, and what is read off it: the prompt's query and A x.

    A function of its own because their gradients go to x's as they come, in place.  Apart, each
    would be a ``[T, K]`` of its own, the query's nearly all zeros, and then be added.
    """

    @staticmethod
    def forward(ctx, x: Tensor, prompt_length: int, lora_down: Tensor | None, own_dx: bool):
        ctx.set_materialize_grads(False)
        ctx.prompt_length, ctx.own_dx = prompt_length, own_dx
        ctx.shape, ctx.like = x.shape, {"dtype": x.dtype, "device": x.device}
        query = hidden = x.new_empty(0)  # not None, which a compiler would not differentiate
        if prompt_length:
            query = reference.prompt_query(x, prompt_length)
        if lora_down is not None:
            hidden = functional.shrink(x, lora_down.flatten(0, 1))
        ctx.save_for_backward(lora_down)
        return x.detach(), query, hidden  # no view, which nobody could change in place

    @staticmethod
    @functional.plain_backward
    def backward(ctx, dx: Tensor | None, dquery: Tensor | None, dhidden: Tensor | None):
        (lora_down,) = ctx.saved_tensors
        if dx is None:  # y itself is not in the loss
            dx = torch.zeros(ctx.shape, **ctx.like)
        elif not (ctx.own_dx and dx.is_contiguous()):
            dx = dx.clone(memory_format=torch.contiguous_format)
        if ctx.prompt_length and dquery is not None:
            dx[:, : ctx.prompt_length] += (dquery / ctx.prompt_length).unsqueeze(1).to(dx.dtype)
        if lora_down is not None and dhidden is not None:
            functional.expand_(dhidden, lora_down.flatten(0, 1), dx)
        return dx, None, None, None


def empty_experts(
    base: nn.Module, ranks: Sequence[int], scales: Sequence[float], biases: bool
) -> list[Expert]:
    """Experts of these shapes without values, for a layer that gets its values afterwards."""
    return [
        Expert(
            torch.empty(rank, base.in_features), torch.empty(base.out_features, rank), scale,
            *((torch.empty(rank), torch.empty(base.out_features)) if biases else ()),
        )
        for rank, scale in zip(ranks, scales, strict=True)
    ]  # fmt: skip


def _describe(loras, base: nn.Module) -> tuple[list[int], list[float], bool]:
    """Ranks and scales of checked `loras`, and whether they have biases.

    Raises:
        TypeError, ValueError: one does not fit `base`; the message names it.
    """
    features = [getattr(base, name, None) for name in ("in_features", "out_features")]
    if not all(isinstance(n, int) for n in features):
        return [1], [1.0], False  # AdapterLinear refuses this base
    given = isinstance(loras, Sequence) and all(isinstance(lora, Sequence) for lora in loras)
    factors = [lora[:3] for lora in loras] if given else loras
    scales = stack_loras(factors, *features, device="meta").scales
    ranks = [len(lora[0]) for lora in loras]
    biased = [len(lora) > 3 and lora[3] is not None for lora in loras]
    for e, lora in enumerate(loras):
        if biased[e] != biased[0]:
            raise ValueError(f"loras[{e}]: wanted biases for all experts or for none")
        if biased[e]:
            for letter, bias, length in (
                ("a", lora[3], ranks[e]),
                ("b", lora[4] if len(lora) == 5 else None, features[1]),
            ):
                if not isinstance(bias, Tensor) or bias.shape != (length,):
                    raise ValueError(
                        f"loras[{e}]: wanted {letter} of shape [{length}], got {_shape(bias)}"
                    )
    return ranks, scales, biased[0]


def check_arguments(
    ranks, scales, biases, activation, gate_query, gate_features, prompt_length, bottleneck,
    residual, sparsity,
) -> None:  # fmt: skip
    """The contract of :class:`PEMTLinear`'s constructor; files are checked by it as well."""
    if not isinstance(ranks, list) or not ranks:
        raise ValueError(f"ranks: wanted one int per expert, got {ranks!r}")
    for rank in ranks:
        check_count("ranks", rank)
    if not isinstance(scales, list) or len(scales) != len(ranks):
        raise ValueError(f"scales: wanted {len(ranks)} numbers, one per expert, got {scales!r}")
    for scale in scales:
        functional.check_finite("scales", scale)
    for name, flag in (("biases", biases), ("residual", residual), ("sparsity", sparsity)):
        check_bool(name, flag)
    check_choice("activation", activation, ACTIVATIONS)
    check_choice("gate_query", gate_query, GATE_QUERIES)
    if gate_query is not None:
        check_count("prompt_length", prompt_length)
    if gate_query == "encoder":
        check_count("gate_features", gate_features)
    if bottleneck is not None:
        check_count("bottleneck", bottleneck)


def _shape(t) -> str:
    return str(list(t.shape)) if isinstance(t, Tensor) else repr(t)[:60]
