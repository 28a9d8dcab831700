"""MoLE for a whole model: which trained adapters are mixed, and which linears share a gate."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import functional
from ..companions import Companion, companion_name
from ..depth import numbered_layer
from ..integrations.peft import is_lora, read_loras
from ..nn import LoRA, SharedGate, stack_loras
from ..nn.checks import check_count
from ..nn.mole import empty_loras
from ..nn.mole_gate import check_arguments
from .base import ALL_LINEAR, AdapterConfig, is_linear

GATES = ("matrix", "layer", "block", "network")


@dataclasses.dataclass(frozen=True)
class MoLEConfig(AdapterConfig):
    """Compose trained LoRAs with MoLE (2404.13628); only gates are trained.

    Args:
        adapters: the experts, in order.  Each is a directory that PEFT wrote, a model with PEFT's
            LoRA layers (its parameters are copied), or a mapping from qualified names of linears
            to (A ``[r, in]``, B ``[out, r]``, scale), such as
            :func:`moelora_ops.integrations.peft.read_loras` gives.  A linear that only some of them
            adapt gets an expert of zeros for each of the others.
        gates: ``"matrix"``, a gate for every linear; ``"layer"``, one for sibling linears;
            ``"block"``, one for each numbered layer; ``"network"``, one for each stack of them (an
            encoder and a decoder have different tokens).  What the wider gates see is our choice:
            :class:`moelora_ops.nn.SharedGate`.  Their leaders are the first of the linears in the
            order of the model's modules, with its siblings.  Linears outside every stack, and
            those without siblings at ``"layer"``, have gates of their own.  Keys and values of
            cross-attention see other tokens than their block: leave them out (`target_modules`) at
            ``"block"`` and ``"network"``.
        granularity, normalization, mask_mode, compact: see :class:`moelora_ops.nn.MoLELinear`.
        siblings: groups of names of linears that see the same input if they have the same parent.
        target_modules: ``"all-linear"``, every linear that an adapter adapts, or names to choose
            among these, compared with the end of the qualified name.
        adapter_dtype: of the experts; None takes each base layer's.  Gates are float32 at least.

    Raises:
        TypeError, ValueError: a field is out of range; the message names it.  What the adapters
            hold is read and checked by :func:`moelora_ops.apply`.
    """

    adapters: Sequence[str | os.PathLike | nn.Module | Mapping[str, tuple]] = ()
    gates: str = "matrix"
    granularity: str = "token"
    normalization: str = "l2"
    mask_mode: str = "gate"
    compact: bool = False
    siblings: Sequence[Sequence[str]] = (
        ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"),  # Llama and its kin
        ("q", "k", "v"), ("wi_0", "wi_1"),  # T5
        ("query", "key", "value"),  # BERT
    )  # fmt: skip
    target_modules: str | Sequence[str] = dataclasses.field(default=ALL_LINEAR, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        kinds = (str, os.PathLike, nn.Module, Mapping)
        several = isinstance(self.adapters, Sequence) and not isinstance(self.adapters, str)
        if not several or not self.adapters:
            raise ValueError(
                f"adapters: wanted a list of at least one directory, model or mapping, got "
                f"{self.adapters!r:.60}"
            )
        for i, adapter in enumerate(self.adapters):
            if not isinstance(adapter, kinds):
                raise TypeError(
                    f"adapters[{i}]: wanted a directory, a model or a mapping, got "
                    f"{type(adapter).__name__}"
                )
        if self.gates not in GATES:
            raise ValueError(f"gates: wanted one of {GATES}, got {self.gates!r}")
        check_arguments(self.granularity, self.normalization, self.mask_mode, True, self.compact)
        object.__setattr__(self, "adapters", tuple(self.adapters))
        object.__setattr__(self, "siblings", tuple(tuple(group) for group in self.siblings))

    def layers(self, model: nn.Module) -> dict[str, dict[str, Any]]:
        """The experts of every linear that an adapter adapts, by qualified name."""
        experts = [
            adapter if isinstance(adapter, Mapping) else read_loras(adapter)
            for adapter in self.adapters
        ]
        modules = dict(model.named_modules())
        for i, expert in enumerate(experts):
            for name in expert:
                if name not in modules or not is_linear(modules[name]):
                    raise ValueError(
                        f"adapters[{i}]: has a LoRA for {name}, which is no linear of the model"
                    )
        names = [
            name
            for name in modules
            if any(name in expert for expert in experts) and self._is_target(name)
        ]
        if not names:
            raise ValueError(
                f"target_modules: wanted linears that the adapters adapt, but none of them matches "
                f"{self.target_modules}"
            )
        together = {name for group in self._groups(model, names) for name in group.all}
        return {
            name: {
                "loras": _experts_of(name, modules[name], experts),
                "granularity": self.granularity,
                "normalization": self.normalization,
                "mask_mode": self.mask_mode,
                "gated": name not in together,
                "compact": self.compact,
            }
            for name in names
        }

    def companions(
        self,
        model: nn.Module,
        layers: dict[str, dict[str, Any]],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> dict[str, Companion]:
        """A :class:`SharedGate` for every group of linears that share one."""
        ranks = {name: max(a.shape[0] for a, _, _ in layers[name]["loras"]) for name in layers}
        return {
            companion_name("gate", group.leaders[0]): SharedGate(
                group.leaders, group.followers,
                [model.get_submodule(name).out_features for name in group.leaders],
                [ranks[name] for name in group.leaders], len(self.adapters), self.granularity,
                self.normalization, self.mask_mode, self.compact, device=device, dtype=dtype,
            )
            for group in self._groups(model, list(layers))
        }  # fmt: skip

    @classmethod
    def check_layer(cls, name: str, arguments: dict[str, Any]) -> None:
        """See :meth:`AdapterConfig.check_layer`."""
        rank, scales = arguments["rank"], arguments["scales"]
        check_count("rank", rank)
        if not isinstance(scales, list) or not scales:
            raise ValueError(f"scales: wanted a list of at least one number, got {scales!r}")
        for scale in scales:
            functional.check_finite("scales", scale)
        check_arguments(*(arguments[field] for field in _SETTINGS))

    @classmethod
    def constructor_arguments(cls, base: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        """See :meth:`AdapterConfig.constructor_arguments`."""
        shape = {key: arguments[key] for key in ("rank", "scales")}
        loras = empty_loras(base.in_features, base.out_features, **shape)
        return {"loras": loras, **{field: arguments[field] for field in _SETTINGS}}

    def _is_target(self, name: str) -> bool:
        return self.target_modules == ALL_LINEAR or any(
            name == target or name.endswith("." + target) for target in self.target_modules
        )

    def _groups(self, model: nn.Module, names: list[str]) -> Iterator["_Group"]:
        """The linears of `names` that share gates."""
        if self.gates == "matrix":
            return
        places: dict[Any, list[str]] = {}
        for name in names:
            layer = numbered_layer(model, name)
            if self.gates == "layer":
                place = self._siblings_of(name)
            elif layer is None:
                place = None
            elif self.gates == "block":
                place = layer.name
            else:
                place = layer.name.rpartition(".")[0]
            if place is not None:
                places.setdefault(place, []).append(name)
        for members in places.values():
            first = self._siblings_of(members[0])
            leaders = [n for n in members if first is not None and self._siblings_of(n) == first]
            leaders = leaders or members[:1]
            if len(members) > 1:
                yield _Group(leaders, [name for name in members if name not in leaders])

    def _siblings_of(self, name: str) -> tuple[str, int] | None:
        """What linears with the same input have in common; None for those without siblings."""
        parent, _, own = name.rpartition(".")
        index = next((i for i, group in enumerate(self.siblings) if own in group), None)
        return None if index is None else (parent, index)


_SETTINGS = ("granularity", "normalization", "mask_mode", "gated", "compact")


class _Group(NamedTuple):
    leaders: list[str]
    followers: list[str]

    @property
    def all(self) -> list[str]:
        return self.leaders + self.followers


def _experts_of(name: str, linear: nn.Module, experts: Sequence[Mapping]) -> list[tuple]:
    """What each adapter has for one linear, checked."""
    if is_lora(linear):
        raise ValueError(
            f"model: {name} has PEFT's LoRA already; compose onto the plain model (unload())"
        )
    sizes = linear.in_features, linear.out_features
    like = next(expert[name][0] for expert in experts if name in expert)
    nothing = LoRA(like.new_zeros(1, sizes[0]), like.new_zeros(sizes[1], 1), 1.0)
    loras = [expert.get(name, nothing) for expert in experts]
    try:
        stack_loras(loras, *sizes, device="meta")
    except (TypeError, ValueError) as error:
        raise type(error)(f"adapters: {name}: {error}") from error
    return loras
