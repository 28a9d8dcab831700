"""PEMT: frozen source experts, a prompt gate and a serial adapter on T5's W_o (2402.15082)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import functional, reference
from ..reference import Agreement, Expert
from .base import AdapterLinear
from .loras import stack_loras

ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh")
GATE_QUERIES = (None, "input", "encoder")
KINDS = ("lora", "adapter")
INITS = ("kaiming", "zero")
_SMALLEST_NORM = 1e-8  # as torch.nn.functional.cosine_similarity


class PEMTAdapter(nn.Module):
    """``f = z + U gelu_tanh(D z + b_D) + b_U``: the target task's adapter, serial, fused.

    Args:
        features: of z and f.
        bottleneck: rows of D; the authors take 768 / 16 = 48.
        device, dtype: of the parameters.

    Parameters:
        down, up: D and Uᵀ, ``[1, bottleneck, features]``, N(0, 0.01²).
        down_bias, up_bias: ``[1, bottleneck]`` and ``[1, features]``, zero.

    Raises:
        ValueError: a size is no int of at least 1.
    """

    def __init__(self, features: int, bottleneck: int, *, device=None, dtype=None):
        super().__init__()
        _check_count("features", features)
        _check_count("bottleneck", bottleneck)
        like = {"device": device, "dtype": dtype}
        self.features, self.bottleneck = features, bottleneck
        self.down = nn.Parameter(torch.empty(1, bottleneck, features, **like))
        self.up = nn.Parameter(torch.empty(1, bottleneck, features, **like))
        self.down_bias = nn.Parameter(torch.empty(1, bottleneck, **like))
        self.up_bias = nn.Parameter(torch.empty(1, features, **like))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise anew: nearly the identity (the authors' code)."""
        for weight in (self.down, self.up):
            nn.init.normal_(weight, std=0.01)
        for bias in (self.down_bias, self.up_bias):
            nn.init.zeros_(bias)

    def forward(self, z: Tensor) -> Tensor:
        """z ``[..., features]`` to f of the same shape."""
        # A view, as torch.compile takes no tensor twice.
        return functional.gated(
            z, None, None, self.down, self.up, _one_per_token(z), activation="gelu_tanh",
            down_bias=self.down_bias, up_bias=self.up_bias, base_output=z.view_as(z),
        )  # fmt: skip

    @classmethod
    def from_reference(cls, adapter: reference.PEMTAdapter) -> "PEMTAdapter":
        """The fused adapter that shares `adapter`'s parameters."""
        fused = cls(adapter.features, adapter.bottleneck, device="meta")
        _share(fused, adapter, ("down", "up", "down_bias", "up_bias"))
        return fused.train(adapter.training)

    def extra_repr(self) -> str:
        return f"features={self.features}, bottleneck={self.bottleneck}"


