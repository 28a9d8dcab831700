"""MoLA for a whole model: how many experts at which depth."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..depth import NumberedLayer
from ..nn.mola import check_arguments
from .base import AdapterConfig


@dataclasses.dataclass(frozen=True)
class MoLAConfig(AdapterConfig):
    """MoLA for a whole model (2402.08562).

    Args:
        num_experts: one number for every layer; or a string of digits that divides the depth
            evenly, ``"2468"`` by quarters (layer i of L takes ``digits[i * len(digits) // L]``); or
            one number per layer.
        rank, alpha, top_k, dropout, dropout_mode, renormalize: see
            :class:`moelora_ops.nn.MoLALinear`.
        target_modules, adapter_dtype: see :class:`AdapterConfig`.

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

    def __post_init__(self):
        super().__post_init__()
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
                number, self.rank, self.alpha, self.top_k, self.dropout, self.dropout_mode,
                self.renormalize,
            )  # fmt: skip

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
