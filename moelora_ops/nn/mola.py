"""MoLA: top-k routed LoRA experts on a frozen linear (2402.08562)."""

import math

import torch
from torch import Tensor, nn

from .. import functional, reference
from .base import AdapterLinear, init_stack
from .checks import check_bool, check_count


class MoLALinear(AdapterLinear):
    """``y = base(x) + alpha/rank Σ_{e in top-k} w_e B_e A_e dropout(x)`` (eqs. 3-4), fused.

    Args:
        base: the frozen layer, see :class:`AdapterLinear`.
        num_experts: E >= 1.
        rank: r >= 1 of each expert.
        alpha: the experts are scaled by alpha / rank.
        top_k: experts per token, 1..E.
        dropout: probability of dropping an expert's input while training, in [0, 1).
        renormalize: see :func:`moelora_ops.functional.mola`.
        dropout_mode: ``"token"`` or ``"expert"``, see :func:`moelora_ops.functional.mola`.
        device, dtype: of the new parameters; by default those of the base.

    Parameters:
        lora_down: ``[E, rank, in_features]``, Kaiming-uniform(a=√5) per expert.
        lora_up: ``[E, rank, out_features]``, zero, so that y = base(x) at first.
        router: ``[E, in_features]``, Kaiming-uniform(a=√5), no bias.

    The initialisation is that of the authors' code; the paper says Gaussian.  The state_dict is
    that of :class:`moelora_ops.reference.MoLALinear`.  Dropout masks are drawn from torch's
    generator of x's device, so ``torch.manual_seed`` repeats them and gradient checkpointing
    recomputes them.

    Shapes: x ``[..., in_features]`` to y ``[..., out_features]``.

    Raises:
        TypeError, ValueError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        base: nn.Module,
        num_experts: int,
        rank: int = 8,
        alpha: float = 16.0,
        top_k: int = 2,
        dropout: float = 0.0,
        renormalize: bool = True,
        *,
        dropout_mode: str = "token",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_arguments(num_experts, rank, alpha, top_k, dropout, dropout_mode, renormalize)
        super().__init__(base, device, dtype)
        self.num_experts, self.rank, self.alpha, self.top_k = num_experts, rank, alpha, top_k
        self.dropout, self.dropout_mode, self.renormalize = dropout, dropout_mode, renormalize
        self.lora_down = self._new_parameter(num_experts, rank, self.in_features)
        self.lora_up = self._new_parameter(num_experts, rank, self.out_features)
        self.router = self._new_parameter(num_experts, self.in_features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the experts and the router anew; the layer is then equal to its base."""
        init_stack(self.lora_down, self.in_features)
        nn.init.kaiming_uniform_(self.router, a=math.sqrt(5))
        nn.init.zeros_(self.lora_up)

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., in_features]`` to y ``[..., out_features]``."""
        dropout = self.dropout if self.training else 0.0
        seed = torch.randint(2**63 - 1, (1,), device=x.device) if dropout > 0 else None
        y, routing = functional.mola(
            x, lora_down=self.lora_down, lora_up=self.lora_up, router=self.router, top_k=self.top_k,
            scale=self.alpha / self.rank, renormalize=self.renormalize, dropout=dropout,
            dropout_mode=self.dropout_mode, seed=seed, return_routing=True,
            **self.base_arguments(x),
        )  # fmt: skip
        return self._record(y, routing)

    @classmethod
    def from_reference(cls, layer: reference.MoLALinear) -> "MoLALinear":
        """The fused layer that shares `layer`'s base and parameters."""
        fused = cls(
            layer.base, layer.num_experts, layer.rank, layer.alpha, layer.top_k, layer.dropout,
            layer.renormalize, dropout_mode=layer.dropout_mode, device="meta",
        )  # fmt: skip
        for name in ("lora_down", "lora_up", "router"):
            setattr(fused, name, getattr(layer, name))
        return fused.train(layer.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"num_experts={self.num_experts}, rank={self.rank}, alpha={self.alpha}, "
            f"top_k={self.top_k}, dropout={self.dropout} per {self.dropout_mode}, "
            f"renormalize={self.renormalize}"
        )


def check_arguments(num_experts, rank, alpha, top_k, dropout, dropout_mode, renormalize) -> None:
    """The constructor's contract; a whole model's configuration is checked by it as well."""
    check_count("num_experts", num_experts)
    check_count("rank", rank)
    functional.check_finite("alpha", alpha)
    functional.check_top_k(top_k, num_experts)
    functional.check_dropout(dropout, dropout_mode)
    check_bool("renormalize", renormalize)
