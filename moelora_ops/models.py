"""Whole models: put adapters into any torch model, swap reference layers for fused ones."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from . import reference
from .depth import NumberedLayer, numbered_layer
from .nn import AdapterLinear, MoLALinear
from .nn.mola import check_arguments

ALL_LINEAR = "all-linear"
IMPLEMENTATIONS = ("fused", "reference")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclasses.dataclass(frozen=True)
class MoLAConfig:
    """MoLA for a whole model (2402.08562).

    Args:
        num_experts: one number for every layer; or a string of digits that divides the depth
            evenly, ``"2468"`` by quarters (layer i of L takes ``digits[i * len(digits) // L]``); or
            one number per layer.
        rank, alpha, top_k, dropout, dropout_mode, renormalize: see
            :class:`moelora_ops.nn.MoLALinear`.
        target_modules: names of the linears to adapt, compared with the end of the qualified name;
            or ``"all-linear"``, every linear inside the numbered layers.
        adapter_dtype: of the new parameters; None takes each base layer's.

    Raises:
        TypeError, ValueError: a field is out of range; the message names it.
    """

    num_experts: str | int | Sequence[int] = "2468"
    rank: int = 8
    alpha: float = 16.0
    top_k: int = 2
    dropout: float = 0.0
    dropout_mode: str = "token"
    renormalize: bool = True
    target_modules: str | Sequence[str] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    adapter_dtype: torch.dtype | None = None

    def __post_init__(self):
        experts = self.num_experts
        if isinstance(experts, str):
            if not experts or not set(experts) <= set("0123456789"):
                raise ValueError(f"num_experts: wanted a string of digits, got {experts!r}")
            per_layer = [int(digit) for digit in experts]
        elif isinstance(experts, Sequence):
            per_layer = list(experts)
            if not per_layer:
                raise ValueError("num_experts: wanted one int per layer, got an empty sequence")
            object.__setattr__(self, "num_experts", tuple(per_layer))
        else:
            per_layer = [experts]
        for number in per_layer:
            check_arguments(
                number, self.rank, self.alpha, self.top_k, self.dropout, self.dropout_mode
            )
        if not isinstance(self.renormalize, bool):
            raise TypeError(f"renormalize: wanted a bool, got {self.renormalize!r}")
        targets = self.target_modules
        if targets != ALL_LINEAR:
            names = [] if isinstance(targets, str) else list(targets)
            if not names or not all(isinstance(name, str) and name for name in names):
                raise ValueError(
                    f"target_modules: wanted {ALL_LINEAR!r} or a sequence of module names, "
                    f"got {targets!r}"
                )
            object.__setattr__(self, "target_modules", tuple(names))
        check_dtype("adapter_dtype", self.adapter_dtype)

    def layer_arguments(self, name: str, layer: NumberedLayer | None) -> dict[str, Any]:
        """Constructor arguments, beside the base, of the adapter called `name` in `layer`."""
        experts = self.num_experts
        if not isinstance(experts, int):
            if layer is None:
                raise ValueError(
                    f"num_experts: wanted one int, as {name} is outside the numbered layers and "
                    f"has no depth; got {experts!r}"
                )
            if isinstance(experts, str):
                if len(experts) > layer.depth:
                    raise ValueError(
                        f"num_experts: wanted at most {layer.depth} digits, as {name} sits in a "
                        f"stack of {layer.depth} layers; got {experts!r}"
                    )
                experts = int(experts[layer.index * len(experts) // layer.depth])
            else:
                if len(experts) != layer.depth:
                    raise ValueError(
                        f"num_experts: wanted {layer.depth} entries, one per layer of the stack "
                        f"that {name} sits in; got {len(experts)}"
                    )
                experts = experts[layer.index]
        same = ("rank", "alpha", "top_k", "dropout", "dropout_mode", "renormalize")
        return {"num_experts": experts, **{field: getattr(self, field) for field in same}}


class Method(NamedTuple):
    """One row of the table of methods.

    Attributes:
        config: its configuration; built from one layer's arguments it also validates them.
        fused, reference: its layer classes; they take the same arguments and keep each as an
            attribute.
        arguments: the names of the arguments beside the base.
    """

    config: type
    fused: type[AdapterLinear]
    reference: type[nn.Module]
    arguments: tuple[str, ...]


METHODS = {
    "mola": Method(
        MoLAConfig,
        MoLALinear,
        reference.MoLALinear,
        ("num_experts", "rank", "alpha", "top_k", "dropout", "dropout_mode", "renormalize"),
    ),
}


class AdaptedLayer(NamedTuple):
    """An adapter in a model: its qualified name, the module and its key in :data:`METHODS`."""

    name: str
    module: nn.Module
    method: str


def adapted_layers(model: nn.Module) -> Iterator[AdaptedLayer]:
    """Every adapted layer of `model`, fused or reference, in the order of its modules."""
    for name, module in model.named_modules():
        for key, method in METHODS.items():
            if isinstance(module, (method.fused, method.reference)):
                yield AdaptedLayer(name, module, key)


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that adapters have brought into `model`: experts and routers, no bases."""
    seen = set()
    for layer in adapted_layers(model):
        for parameter in layer.module.parameters(recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                yield parameter


def apply(model: nn.Module, config: MoLAConfig, *, implementation: str = "fused") -> nn.Module:
    """Wrap the target linears of `model` in place and freeze everything else.

    Everything is checked first; a call that raises leaves the model as it was.

    Args:
        model: any torch model.  A target is an ``nn.Linear`` or any module with integer
            ``in_features`` and ``out_features``; one that is registered under several names stays
            one.
        config: the method and its settings, such as :class:`MoLAConfig`.
        implementation: ``"fused"``, or ``"reference"`` for the eager layers that the kernels are
            checked against.

    Returns:
        `model`.  The new parameters are on their base's device (meta included) and the only ones
        that require a gradient.

    Raises:
        TypeError, ValueError: an argument does not fit the model; the message names the argument
            and the module.
    """
    _check_model(model)
    method = next((m for m in METHODS.values() if type(config) is m.config), None)
    if method is None:
        wanted = [m.config.__name__ for m in METHODS.values()]
        raise TypeError(f"config: wanted one of {wanted}, got {type(config).__name__}")
    adapted = next(adapted_layers(model), None)
    if adapted is not None:
        raise ValueError(f"model: is already adapted ({adapted.name or 'the model itself'})")
    names = _target_names(model, config.target_modules)
    if not names:
        raise ValueError(
            f"target_modules: wanted linears of the model, but none matches {config.target_modules}"
        )
    arguments = {name: config.layer_arguments(name, numbered_layer(model, name)) for name in names}
    return install(
        model,
        {name: (method, kwargs) for name, kwargs in arguments.items()},
        implementation,
        config.adapter_dtype,
    )


def install(
    model: nn.Module,
    layers: dict[str, tuple[Method, dict[str, Any]]],
    implementation: str,
    dtype: torch.dtype | None,
    prepare: Callable[[str, nn.Module], None] = lambda name, layer: None,
) -> nn.Module:
    """Replace the module of each name by its adapter, all or none, and freeze the rest.

    Args:
        layers: per qualified name the method and its layer's validated arguments.
        dtype: of the new parameters; None takes each base's.
        prepare: called with each name and its new layer before the model changes.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: wanted one of {IMPLEMENTATIONS}, got {implementation!r}")
    made: dict[nn.Module, tuple[nn.Module, dict[str, Any]]] = {}
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for name, (method, arguments) in layers.items():
            base = model.get_submodule(name)
            if base not in made:
                layer = getattr(method, implementation)(base, **arguments, dtype=dtype)
                prepare(name, layer)
                made[base] = layer.train(base.training), arguments
            elif made[base][1] != arguments:
                raise ValueError(
                    f"num_experts: {name} is also registered elsewhere in the model, at a depth "
                    f"with other settings: {made[base][1]} and {arguments}"
                )
    except BaseException:
        for parameter, requires_grad in required:  # constructors freeze their base
            parameter.requires_grad_(requires_grad)
        raise
    model.requires_grad_(False)
    _replace(model, {base: layer for base, (layer, _) in made.items()})
    return model


def fuse(model: nn.Module) -> nn.Module:
    """Swap every reference layer of `model` for the fused one, in place.

    Parameters stay the same objects, so optimizers and ties go on working; train or eval mode stays
    too.  Outputs are equal within rounding.

    Returns:
        `model`; if it is itself a reference layer, the fused layer.

    Raises:
        ValueError: there is no reference layer, or one has hooks, which would be lost.
    """
    _check_model(model)
    fused = {}
    for name, layer, key in adapted_layers(model):
        if isinstance(layer, METHODS[key].reference):
            if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
                raise ValueError(
                    f"model: {name or 'the layer'} has hooks, which fuse would lose; remove them"
                )
            fused[layer] = METHODS[key].fused
    if not fused:
        raise ValueError("model: has no reference layers to fuse")
    made = {layer: cls.from_reference(layer) for layer, cls in fused.items()}
    _replace(model, made)
    return made.get(model, model)


def check_dtype(name: str, dtype: torch.dtype | None) -> None:
    if dtype not in (None, *_DTYPES):
        raise ValueError(f"{name}: wanted None or one of {_DTYPES}, got {dtype!r}")


def is_linear(module: nn.Module) -> bool:
    """Whether an adapter can wrap `module`."""
    # nn.MultiheadAttention reads this one's weight and never calls it.
    return not isinstance(module, NonDynamicallyQuantizableLinear) and all(
        isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features")
    )


def _target_names(model: nn.Module, targets: str | tuple[str, ...]) -> list[str]:
    """Qualified names of the linears that `targets` means, outermost only."""
    names: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if names and name.startswith(names[-1] + "."):
            continue  # what is inside a target is its own business
        if targets == ALL_LINEAR:
            if is_linear(module) and name and numbered_layer(model, name) is not None:
                names.append(name)
        elif any(name == target or name.endswith("." + target) for target in targets):
            if isinstance(module, NonDynamicallyQuantizableLinear):
                raise TypeError(
                    f"target_modules: {name} belongs to an nn.MultiheadAttention, which reads its "
                    "weight and never calls it, so that experts would have no effect"
                )
            if not is_linear(module):
                raise TypeError(
                    "target_modules: wanted linears with integer in_features and out_features, "
                    f"but {name} is {type(module).__name__}"
                )
            names.append(name)
    return names


def _replace(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Put replacements[m] wherever m is registered below `model`."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() skips a second name
            if child in replacements:
                setattr(parent, name, replacements[child])


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: wanted a torch.nn.Module, got {type(model).__name__}")
