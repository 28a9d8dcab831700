"""LoRA for a whole model."""

import dataclasses
from typing import Any

from torch import nn

from ..depth import NumberedLayer
from ..nn import LoRALinear
from .base import AdapterConfig


@dataclasses.dataclass(frozen=True)
class LoRAConfig(AdapterConfig):
    """LoRA for a whole model (2106.09685).

    Args:
        rank, alpha, dropout, rslora: see :class:`moelora_ops.nn.LoRALinear`.
        target_modules, adapter_dtype: see :class:`AdapterConfig`.

    Raises:
        TypeError, ValueError: a field is out of range; the message names it.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rslora: bool = False

    def __post_init__(self):
        super().__post_init__()
        LoRALinear(nn.Linear(1, 1, device="meta"), **self.layer_arguments("", None))

    def layer_arguments(self, name: str, layer: NumberedLayer | None) -> dict[str, Any]:
        """Constructor arguments, beside the base, of every layer."""
        return {f: getattr(self, f) for f in ("rank", "alpha", "dropout", "rslora")}
