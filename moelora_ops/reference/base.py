"""A wrapped linear looks like its base to models that read ``layer.weight`` and ``layer.bias``."""

import torch
import torch.nn.functional as F
from torch import Tensor


class BaseWeight(Tensor):
    """The weight of a wrapped linear, to be looked at: a product with it would skip the experts.

    ``F.linear`` and ``F.multi_head_attention_forward`` refuse it; everything else takes it for a
    plain tensor.  As it has ``__torch_function__``, torch's transformer layers leave their fused
    inference path, which would read it, and call the layer.
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (F.linear, F.multi_head_attention_forward):
            raise TypeError(
                f"weight: {func.__name__} on the weight of an adapted layer would skip its "
                "experts; call the layer, do not adapt it, or use layer.base.weight"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class LooksLikeBase:
    """Mixin for modules with a ``base``: its ``weight`` and ``bias``, if it has them."""

    @property
    def weight(self) -> Tensor:
        weight = self.base.weight
        # Quantised and sharded weights are subclasses, which carry more than their elements.
        plain = type(weight) in (Tensor, torch.nn.Parameter)
        return weight.as_subclass(BaseWeight) if plain else weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias
