"""LoRA, literally: Hu et al., "LoRA: Low-Rank Adaptation" (2106.09685), as PEFT computes it."""

import math

import torch
from torch import Tensor, nn

from .base import LooksLikeBase
from .philox import keep_mask


class LoRALinear(LooksLikeBase, nn.Module):
    """What :class:`moelora_ops.nn.LoRALinear` is checked against: same arguments and state_dict."""

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
        super().__init__()
        weight = getattr(base, "weight", None)
        if isinstance(weight, Tensor):
            device = weight.device if device is None else device
            dtype = weight.dtype if dtype is None and weight.is_floating_point() else dtype
        like = {"device": device, "dtype": dtype}
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        inputs = x.to(self.lora_A.dtype)
        if self.training and self.dropout > 0:
            seed = torch.randint(2**63 - 1, (1,), device=x.device)
            tokens = inputs.reshape(-1, self.in_features)
            mask = keep_mask(seed, *tokens.shape, self.dropout).reshape(x.shape)
            inputs = inputs.where(mask, 0) / (1 - self.dropout)
        scale = self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
        y = self.base(x)
        return y + (scale * (inputs @ self.lora_A.T) @ self.lora_B.T).to(y.dtype)
