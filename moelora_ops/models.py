"""Whole models: put adapters into any torch model, swap reference layers for fused ones."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import reference, sharded
from .companions import COMPANIONS, Companion, check_model, companions_of, root_of
from .configs import (
    AdapterConfig,
    LoRAConfig,
    MoLAConfig,
    MoLEConfig,
    MoR1EConfig,
    OrchMoEConfig,
    PEMTConfig,
    PEMTSourceConfig,
    PolytroponConfig,
)
from .integrations.peft import fused_lora, is_lora
from .integrations.poly import fused_poly, is_poly
from .integrations.xlora import fused_xlora, is_xlora
from .intuition import IntuitionEncoder
from .nn import (
    AdapterLinear,
    LoRALinear,
    MoLALinear,
    MoLELinear,
    MoR1ELinear,
    OrchMoELinear,
    PEMTLinear,
    PEMTSourceLinear,
    PolytroponLinear,
    SharedGate,
    TaskIds,
    TaskRouters,
)
from .prompts import SourcePrompt, TargetPrompt, TrainedNorms

IMPLEMENTATIONS = ("fused", "reference")

# Whether a layer is PEFT's, and what fuses it: the first that fits, as X-LoRA's layers have LoRAs.
_PEFT = ((is_xlora, fused_xlora), (is_poly, fused_poly), (is_lora, fused_lora))


class Method(NamedTuple):
    """One row of the table of methods.

    Attributes:
        config: its configuration, which also checks a layer's arguments that come from a file.
        fused, reference: its layer classes, with the same constructor and state_dict.
        arguments: what a file has of a layer beside its tensors: attributes of both classes, plain
            numbers, strings, bools and lists of these.
        training_only: those of `arguments` that may differ between a file and the layers that are
            already in a model, since they do not change what these compute.
        companions: its companion classes, by the name that files have for them.
    """

    config: type[AdapterConfig]
    fused: type[AdapterLinear]
    reference: type[nn.Module]
    arguments: tuple[str, ...]
    training_only: tuple[str, ...] = ()
    companions: Mapping[str, type[Companion]] = {}


METHODS = {
    "lora": Method(
        LoRAConfig,
        LoRALinear,
        reference.LoRALinear,
        ("rank", "alpha", "dropout", "rslora"),
        training_only=("dropout",),
    ),
    "mole": Method(
        MoLEConfig,
        MoLELinear,
        reference.MoLELinear,
        ("rank", "scales", "granularity", "normalization", "mask_mode", "gated", "compact"),
        companions={"gate": SharedGate},
    ),
    "mola": Method(
        MoLAConfig,
        MoLALinear,
        reference.MoLALinear,
        ("num_experts", "rank", "alpha", "top_k", "dropout", "dropout_mode", "renormalize"),
        training_only=("dropout", "dropout_mode"),
    ),
    "mor1e": Method(
        MoR1EConfig,
        MoR1ELinear,
        reference.MoR1ELinear,
        ("rank_down", "rank_up", "token_scale", "task_scale", "mode"),
        companions={"encoder": IntuitionEncoder},
    ),
    "orchmoe": Method(
        OrchMoEConfig,
        OrchMoELinear,
        reference.OrchMoELinear,
        OrchMoELinear.arguments,
        companions={"task_routers": TaskRouters},
    ),
    "polytropon": Method(
        PolytroponConfig,
        PolytroponLinear,
        reference.PolytroponLinear,
        PolytroponLinear.arguments,
        companions={"task_ids": TaskIds},
    ),
    "pemt_source": Method(
        PEMTSourceConfig,
        PEMTSourceLinear,
        reference.PEMTSourceLinear,
        ("rank", "alpha", "kind", "init"),
        training_only=("init",),
        companions={"prompt": SourcePrompt},
    ),
    "pemt": Method(
        PEMTConfig,
        PEMTLinear,
        reference.PEMTLinear,
        (
            "ranks",
            "scales",
            "biases",
            "activation",
            "gate_query",
            "gate_features",
            "prompt_length",
            "bottleneck",
            "residual",
            "sparsity",
        ),
        training_only=("dropout", "sparsity"),
        companions={"prompt": TargetPrompt, "norms": TrainedNorms},
    ),
}


class AdaptedLayer(NamedTuple):
    """An adapter in a model: its qualified name, the module and its key in :data:`METHODS`."""

    name: str
    module: nn.Module
    method: str


def adapted_layers(model: nn.Module) -> Iterator[AdaptedLayer]:
    """Every adapted layer of `model`, fused or reference, in the order of its modules.

    What companions contain, or a layer beside its base, belongs to them and is not listed.
    """
    owned: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if module is getattr(root_of(model), COMPANIONS, None):
            owned += (name + ".",)
        inside = [owner for owner in owned if name.startswith(owner)]
        if any(not name.startswith(owner + "base.") for owner in inside):
            continue
        for key, method in METHODS.items():
            if isinstance(module, (method.fused, method.reference)):
                owned += (name + "." if name else "",)
                yield AdaptedLayer(name, module, key)


def adapter_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The state of an adapted layer or a companion, by name: everything but what its base has.

    Under FSDP2 these are the shards, also where it has gathered the parameters for a forward pass:
    what is written to them lasts.
    """
    state = module.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if not name.startswith("base.")}


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that adapters have brought into `model`: experts, gates, routers; no bases."""
    check_model(model)
    modules = [layer.module for layer in adapted_layers(model)]
    seen = set()
    for module in (*modules, *companions_of(model).values()):
        for tensor in adapter_tensors(module).values():
            if isinstance(tensor, nn.Parameter) and tensor not in seen:
                seen.add(tensor)
                yield tensor


def apply(model: nn.Module, config: AdapterConfig, *, implementation: str = "fused") -> nn.Module:
    """Wrap the target linears of `model` in place and freeze everything else.

    Modules that the method has beside its layers, such as a shared router, come into
    ``model.moelora_companions``.  Everything is checked first; a call that raises leaves the model
    as it was.

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
            and the module.  Or `model` is under DistributedDataParallel or fully_shard already.
    """
    check_model(model)
    method = next((m for m in METHODS.values() if type(config) is m.config), None)
    if method is None:
        wanted = [m.config.__name__ for m in METHODS.values()]
        raise TypeError(f"config: wanted one of {wanted}, got {type(config).__name__}")
    sharded.check_not_managed(model, "apply")
    adapted = next(adapted_layers(model), None)
    if adapted is not None:
        raise ValueError(f"model: is already adapted ({adapted.name or 'the model itself'})")
    arguments = config.layers(model)
    return install(
        model,
        {name: (method, kwargs) for name, kwargs in arguments.items()},
        implementation,
        config.adapter_dtype,
        lambda device, dtype: config.companions(model, arguments, device=device, dtype=dtype),
    )


def install(
    model: nn.Module,
    layers: dict[str, tuple[Method, dict[str, Any]]],
    implementation: str,
    dtype: torch.dtype | None,
    companions: Callable[[torch.device, torch.dtype], dict[str, Companion]],
    prepare: Callable[[str, nn.Module], None] = lambda name, module: None,
) -> nn.Module:
    """Replace the module of each name by its adapter, all or none, and freeze the rest.

    Args:
        layers: per qualified name the method and its layer's validated constructor arguments.
        dtype: of the new parameters; None takes each base's.
        companions: makes the companions, given the device and dtype of the first layer.
        prepare: called with the qualified name of each new layer and companion, and the module,
            before the model changes.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: wanted one of {IMPLEMENTATIONS}, got {implementation!r}")
    root = root_of(model)
    if hasattr(root, COMPANIONS):
        raise ValueError(f"model: already has an attribute {COMPANIONS}")
    made: dict[nn.Module, tuple[nn.Module, dict[str, Any]]] = {}
    with _requirements_kept(model):
        for name, (method, arguments) in layers.items():
            base = model.get_submodule(name)
            if base not in made:
                layer = getattr(method, implementation)(base, **arguments, dtype=dtype)
                prepare(name, layer)
                made[base] = layer.train(base.training), arguments
                continue
            first = made[base][1]
            for key, value in arguments.items():
                if not _equal(value, first.get(key)):
                    raise ValueError(
                        f"{key}: {name} is also registered elsewhere in the model, where its value "
                        f"differs: {first.get(key)!r:.60} and {value!r:.60}"
                    )
        tensors = (t for layer, _ in made.values() for t in adapter_tensors(layer).values())
        like = next(t for t in tensors if t.is_floating_point())
        new = companions(like.device, like.dtype)
        for name, companion in new.items():
            companion.check(root)
            prepare(f"{COMPANIONS}.{name}", companion.train(model.training))
    model.requires_grad_(False)
    _replace(model, {base: layer for base, (layer, _) in made.items()})
    if new:
        setattr(root, COMPANIONS, nn.ModuleDict(new))
        _attach(model)
    return model


