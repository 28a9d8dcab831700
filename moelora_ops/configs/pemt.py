"""PEMT for a T5-type model: one configuration per stage, and what stage 1 hands to stage 2."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..companions import Companion, companion_name
from ..depth import NumberedLayer
from ..nn.checks import check_bool, check_count
from ..nn.pemt import check_arguments, empty_experts
from ..nn.pemt_source import check_source_arguments
from ..prompts import SourcePrompt, TargetPrompt, TrainedNorms, norm_weights, t5_stacks
from ..reference import Expert
from .base import AdapterConfig


@dataclasses.dataclass(frozen=True)
class PEMTSource:
    """What stage 1 learned of one source task; see :func:`moelora_ops.pemt_source`.

    Attributes:
        prompt: Π_e ``[P_e, features]``.
        experts: by qualified name of the adapted linear.
    """

    prompt: Tensor
    experts: dict[str, Expert]


@dataclasses.dataclass(frozen=True)
class PEMTSourceConfig(AdapterConfig):
    """PEMT's stage 1 for a T5-type model: an expert on every W_o and a prompt (2402.15082).

    Args:
        prompt: token ids of a sentence that describes the task, whose embeddings the prompt starts
            from (the authors' code); or how many positions, which then start from random rows of
            the embeddings (our choice).
        rank, alpha, kind, init: see :class:`moelora_ops.nn.PEMTSourceLinear`.
        target_modules, adapter_dtype: see :class:`AdapterConfig`.

    Raises:
        TypeError, ValueError: a field is out of range; the message names it.
    """

    prompt: int | Sequence[int]
    rank: int = 64
    alpha: float = 64.0
    kind: str = "lora"
    init: str = "kaiming"
    target_modules: str | Sequence[str] = dataclasses.field(
        default=("DenseReluDense.wo",), kw_only=True
    )

    def __post_init__(self):
        super().__post_init__()
        check_source_arguments(self.rank, self.alpha, self.kind, self.init)
        object.__setattr__(self, "prompt", _checked_prompt(self.prompt))

    def layer_arguments(self, name: str, layer: NumberedLayer | None) -> dict[str, Any]:
        return {field: getattr(self, field) for field in ("rank", "alpha", "kind", "init")}

    def layers(self, model: nn.Module) -> dict[str, dict[str, Any]]:
        stack_of_linears(model, found := super().layers(model))
        return found

    def companions(
        self, model: nn.Module, layers: dict, *, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Companion]:
        start = _initial_prompt(model, self.prompt)
        prompt = SourcePrompt(*start.shape, device=device, dtype=dtype)
        with torch.no_grad():
            prompt.target.copy_(start)
        return {companion_name("prompt"): prompt}

    @classmethod
    def check_layer(cls, name: str, arguments: dict[str, Any]) -> None:
        check_source_arguments(**arguments)


@dataclasses.dataclass(frozen=True)
class PEMTConfig(AdapterConfig):
    """PEMT's stage 2 for a T5-type model (2402.15082).

    The sources' experts and prompts are frozen.  Trained are: a gate per linear, the target's
    prompt, a serial adapter behind each linear, and the model's LayerNorms.

    Args:
        sources: of at least one source task, from :func:`moelora_ops.pemt_source`; all for the
            same linears and of one kind.
        prompt: of the target task, see :class:`PEMTSourceConfig`.
        reduction: the target adapters' bottleneck is out_features / reduction, 768 / 16 = 48 in
            the authors' code; None for no target adapters.
        dropout: of the prompt's attention to the source prompts.
        train_norms: train all LayerNorms of the model.
        sparsity: let layers keep what :func:`moelora_ops.task_sparsity_loss` needs.
        adapter_dtype: see :class:`AdapterConfig`.  Its target_modules is unused: the sources say
            which linears.

    Raises:
        TypeError, ValueError: a field is out of range; the message names it.
    """

    sources: Sequence[PEMTSource]
    prompt: int | Sequence[int]
    reduction: int | None = 16
    dropout: float = 0.1
    train_norms: bool = True
    sparsity: bool = True
    target_modules: str | Sequence[str] = dataclasses.field(
        default=("DenseReluDense.wo",), kw_only=True
    )

    def __post_init__(self):
        super().__post_init__()
        sources = self.sources
        if not isinstance(sources, Sequence) or not sources:
            raise ValueError(f"sources: wanted at least one PEMTSource, got {sources!r:.60}")
        for e, source in enumerate(sources):
            if not isinstance(source, PEMTSource):
                raise TypeError(f"sources[{e}]: wanted a PEMTSource, got {type(source).__name__}")
            if source.experts.keys() != sources[0].experts.keys():
                odd = sorted(source.experts.keys() ^ sources[0].experts.keys())
                raise ValueError(
                    f"sources[{e}]: wanted experts for the linears of sources[0], but only one of "
                    f"them has {odd[0]}"
                )
        object.__setattr__(self, "sources", tuple(sources))
        object.__setattr__(self, "prompt", _checked_prompt(self.prompt))
        if self.reduction is not None:
            check_count("reduction", self.reduction)
        check_bool("train_norms", self.train_norms)
        check_bool("sparsity", self.sparsity)
        TargetPrompt(1, 1, dropout=self.dropout)  # checks it

    def layers(self, model: nn.Module) -> dict[str, dict[str, Any]]:
        stacks = stack_of_linears(model, self.sources[0].experts)
        arguments = {}
        for name, stack in stacks.items():
            linear = model.get_submodule(name)
            loras = [source.experts[name] for source in self.sources]
            biased = loras[0].down_bias is not None
            bottleneck = None
            if self.reduction is not None:
                bottleneck = max(1, linear.out_features // self.reduction)
            arguments[name] = {
                "loras": loras,
                "activation": "gelu_tanh" if biased else None,
                "gate_query": "input" if stack == "encoder" else "encoder",
                "gate_features": None if stack == "encoder" else linear.out_features,
                "prompt_length": _prompt_length(self.prompt),
                "bottleneck": bottleneck,
                "residual": biased,
                "sparsity": self.sparsity,
            }
        return arguments

    def companions(
        self, model: nn.Module, layers: dict, *, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Companion]:
        start = _initial_prompt(model, self.prompt)
        lengths = [len(source.prompt) for source in self.sources]
        prompt = TargetPrompt(*start.shape, lengths, self.dropout, device=device, dtype=dtype)
        with torch.no_grad():
            prompt.target.copy_(start)
            for e, (own, source) in enumerate(zip(prompt.sources, self.sources, strict=True)):
                if source.prompt.shape != own.shape:
                    raise ValueError(
                        f"sources[{e}]: wanted a prompt of shape {list(own.shape)}, "
                        f"got {list(source.prompt.shape)}"
                    )
                own.copy_(source.prompt)
        made: dict[str, Companion] = {companion_name("prompt"): prompt}
        if self.train_norms:
            weights = norm_weights(model)
            norms = TrainedNorms(
                list(weights), [w.numel() for w in weights.values()], device=device, dtype=dtype
            )
            with torch.no_grad():
                for own, weight in zip(norms.weights, weights.values(), strict=True):
                    own.copy_(weight)
            made[companion_name("norms")] = norms
        return made

    @classmethod
    def check_layer(cls, name: str, arguments: dict[str, Any]) -> None:
        check_arguments(**arguments)

    @classmethod
    def constructor_arguments(cls, base: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        shapes = ("ranks", "scales", "biases")
        loras = empty_experts(base, *(arguments[name] for name in shapes))
        rest = {name: value for name, value in arguments.items() if name not in shapes}
        return {"loras": loras, **rest}


def stack_of_linears(model: nn.Module, names) -> dict[str, str]:
    """``"encoder"`` or ``"decoder"`` for each name of a W_o of a T5-type model.

    Raises:
        ValueError: a name is no W_o of a feed-forward of `model`.
    """
    stacks = t5_stacks(model)
    place = {
        block.layer[-1].DenseReluDense.wo: key
        for key, stack in stacks.items()
        for block in stack.block
    }
    found = {}
    for name in names:
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            linear = None
        if linear not in place:
            raise ValueError(
                f"target_modules: wanted the second linear of T5 feed-forwards, DenseReluDense.wo, "
                f"but the model has none called {name}"
            )
        found[name] = place[linear]
    return found


def _checked_prompt(prompt) -> int | tuple[int, ...]:
    ids = [prompt] if isinstance(prompt, int) else prompt
    least = 1 if isinstance(prompt, int) else 0
    if (
        isinstance(prompt, bool)
        or not isinstance(ids, Sequence)
        or isinstance(ids, str)
        or not ids
        or not all(isinstance(i, int) and i >= least for i in ids)
    ):
        raise ValueError(
            f"prompt: wanted token ids or a number of positions of at least 1, got {prompt!r}"
        )
    return prompt if isinstance(prompt, int) else tuple(prompt)


def _prompt_length(prompt: int | tuple[int, ...]) -> int:
    return prompt if isinstance(prompt, int) else len(prompt)


def _initial_prompt(model: nn.Module, prompt: int | tuple[int, ...]) -> Tensor:
    """Rows of the encoder's embeddings, ``[P, features]``."""
    table = t5_stacks(model)["encoder"].embed_tokens.weight
    if isinstance(prompt, int):
        ids = torch.randint(len(table), (prompt,))
    else:
        ids = torch.tensor(prompt)
        if max(prompt) >= len(table):
            raise ValueError(
                f"prompt: wanted token ids below {len(table)}, the vocabulary, got {max(prompt)}"
            )
    return table.detach()[ids.to(table.device)]
