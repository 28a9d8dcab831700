"""PEFT's LoRA: adapter directories and models in memory, read as plain factors; its layers fused.

What is more than a plain LoRA on a linear (DoRA, trained biases, whole modules saved beside it, an
initialisation that changes the base) is refused by name, as its factors alone say something else.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..nn import LoRA, LoRALinear

_CONFIG_NAME = "adapter_config.json"
_WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of names inside a PeftModel, which files have too

# Settings of a LoraConfig that make more of the adapter than its A and B.
_NOT_PLAIN = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias",
    "modules_to_save", "monteclora_config", "target_parameters", "trainable_token_indices",
    "use_bdlora", "use_dora", "use_qalora", "velora_config",
)  # fmt: skip
# Initialisations that leave the base as it is.
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


def read_loras(
    source: str | os.PathLike | nn.Module, adapter_name: str | None = None
) -> dict[str, LoRA]:
    """The LoRAs of a PEFT adapter, by the qualified names of the linears that they adapt.

    Names are those of the model without PEFT.  For ``nn.MoLELinear`` and others collect what
    several adapters have for one linear; :class:`moelora_ops.MoLEConfig` does so for a whole model.

    Args:
        source: a directory that PEFT's ``save_pretrained`` wrote; or a ``PeftModel``, or a model
            that PEFT has put LoRA layers into, whose parameters are shared and not copied.
        adapter_name: which one of a model that has several.

    Returns:
        A, B and scale of each linear.  The scale is ``alpha / r``, or ``alpha / √r`` with rslora,
        rank and alpha patterns taken into account.

    Raises:
        FileNotFoundError: `source` is no directory of an adapter.
        ValueError: the adapter is no plain LoRA, a file is damaged, or the name is missing; the
            message says what was found.
        ImportError: safetensors, for a directory, or peft, for a model, is not installed.
    """
    if isinstance(source, nn.Module):
        return _read_model(source, adapter_name)
    if adapter_name is not None:
        raise ValueError(f"adapter_name: wanted None for a directory, got {adapter_name!r}")
    return _read_directory(Path(source))


def fused_lora(layer: nn.Module) -> LoRALinear:
    """Our layer in place of a PEFT LoRA linear (:func:`is_lora`), around the same parameters.

    Raises:
        ValueError: it does something that the fused layer would not do.
    """
    names = list(layer.lora_A)
    if len(names) != 1:
        raise ValueError(f"model: wanted PEFT layers with one adapter, got {names}; delete others")
    (name,) = names
    if layer.disable_adapters or list(layer.active_adapters) != names:
        raise ValueError(f"model: the PEFT adapter {name!r} is not active; enable it first")
    check_layer("model", layer, name)
    if "forward" in vars(layer):
        raise ValueError("model: a PEFT layer has a forward that is not its own")
    dropout = getattr(layer.lora_dropout[name], "p", 0.0)  # an identity without dropout
    base = layer.get_base_layer()
    return LoRALinear.sharing(
        base, layer.lora_A[name].weight, layer.lora_B[name].weight,
        layer.scaling[name] * layer.r[name], dropout=dropout,
    ).train(layer.training)  # fmt: skip


def is_lora(module: nn.Module) -> bool:
    """Whether `module` is a linear, or another layer, that PEFT has given LoRAs."""
    # By its parts: where no such layer is, peft need not be installed.
    return all(hasattr(module, part) for part in ("base_layer", "lora_A", "lora_B", "lora_dropout"))


def _read_directory(directory: Path) -> dict[str, LoRA]:
    config_path, path = directory / _CONFIG_NAME, directory / _WEIGHTS_NAME
    for file in (config_path, path):
        if not file.is_file():
            raise FileNotFoundError(
                f"{directory}: wanted a directory with a PEFT adapter, but it has no {file.name}"
            )
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(
            "reading PEFT adapters needs safetensors: pip install 'moelora-ops[peft]'"
        ) from error
    try:
        config = json.loads(config_path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{config_path}: is no json ({error})") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{config_path}: wanted peft_type 'LORA', got {kind!r}")
    _check_config(str(config_path), config)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: is truncated or corrupted ({error})") from error

    factors: dict[str, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", key)
        if match is None:
            raise ValueError(f"{path}: wanted lora_A.weight and lora_B.weight only, got {key}")
        factors.setdefault(match[1].removeprefix(_PREFIX), {})[match[2]] = tensor
    if not factors:
        raise ValueError(f"{path}: has no LoRAs")
    return {name: _lora(f"{path}: {name}", name, pair, config) for name, pair in factors.items()}


def _lora(where: str, name: str, pair: dict[str, Any], config: Mapping[str, Any]) -> LoRA:
    """The LoRA of one linear from its tensors and the adapter's settings."""
    if pair.keys() != {"A", "B"}:
        raise ValueError(f"{where}: wanted both lora_A and lora_B, got lora_{'AB'['B' in pair]}")
    a, b = pair["A"], pair["B"]
    if a.dim() != 2 or b.dim() != 2:
        raise ValueError(
            f"{where}: wanted a LoRA of a linear, got shapes {list(a.shape)} and {list(b.shape)}"
        )
    rank = _by_pattern(config.get("rank_pattern"), name, config.get("r"))
    if a.shape[0] != rank or b.shape[1] != rank:
        raise ValueError(
            f"{where}: wanted rank {rank} as {_CONFIG_NAME} says, got A {list(a.shape)} and "
            f"B {list(b.shape)}"
        )
    alpha = _by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha"))
    return LoRA(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, otherwise: Any) -> Any:
    """The value of the first pattern that the end of `name` matches, as in PEFT."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return value
    return otherwise


def _read_model(model: nn.Module, adapter_name: str | None) -> dict[str, LoRA]:
    layers = {
        name.removeprefix(_PREFIX): module
        for name, module in model.named_modules()
        if is_lora(module)
    }
    names = sorted({adapter for layer in layers.values() for adapter in layer.lora_A})
    if not names:
        raise ValueError("source: wanted a model with PEFT LoRA layers, got one without")
    if adapter_name is None:
        if len(names) > 1:
            raise ValueError(f"adapter_name: wanted one of {names}, as there are several, got None")
        (adapter_name,) = names
    elif adapter_name not in names:
        raise ValueError(f"adapter_name: wanted one of {names}, got {adapter_name!r}")
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if config is not None:
        _check_config(f"source: adapter {adapter_name!r}", vars(config))
    loras = {}
    for name, layer in layers.items():
        if adapter_name in layer.lora_A:
            check_layer(f"source: {name}", layer, adapter_name)
            a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
            loras[name] = LoRA(a, b, float(layer.scaling[adapter_name]))
    return loras


def _check_config(where: str, config: Mapping[str, Any]) -> None:
    """Raise unless the factors of an adapter with these settings are all there is to it."""
    for field in _NOT_PLAIN:
        if config.get(field):
            raise ValueError(f"{where}: wanted a plain LoRA, got {field}={config[field]!r:.60}")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{where}: wanted bias='none', got {config['bias']!r}")
    init = config.get("init_lora_weights")
    if init not in _PLAIN_INITS:
        raise ValueError(
            f"{where}: wanted LoRAs on the unchanged base, but init_lora_weights={init!r} changes "
            "it; convert them when saving (PEFT's path_initial_model_for_weight_conversion)"
        )


def check_layer(where: str, layer: nn.Module, adapter: str) -> None:
    """Raise unless `adapter` is a plain LoRA of a linear."""
    base, a, b = layer.get_base_layer(), layer.lora_A[adapter], layer.lora_B[adapter]
    linear = all(isinstance(getattr(base, n, None), int) for n in ("in_features", "out_features"))
    if not linear or a.weight.dim() != 2 or b.weight.dim() != 2:
        raise ValueError(f"{where}: wanted LoRAs of linears, got {type(layer).__name__}")
    if getattr(layer, "lora_variant", {}).get(adapter) or layer.use_dora.get(adapter):
        raise ValueError(f"{where}: wanted a plain LoRA, got a variant such as DoRA")
    if a.bias is not None or b.bias is not None:
        raise ValueError(f"{where}: wanted a LoRA without biases, got lora_bias=True")
    if layer.merged_adapters:
        raise ValueError(f"{where}: the adapter is merged into the base; unmerge it first")