def fuse(model: nn.Module) -> nn.Module:
    """Swap every reference layer of `model`, and PEFT's LoRA, X-LoRA and Poly linears, for fused.

    In place.  Parameters stay the same objects, so optimizers and ties go on working; train or eval
    mode stays too.  Outputs are equal within rounding.  PEFT no longer finds its layers afterwards:
    save with :func:`save_adapter`.  Poly's parameters are copied, as PEFT lays them out otherwise;
    its task ids now come from :func:`moelora_ops.task_ids`.  X-LoRA's layers stay PEFT's, with all
    that PEFT does with them, and run our kernels.

    Returns:
        `model`; if it is itself such a layer, the fused layer.

    Raises:
        ValueError: there is no such layer, or one has hooks, which would be lost, or a PEFT layer
            is more than one plain LoRA, under X-LoRA several, or `model` has lost what a companion
            needs, or is under DistributedDataParallel or fully_shard already.
    """
    check_model(model)
    sharded.check_not_managed(model, "fuse")
    fused = {
        name: (layer, METHODS[key].fused.from_reference)
        for name, layer, key in adapted_layers(model)
        if isinstance(layer, METHODS[key].reference)
    }
    for name, layer in model.named_modules():
        build = next((build for fits, build in _PEFT if fits(layer)), None)
        if build is not None:
            fused[name] = layer, build
    for name, (layer, _) in fused.items():
        if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
            raise ValueError(
                f"model: {name or 'the layer'} has hooks, which fuse would lose; remove them"
            )
    if not fused:
        raise ValueError(
            "model: has no reference layers to fuse, and none of PEFT's LoRA, X-LoRA or Poly"
        )
    for companion in companions_of(model).values():
        companion.check(root_of(model))
    with _requirements_kept(model):
        made = {layer: build(layer) for layer, build in fused.values()}
    _replace(model, made)
    result = made.get(model, model)
    tasks = {made[layer].num_tasks for layer, build in fused.values() if build is fused_poly}
    if tasks:
        ids = TaskIds(min(tasks))
        setattr(
            root_of(result), COMPANIONS, nn.ModuleDict({**companions_of(result), "task_ids": ids})
        )
    _attach(result)
    return result


@contextlib.contextmanager
def _requirements_kept(model: nn.Module) -> Iterator[None]:
    """On failure, undo that constructors freeze their base."""
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for parameter, requires_grad in required:
            parameter.requires_grad_(requires_grad)
        raise


def _attach(model: nn.Module) -> None:
    """Connect every companion with the layers that are now in `model`."""
    model = root_of(model)
    layers = list(adapted_layers(model))
    for companion in companions_of(model).values():
        for key, method in METHODS.items():
            if isinstance(companion, tuple(method.companions.values())):
                own = {name: module for name, module, of in layers if of == key}
                companion.attach(model, own)


def _equal(one: Any, other: Any) -> bool:
    """Equality of arguments, which may hold tensors."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is other or (type(one) is type(other) and torch.equal(one, other))
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one == other


def _replace(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Put replacements[m] wherever m is registered below `model`."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() skips a second name
            if child in replacements:
                setattr(parent, name, replacements[child])
