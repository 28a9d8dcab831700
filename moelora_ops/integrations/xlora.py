"""PEFT's X-LoRA (2402.07148): its LoRA layers run by the fused kernels, all else of it as it is.

X-LoRA is LoRA layers with several adapters whose ``forward`` PEFT has replaced; hooks of the model
hand each call the scalings that a classifier made of a first, unadapted pass, per token and
adapter.  Fusing replaces that ``forward`` once more, so that PEFT goes on saving, generating,
disabling and logging.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .. import functional
from ..nn import AdapterLinear
from .peft import check_layer, is_lora


def is_xlora(module: nn.Module) -> bool:
    """Whether `module` is a layer with LoRAs that X-LoRA runs, PEFT's or ours."""
    runner = _runner(module)
    # By its parts: where no such layer is, peft need not be installed.
    theirs = hasattr(runner, "get_maybe_topk_scalings")
    return is_lora(module) and (theirs or isinstance(runner, FusedXLora))


def fused_xlora(layer: nn.Module) -> nn.Module:
    """PEFT's LoRA layer once more, around the same parameters, run by :class:`FusedXLora`.

    Dropout, while training, has one mask per token and feature; PEFT draws one per expert too.

    Raises:
        ValueError: `layer` (:func:`is_xlora`) does something that the fused layer would not do.
    """
    plain = _runner(layer)
    if isinstance(plain, FusedXLora):
        raise ValueError("model: its X-LoRA layers are fused already")
    if not len(layer.lora_A):  # an embedding keeps its factors elsewhere
        raise ValueError(f"model: wanted X-LoRA on linears, got {type(layer).__name__}")
    active = layer.active_adapters
    names = [name for name in active if name in layer.lora_A]
    if not names:
        raise ValueError(
            f"model: an X-LoRA layer has adapters {list(layer.lora_A)}, but those that are active "
            f"are {active}; name them so in XLoraConfig.adapters"
        )
    for name in names:
        check_layer("model", layer, name)
    dropouts = {getattr(layer.lora_dropout[name], "p", 0.0) for name in names}
    if len(dropouts) > 1:
        raise ValueError(f"model: wanted X-LoRA adapters of one dropout, got {sorted(dropouts)}")
    fused, plain = copy.copy(layer), copy.copy(plain)
    plain.target = fused
    fused.forward = FusedXLora(plain, names, dropouts.pop()).forward
    return fused


class FusedXLora:
    """Runs a LoRA layer in the place of PEFT's ``XLoraLinearLayer``, which it keeps.

    Top-k and softmax of the scalings are PEFT's code, so that its options hold, also those changed
    later.  What asks for other than the experts that it was made for (X-LoRA disabled, adapters
    merged, others activated) is left to PEFT's layer.

    Args:
        plain: PEFT's; its ``target`` is the layer.
        names: of the layer's active adapters, at least one.
        dropout: of each of them.
    """

    def __init__(self, plain: Any, names: list[str], dropout: float):
        self.plain, self.names, self.dropout = plain, names, dropout
        self.active = list(plain.target.active_adapters)
        self.base = AdapterLinear(plain.target.base_layer)

    def forward(self, x: Tensor, *args: Any, scalings: Tensor | None = None, **kwargs: Any):
        """x ``[batch, length, K]`` to y ``[batch, length, N]`` in x's dtype.

        Args:
            scalings: ``[batch, length, layers, active adapters]``; None: every expert counts once.
            args, kwargs: for the base, which the fused kernels do not call.
        """
        plain, layer = self.plain, self.plain.target
        changed = plain.model.disabled or layer.merged or layer.active_adapters != self.active
        if args or kwargs or changed:
            return plain.forward(x, *args, scalings=scalings, **kwargs)
        scales = [layer.scaling[name] for name in self.names]
        if scalings is None:
            weights = x.new_ones(*x.shape[:-1], len(self.names))
        else:
            weights = plain.get_maybe_topk_scalings(scalings)
            if len(self.names) < len(self.active):
                columns = [self.active.index(name) for name in self.names]
                weights = torch.stack([weights[..., column] for column in columns], -1)
            scales = [plain.config.global_scaling_weight * scale for scale in scales]
        dropout = self.dropout if layer.training else 0.0
        y = functional.gated(
            x, lora_down=_stack(x, [layer.lora_A[name].weight for name in self.names]),
            lora_up=_stack(x, [layer.lora_B[name].weight.t() for name in self.names]),
            weights=weights, scale=scales if len(set(scales)) > 1 else scales[0], dropout=dropout,
            seed=torch.randint(2**63 - 1, (1,), device=x.device) if dropout > 0 else None,
            **self.base.base_arguments(x),
        )  # fmt: skip
        return y.to(x.dtype)


def _runner(layer: nn.Module) -> Any:
    """The object whose method X-LoRA has made the layer's ``forward``, if it has."""
    return getattr(vars(layer).get("forward"), "__self__", None)


def _stack(x: Tensor, factors: list[Tensor]) -> Tensor:
    """``[E, r, width]`` of factors ``[r, width]``, in x's dtype, r the largest rank.

    PEFT keeps them apart, so they are copied together at each call; rows of zeros make up for less.
    """
    return pad_sequence([factor.to(x.dtype) for factor in factors], batch_first=True)