class PEMTSourceLinear(AdapterLinear):
    """Stage 1: one expert beside a frozen linear, trained on a source task.

    ``"lora"``: ``y = base(x) + alpha/rank B A x``, PEMT's released experts (rank 64, scale 1).
    ``"adapter"``: ``y = base(x) + U gelu_tanh(D x + b_D) + b_U + v``, v the feed-forward's input.

    Args:
        base: the frozen layer, W_o of the feed-forward; see :class:`AdapterLinear`.
        rank: of the LoRA, or rows of D.
        alpha: a LoRA is scaled by alpha / rank; an adapter is not scaled.
        kind: ``"lora"`` or ``"adapter"``.
        init: of a LoRA's B: ``"kaiming"`` like A, as in the authors' code (a=√5 is our choice), so
            that the layer does not start as its base; ``"zero"`` as usual elsewhere (our choice).
        device, dtype: of the new parameters; by default those of the base.

    Parameters:
        lora_down, lora_up: A ``[1, rank, in_features]`` and Bᵀ ``[1, rank, out_features]``; of an
            adapter N(0, 0.01²), like the target adapter (our choice).
        down_bias, up_bias: ``[1, rank]`` and ``[1, out_features]`` of an adapter, zero.

    Raises:
        TypeError, ValueError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int = 64,
        alpha: float = 64.0,
        *,
        kind: str = "lora",
        init: str = "kaiming",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_source_arguments(rank, alpha, kind, init)
        super().__init__(base, device, dtype)
        self.rank, self.alpha, self.kind, self.init = rank, alpha, kind, init
        biased = kind == "adapter"
        self.lora_down = self._new_parameter(1, rank, self.in_features)
        self.lora_up = self._new_parameter(1, rank, self.out_features)
        self.down_bias = self._new_parameter(1, rank) if biased else None
        self.up_bias = self._new_parameter(1, self.out_features) if biased else None
        self.ffn_input: Tensor | None = None  # set by the model's hooks, taken by forward
        self.reset_parameters()

    @property
    def residual(self) -> bool:
        """Whether forward needs the feed-forward's input."""
        return self.kind == "adapter"

    def reset_parameters(self) -> None:
        """Initialise the expert anew."""
        if self.kind == "adapter":
            for weight in (self.lora_down, self.lora_up):
                nn.init.normal_(weight, std=0.01)
            for bias in (self.down_bias, self.up_bias):
                nn.init.zeros_(bias)
            return
        nn.init.kaiming_uniform_(self.lora_down[0], a=math.sqrt(5))
        if self.init == "kaiming":
            nn.init.kaiming_uniform_(self.lora_up[0].T, a=math.sqrt(5))
        else:
            nn.init.zeros_(self.lora_up)

    def expert(self) -> Expert:
        """The trained expert as stage 2 takes it: detached, not copied."""
        return source_expert(dict(self.named_parameters()), self.rank, self.alpha, self.kind)

    def forward(self, x: Tensor, ffn_input: Tensor | None = None) -> Tensor:
        """x ``[..., in_features]`` to y ``[..., out_features]``.

        Args:
            x: the feed-forward's inner activation.
            ffn_input: v ``[..., out_features]``, for an adapter; by default what the hooks of
                :func:`moelora_ops.apply` have brought.
        """
        ffn_input, self.ffn_input = self.ffn_input if ffn_input is None else ffn_input, None
        y = functional.gated(
            x,
            lora_down=self.lora_down,
            lora_up=self.lora_up,
            weights=_one_per_token(x),
            scale=source_scale(self.rank, self.alpha, self.kind),
            activation="gelu_tanh" if self.residual else None,
            down_bias=self.down_bias,
            up_bias=self.up_bias,
            **self.base_arguments(x),
        )
        return y + _required_ffn_input(ffn_input) if self.residual else y

    @classmethod
    def from_reference(cls, layer: reference.PEMTSourceLinear) -> "PEMTSourceLinear":
        """The fused layer that shares `layer`'s base and parameters."""
        fused = cls(
            layer.base, layer.rank, layer.alpha, kind=layer.kind, init=layer.init, device="meta"
        )
        _share(fused, layer, ("lora_down", "lora_up", "down_bias", "up_bias"))
        return fused.train(layer.training)

    def __getstate__(self):
        return {**super().__getstate__(), "ffn_input": None}

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"alpha={self.alpha}, kind={self.kind}"
        )


def source_scale(rank: int, alpha: float, kind: str) -> float:
    """s of a source's expert."""
    return 1.0 if kind == "adapter" else alpha / rank


def source_expert(tensors: Mapping[str, Tensor], rank: int, alpha: float, kind: str) -> Expert:
    """The expert of a :class:`PEMTSourceLinear` from its parameters by name, detached."""
    names = ("lora_down", "lora_up", *(("down_bias", "up_bias") if kind == "adapter" else ()))
    down, up, *biases = (tensors[name][0].detach() for name in names)
    return Expert(down, up.T, source_scale(rank, alpha, kind), *biases)


