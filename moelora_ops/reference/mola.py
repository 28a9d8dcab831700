"""MoLA, literally: Gao et al., "MoE LoRA with Layer-wise Expert Allocation" (2402.08562), eqs. 3-4.

A loop over the experts in eager PyTorch, any dtype up to float64, on any device.  This is what the
kernels are judged against, so it shares nothing with them.
"""

import contextlib
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import LooksLikeBase
from .philox import keep_mask


class Routing(NamedTuple):
    """By-products of routing: what the balance loss and the statistics need.

    Attributes:
        counts: ``[E]`` int64, how many (token, slot) pairs chose each expert.
        prob_sums: ``[E]``, the full softmax summed over tokens; differentiable with respect to x
            and router.
    """

    counts: Tensor
    prob_sums: Tensor


def no_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Switches autocast off, on devices that have it (``"meta"`` has none)."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def mola(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_down: Tensor,
    lora_up: Tensor,
    router: Tensor,
    top_k: int,
    scale: float,
    renormalize: bool = True,
    *,
    dropout: float = 0.0,
    dropout_mode: str = "token",
    seed: Tensor | None = None,
    base_output: Tensor | None = None,
) -> tuple[Tensor, Routing]:
    """``y = x Wᵀ + b + scale Σ_{e in top-k} w_e B_e A_e dropout(x)``, ``w = softmax(x Rᵀ)``.

    Args:
        x: ``[..., K]``.
        weight, bias: the frozen linear, ``[N, K]`` and ``[N]`` or None; ignored if `base_output`
            is given.
        lora_down: ``[E, r, K]``; A of expert e is ``lora_down[e]``.
        lora_up: ``[E, r, N]``; B of expert e is ``lora_up[e].T``.
        router: ``[E, K]``.
        top_k: experts per token.
        scale: alpha / r.
        renormalize: divide the chosen probabilities by their sum (the paper) or not (our choice).
        dropout: probability of dropping an expert's input.  The router sees the undropped input.
        dropout_mode: ``"token"`` one mask for all experts of a token (our choice), ``"expert"`` a
            mask per (token, expert) pair (the authors' code).
        seed: int64, one element; required if dropout > 0.
        base_output: ``[..., N]``, the frozen layer's output if it is not a plain linear.

    Returns:
        y ``[..., N]`` and the :class:`Routing` of these tokens.
    """
    num_experts = router.shape[0]
    tokens = x.reshape(-1, x.shape[-1])
    # At least float32 in the router, also under autocast: rounded logits choose other experts.
    wide = torch.promote_types(x.dtype, torch.float32)
    with no_autocast(x.device.type):
        logits = tokens.to(wide) @ router.to(wide).T
    probs = logits.softmax(-1)
    # A stable sort gives ties to the lower index, which torch.topk leaves open.
    selected = logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    chosen = probs.gather(-1, selected)
    if renormalize:
        chosen = chosen / chosen.sum(-1, keepdim=True)

    if base_output is None:
        y = F.linear(tokens, weight, bias)
    else:
        y = base_output.reshape(-1, base_output.shape[-1])
    for e in range(num_experts):
        is_chosen = selected == e
        gate = (chosen * is_chosen).sum(-1, keepdim=True)
        inputs = tokens
        if dropout > 0:
            mask = keep_mask(seed, *tokens.shape, dropout, e if dropout_mode == "expert" else 0)
            inputs = tokens.where(mask, 0) / (1 - dropout)
        expert = (inputs @ lora_down[e].T) @ lora_up[e]
        contribution = (scale * gate * expert).to(y.dtype)
        y = y + contribution.masked_fill(~is_chosen.any(-1, keepdim=True), 0)

    counts = F.one_hot(selected, num_experts).sum((0, 1))
    return y.reshape(*x.shape[:-1], y.shape[-1]), Routing(counts, probs.sum(0))


class MoLALinear(LooksLikeBase, nn.Module):
    """What :class:`moelora_ops.nn.MoLALinear` is checked against: same arguments and state_dict."""

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
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k: wanted 1..num_experts={num_experts}, got {top_k}")
        weight = getattr(base, "weight", None)
        if isinstance(weight, Tensor):
            device = weight.device if device is None else device
            dtype = weight.dtype if dtype is None and weight.is_floating_point() else dtype
        like = {"device": device, "dtype": dtype}
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.num_experts, self.rank, self.alpha, self.top_k = num_experts, rank, alpha, top_k
        self.dropout, self.dropout_mode, self.renormalize = dropout, dropout_mode, renormalize
        self.lora_down = nn.Parameter(torch.empty(num_experts, rank, self.in_features, **like))
        self.lora_up = nn.Parameter(torch.empty(num_experts, rank, self.out_features, **like))
        self.router = nn.Parameter(torch.empty(num_experts, self.in_features, **like))
        self.routing: Routing | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Router and A Kaiming-uniform(a=√5), B zero (the authors' code; the paper: Gaussian)."""
        for e in range(self.num_experts):
            nn.init.kaiming_uniform_(self.lora_down[e], a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.router, a=math.sqrt(5))
        nn.init.zeros_(self.lora_up)

    def forward(self, x: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        seed = torch.randint(2**63 - 1, (1,), device=x.device) if dropout > 0 else None
        y, self.routing = mola(
            x, None, None, self.lora_down, self.lora_up, self.router, self.top_k,
            self.alpha / self.rank, self.renormalize, dropout=dropout,
            dropout_mode=self.dropout_mode, seed=seed, base_output=self.base(x),
        )  # fmt: skip
        return y

    def __getstate__(self):
        # The last call's by-products belong to its autograd graph: not to be copied or pickled.
        return {**self.__dict__, "routing": None}
