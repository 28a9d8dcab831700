"""LoRA: one expert of weight 1 (2106.09685)."""

import math

import torch
from torch import Tensor, nn

from .. import functional, reference
from .base import AdapterLinear
from .checks import check_bool, check_count


class LoRALinear(AdapterLinear):
    """``y = base(x) + scale · B A dropout(x)``, fused: exactly PEFT's LoRA.

    Args:
        base: the frozen layer, see :class:`AdapterLinear`.
        rank: r >= 1.
        alpha: the expert is scaled by alpha / rank.
        dropout: probability of dropping an input while training, in [0, 1).
        rslora: scale by alpha / √rank instead (rank-stabilised LoRA, 2312.03732).
        device, dtype: of the new parameters; by default those of the base.

    Parameters, in PEFT's layout, so that a PEFT layer's can be shared:
        lora_A: ``[rank, in_features]``, Kaiming-uniform(a=√5).
        lora_B: ``[out_features, rank]``, zero, so that y = base(x) at first.

    They may be wider than x, as PEFT keeps them in float32 for a model in 16 bits: they are then
    rounded to x's dtype for the computation, and their gradients are wide.  Dropout masks are drawn
    from torch's generator of x's device, as in :class:`MoLALinear`.

    Shapes: x ``[..., in_features]`` to y ``[..., out_features]``.

    Raises:
        TypeError, ValueError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        *,
        rslora: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_count("rank", rank)
        functional.check_finite("alpha", alpha)
        functional.check_dropout(dropout, "token")
        check_bool("rslora", rslora)
        super().__init__(base, device, dtype)
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        self.lora_A = self._new_parameter(rank, self.in_features)
        self.lora_B = self._new_parameter(self.out_features, rank)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the expert anew; the layer is then equal to its base."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @property
    def scale(self) -> float:
        """alpha / rank, or alpha / √rank."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., in_features]`` to y ``[..., out_features]``."""
        dropout = self.dropout if self.training else 0.0
        seed = torch.randint(2**63 - 1, (1,), device=x.device) if dropout > 0 else None
        return functional.gated(
            x, lora_down=self.lora_A.to(x.dtype).unsqueeze(0),
            lora_up=self.lora_B.to(x.dtype).t().unsqueeze(0),
            weights=x.new_ones(*x.shape[:-1], 1), scale=self.scale, dropout=dropout, seed=seed,
            **self.base_arguments(x),
        )  # fmt: skip

    @classmethod
    def from_reference(cls, layer: reference.LoRALinear) -> "LoRALinear":
        """The fused layer that shares `layer`'s base and parameters."""
        settings = {"dropout": layer.dropout, "rslora": layer.rslora}
        return cls.sharing(layer.base, layer.lora_A, layer.lora_B, layer.alpha, **settings).train(
            layer.training
        )

    @classmethod
    def sharing(
        cls,
        base: nn.Module,
        lora_A: nn.Parameter,
        lora_B: nn.Parameter,
        alpha: float,
        *,
        dropout: float = 0.0,
        rslora: bool = False,
    ) -> "LoRALinear":
        """The layer around these very parameters, ``[r, in]`` and ``[out, r]``."""
        layer = cls(base, lora_A.shape[0], alpha, dropout, rslora=rslora, device="meta")
        for name, parameter in (("lora_A", lora_A), ("lora_B", lora_B)):
            wanted = getattr(layer, name).shape
            if parameter.shape != wanted:
                raise ValueError(f"{name}: wanted {list(wanted)}, got {list(parameter.shape)}")
            setattr(layer, name, parameter)
        return layer

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}, rslora={self.rslora}"
        )