class _Frozen(NamedTuple):
    """What the cosines need of the experts' second halves.

    Attributes:
        up_rows: Bᵀ ``[E, r', N]``; with biases ``r' = r + 1`` and the last row is b.
        factors: R of B, see :func:`triangular_factors`.
        scales: s ``[E]``.
    """

    up_rows: Tensor
    factors: Tensor
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
            zeros.  They are copied and frozen.
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
        self._frozen: tuple[list, _Frozen] | None = None
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
            _required_ffn_input(ffn_input)
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
            # dx of a plain nn.Linear and of our functions is nobody else's: it may be added to.
            own_dx = not shares or _is_plain_linear(self.base)
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
            z = z + ffn_input
        f = z if self.adapter is None else self.adapter(z)
        cosines = None
        if compares:
            cosines = expert_cosines(f, hidden, *frozen)
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

    def _mixture(self, x: Tensor, hidden: Tensor, weights: Tensor, frozen: "_Frozen") -> Tensor:
        """z from the hidden that the cosines need as well."""
        shares = (weights.to(hidden.dtype) * frozen.scales).unsqueeze(-1)
        shares = shares.reshape(len(weights), *[1] * (x.dim() - 2), *shares.shape[1:])
        mixed = (hidden * shares).flatten(-2)
        return functional.expand(mixed, frozen.up_rows.flatten(0, 1), self.base(x))

    def _frozen_outputs(self) -> "_Frozen":
        """Made once for as long as the experts stay."""
        ups = [t for t in (self.lora_up, self.up_bias) if t is not None]
        # A compiler cannot compare addresses; it notices another tensor by itself.
        at = [0 if torch.compiler.is_compiling() else t.data_ptr() for t in ups]
        key = [at, *((t._version, t.dtype) for t in ups)]
        if self._frozen is None or self._frozen[0] != key:
            up_rows = self.lora_up.detach()
            if self.biases:
                up_rows = torch.cat([up_rows, self.up_bias.detach()[:, None]], 1)
            factors = triangular_factors(up_rows)
            self._frozen = key, _Frozen(up_rows, factors, factors.new_tensor(self.scales))
        return self._frozen[1]

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
        _share(fused, layer, ("lora_down", "lora_up", "down_bias", "up_bias", "gate"))
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


class _Taps(torch.autograd.Function):
    """x itself, and what is read off it: the prompt's query and A x.

    A function of its own because their gradients go to x's as they come, in place.  Apart, each
    would be a ``[T, K]`` of its own, the query's nearly all zeros, and then be added.
    """

    @staticmethod
    def forward(ctx, x: Tensor, prompt_length: int, lora_down: Tensor | None, own_dx: bool):
        ctx.set_materialize_grads(False)
        ctx.prompt_length, ctx.lora_down, ctx.own_dx = prompt_length, None, own_dx
        ctx.shape, ctx.like = x.shape, {"dtype": x.dtype, "device": x.device}
        query = reference.prompt_query(x, prompt_length) if prompt_length else None
        hidden = None
        if lora_down is not None:
            ctx.lora_down = lora_down.flatten(0, 1)
            hidden = functional.shrink(x, ctx.lora_down)
        return x.view_as(x), query, hidden

    @staticmethod
    @once_differentiable
    def backward(ctx, dx: Tensor | None, dquery: Tensor | None, dhidden: Tensor | None):
        if dx is None:  # y itself is not in the loss
            dx = torch.zeros(ctx.shape, **ctx.like)
        elif not (ctx.own_dx and dx.is_contiguous()):
            dx = dx.clone(memory_format=torch.contiguous_format)
        if dquery is not None:
            dx[:, : ctx.prompt_length] += (dquery / ctx.prompt_length).unsqueeze(1).to(dx.dtype)
        if dhidden is not None:
            for rows, hidden in _blocks(dx, dhidden):
                rows.copy_(functional.expand(hidden, ctx.lora_down, rows))
        return dx, None, None, None


class _Cosines(torch.autograd.Function):
    """``s ⟨g_e, h_e⟩ / (|s R_e h_e| |f|)`` from ``g = Bᵀ f``; keeps g, h and no third."""

    @staticmethod
    def forward(ctx, seen, hidden, f_norm, factors, scale):
        f_norm = f_norm.clamp(min=_SMALLEST_NORM).unsqueeze(-1)
        cosines = hidden.new_empty(hidden.shape[:-1])
        for out, g, h, m in _blocks(cosines, seen, hidden, f_norm, trailing=(1, 2, 2, 1)):
            norm = (scale * _outputs(h, factors).norm(dim=-1).t()).abs().clamp_(min=_SMALLEST_NORM)
            torch.div(scale * (g * h).sum(-1), norm * m, out=out)
        ctx.save_for_backward(seen, hidden, f_norm, factors, scale, cosines)
        return cosines

    @staticmethod
    @once_differentiable
    def backward(ctx, dcosines):
        seen, hidden, f_norm, factors, scale, cosines = ctx.saved_tensors
        dseen, dhidden = torch.empty_like(seen), torch.empty_like(hidden)
        for dg, dh, g, h, m, c, dc in _blocks(
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


_BLOCK = 512  # tokens: enough for a product to be worth its call, too few to be seen in memory


def _outputs(hidden: Tensor, factors: Tensor) -> Tensor:
    """``R_e h_e``, ``[E, t, r]``."""
    return torch.bmm(hidden.transpose(0, 1), factors.transpose(1, 2))


def _blocks(*tensors: Tensor, trailing: Sequence[int] = (1, 1)) -> Iterator[tuple[Tensor, ...]]:
    """The tensors' rows, some at a time; the last `trailing` dimensions of each are a row."""
    flat = [t.reshape(-1, *t.shape[t.dim() - n :]) for t, n in zip(tensors, trailing, strict=True)]
    return zip(*(t.split(_BLOCK) for t in flat), strict=True)


def triangular_factors(up_rows: Tensor) -> Tensor:
    """R of ``B_e = Q_e R_e`` for B ``[N, r]`` given by its rows of Bᵀ ``[E, r, N]``.

    ``|B_e h| = |R_e h|``, with r² numbers instead of N·r; unlike ``hᵀ B_eᵀ B_e h`` it is never
    negative and does not square the condition number.

    Returns:
        ``[E, min(N, r), r]`` in at least float32.
    """
    wide = torch.promote_types(up_rows.dtype, torch.float32)
    return torch.linalg.qr(up_rows.detach().to(wide).transpose(1, 2), mode="r").R


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


def check_source_arguments(rank, alpha, kind, init) -> None:
    """The contract of :class:`PEMTSourceLinear`'s constructor."""
    _check_count("rank", rank)
    functional.check_finite("alpha", alpha)
    _check_choice("kind", kind, KINDS)
    _check_choice("init", init, INITS)


def check_arguments(
    ranks, scales, biases, activation, gate_query, gate_features, prompt_length, bottleneck,
    residual, sparsity,
) -> None:  # fmt: skip
    """The contract of :class:`PEMTLinear`'s constructor; files are checked by it as well."""
    if not isinstance(ranks, list) or not ranks:
        raise ValueError(f"ranks: wanted one int per expert, got {ranks!r}")
    for rank in ranks:
        _check_count("ranks", rank)
    if not isinstance(scales, list) or len(scales) != len(ranks):
        raise ValueError(f"scales: wanted {len(ranks)} numbers, one per expert, got {scales!r}")
    for scale in scales:
        functional.check_finite("scales", scale)
    for name, flag in (("biases", biases), ("residual", residual), ("sparsity", sparsity)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: wanted a bool, got {flag!r}")
    _check_choice("activation", activation, ACTIVATIONS)
    _check_choice("gate_query", gate_query, GATE_QUERIES)
    if gate_query is not None:
        _check_count("prompt_length", prompt_length)
    if gate_query == "encoder":
        _check_count("gate_features", gate_features)
    if bottleneck is not None:
        _check_count("bottleneck", bottleneck)


def _check_count(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: wanted an int of at least 1, got {value!r}")


def _check_choice(name: str, value, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name}: wanted one of {choices}, got {value!r}")


def _is_plain_linear(base: nn.Module) -> bool:
    return type(base) is nn.Linear and not (
        base._forward_hooks or base._backward_hooks or base._backward_pre_hooks
    )


def _required_ffn_input(ffn_input: Tensor | None) -> Tensor:
    if ffn_input is None:
        raise ValueError(
            "ffn_input: wanted the feed-forward's input, as adapter experts have a residual from "
            "it, got None"
        )
    return ffn_input


def _one_per_token(x: Tensor) -> Tensor:
    """The weights of a single expert that is always on."""
    return torch.ones(*x.shape[:-1], 1, device=x.device)


def _share(fused: nn.Module, layer: nn.Module, names: tuple[str, ...]) -> None:
    for name in names:
        setattr(fused, name, getattr(layer, name))


def _shape(t) -> str:
    return str(list(t.shape)) if isinstance(t, Tensor) else repr(t)[:60]
