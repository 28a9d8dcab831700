"""PEMT, literally: Lin et al., "Multi-Task Correlation Guided Mixture-of-Experts Enables
Parameter-Efficient Transfer Learning" (2402.15082), for the second linear of a T5 feed-forward.

Source: the authors' code; of the paper itself only the abstract and the architecture figure were
read.  Each expert's output is materialised, as there, and the loss compares these outputs.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import LooksLikeBase
from .gated import ACTIVATIONS
from .mola import no_autocast


class Expert(NamedTuple):
    """One source expert: a LoRA, or a bottleneck adapter if it has biases.

    Attributes:
        down: A, ``[r, in_features]``.
        up: B, ``[out_features, r]``.
        scale: s.
        down_bias, up_bias: ``[r]`` and ``[out_features]``; both or neither.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0
    down_bias: Tensor | None = None
    up_bias: Tensor | None = None


class Agreement(NamedTuple):
    """By-products of a forward call: what the task sparsity loss needs.

    Attributes:
        weights: g ``[batch, E]``.
        cosines: ``cos(f, o_e)`` at every position, ``[..., E]``.
    """

    weights: Tensor
    cosines: Tensor


def prompt_query(states: Tensor, prompt_length: int) -> Tensor:
    """q: the mean of the first `prompt_length` positions.

    Args:
        states: ``[batch, length, features]``: the FFN's inner activation u in an encoder, the final
            encoder output for a decoder.
        prompt_length: P.

    Returns:
        ``[batch, features]``, at least float32.
    """
    wide = torch.promote_types(states.dtype, torch.float32)
    return states[:, :prompt_length].to(wide).mean(1)


def prompt_gate(query: Tensor, gate: Tensor) -> Tensor:
    """``g = softmax(q W_g)``, ``[batch, E]``, at least float32.

    Args:
        query: q ``[batch, features]``.
        gate: ``W_gᵀ``, ``[E, features]``.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    with no_autocast(query.device.type):
        return (query.to(wide) @ gate.to(wide).T).softmax(-1)


def combine_prompts(target: Tensor, sources: Sequence[Tensor], dropout: float = 0.0) -> Tensor:
    """``Π = Π_t + Σ_e dropout(softmax(Π_t Π_eᵀ)) Π_e``: no 1/√d, positions of the source attended.

    Args:
        target: Π_t ``[P, d]``.
        sources: Π_e ``[P_e, d]`` each.
        dropout: of the attention weights.
    """
    prompt = target
    for source in sources:
        prompt = prompt + F.dropout((target @ source.T).softmax(-1), dropout) @ source
    return prompt


def task_sparsity(agreement: Agreement, mask: Tensor | None = None) -> Tensor:
    """``Σ_e ḡ_e (1 − mean cos(f, o_e))`` of one layer, ḡ the mean over the batch.

    Args:
        agreement: of a forward call.
        mask: bool, the cosines' leading dimensions; False for positions to leave out.  The
            authors' code averages over every position, padding included; the mask is our choice.
    """
    cosines = agreement.cosines.flatten(0, -2)
    if mask is not None:
        cosines = cosines[mask.flatten()]
    return (agreement.weights.mean(0) * (1 - cosines.mean(0))).sum()


class PEMTAdapter(nn.Module):
    """``f = z + U gelu_new(D z + b_D) + b_U``; gelu_new is gelu's tanh form."""

    def __init__(self, features: int, bottleneck: int, *, device=None, dtype=None):
        super().__init__()
        like = {"device": device, "dtype": dtype}
        self.features, self.bottleneck = features, bottleneck
        self.down = nn.Parameter(torch.empty(1, bottleneck, features, **like))
        self.up = nn.Parameter(torch.empty(1, bottleneck, features, **like))
        self.down_bias = nn.Parameter(torch.empty(1, bottleneck, **like))
        self.up_bias = nn.Parameter(torch.empty(1, features, **like))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights N(0, 0.01²), biases 0: nearly the identity."""
        for weight in (self.down, self.up):
            nn.init.normal_(weight, std=0.01)
        for bias in (self.down_bias, self.up_bias):
            nn.init.zeros_(bias)

    def forward(self, z: Tensor) -> Tensor:
        hidden = F.gelu(F.linear(z, self.down[0], self.down_bias[0]), approximate="tanh")
        return z + F.linear(hidden, self.up[0].T, self.up_bias[0])


class PEMTSourceLinear(LooksLikeBase, nn.Module):
    """What :class:`moelora_ops.nn.PEMTSourceLinear` is checked against: same state_dict."""

    def __init__(
        self,
        base: nn.Module,
        rank: int = 64,
        alpha: float = 64.0,
        *,
        kind: str = "lora",
        init: str = "kaiming",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.rank, self.alpha, self.kind, self.init = rank, alpha, kind, init
        like = _like(base, device, dtype)
        self.lora_down = nn.Parameter(torch.empty(1, rank, self.in_features, **like))
        self.lora_up = nn.Parameter(torch.empty(1, rank, self.out_features, **like))
        biased = kind == "adapter"
        self.down_bias = nn.Parameter(torch.empty(1, rank, **like)) if biased else None
        self.up_bias = nn.Parameter(torch.empty(1, self.out_features, **like)) if biased else None
        self.residual: Tensor | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.kind == "adapter":
            nn.init.normal_(self.lora_down, std=0.01)
            nn.init.normal_(self.lora_up, std=0.01)
            nn.init.zeros_(self.down_bias)
            nn.init.zeros_(self.up_bias)
            return
        nn.init.kaiming_uniform_(self.lora_down[0], a=math.sqrt(5))
        if self.init == "kaiming":
            nn.init.kaiming_uniform_(self.lora_up[0].T, a=math.sqrt(5))
        else:
            nn.init.zeros_(self.lora_up)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        residual = self.residual if residual is None else residual
        self.residual = None
        hidden = x @ self.lora_down[0].T
        if self.kind == "lora":
            return self.base(x) + self.alpha / self.rank * (hidden @ self.lora_up[0])
        hidden = F.gelu(hidden + self.down_bias[0], approximate="tanh")
        expert = hidden @ self.lora_up[0] + self.up_bias[0] + residual
        return self.base(x) + expert

    def __getstate__(self):
        return {**self.__dict__, "residual": None}


class PEMTLinear(LooksLikeBase, nn.Module):
    """What :class:`moelora_ops.nn.PEMTLinear` is checked against: same arguments and state_dict."""

    def __init__(
        self,
        base: nn.Module,
        loras: Sequence[Expert | tuple],
        *,
        activation: str | None = None,
        gate_query: str | None = None,
        gate_features: int | None = None,
        prompt_length: int | None = None,
        bottleneck: int | None = None,
        residual: bool = False,
        sparsity: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = base.in_features, base.out_features
        like = _like(base, device, dtype)
        experts = [Expert(*lora) for lora in loras]
        self.num_experts = len(experts)
        self.ranks = [expert.down.shape[0] for expert in experts]
        self.scales = [float(expert.scale) for expert in experts]
        self.rank = max(self.ranks)
        self.biases = experts[0].down_bias is not None
        self.activation, self.residual, self.sparsity = activation, residual, sparsity
        self.gate_query, self.prompt_length = gate_query, prompt_length
        self.gate_features = self.in_features if gate_query == "input" else gate_features
        self.bottleneck = bottleneck
        # A lower rank is padded with zeros, which add nothing: φ(0) = 0.
        down = torch.zeros(self.num_experts, self.rank, self.in_features, **like)
        up = torch.zeros(self.num_experts, self.rank, self.out_features, **like)
        down_bias = torch.zeros(self.num_experts, self.rank, **like)
        up_bias = torch.zeros(self.num_experts, self.out_features, **like)
        for e, (expert, rank) in enumerate(zip(experts, self.ranks, strict=True)):
            down[e, :rank], up[e, :rank] = expert.down.detach(), expert.up.detach().T
            if self.biases:
                down_bias[e, :rank] = expert.down_bias.detach()
                up_bias[e] = expert.up_bias.detach()
        self.lora_down = nn.Parameter(down, requires_grad=False)
        self.lora_up = nn.Parameter(up, requires_grad=False)
        self.down_bias = nn.Parameter(down_bias, requires_grad=False) if self.biases else None
        self.up_bias = nn.Parameter(up_bias, requires_grad=False) if self.biases else None
        if gate_query is None:
            self.gate = None
        else:
            self.gate = nn.Parameter(torch.zeros(self.num_experts, self.gate_features, **like))
        adapted = bottleneck is not None
        self.adapter = PEMTAdapter(self.out_features, bottleneck, **like) if adapted else None
        self.encoder_states: Tensor | None = None
        self.ffn_input: Tensor | None = None
        self.agreement: Agreement | None = None

    def forward(
        self,
        x: Tensor,
        weights: Tensor | None = None,
        *,
        encoder_states: Tensor | None = None,
        ffn_input: Tensor | None = None,
    ) -> Tensor:
        encoder_states = self.encoder_states if encoder_states is None else encoder_states
        ffn_input = self.ffn_input if ffn_input is None else ffn_input
        self.encoder_states = self.ffn_input = None
        if weights is None:
            states = x if self.gate_query == "input" else encoder_states
            weights = prompt_gate(prompt_query(states, self.prompt_length), self.gate)
        z, outputs = self.base(x), []
        for e in range(self.num_experts):
            hidden = x @ self.lora_down[e].T
            if self.biases:
                hidden = hidden + self.down_bias[e]
            output = ACTIVATIONS[self.activation](hidden) @ self.lora_up[e]
            if self.biases:
                output = output + self.up_bias[e]
            outputs.append(self.scales[e] * output)
        for e, output in enumerate(outputs):
            mixed = output + ffn_input if self.residual else output
            gate = weights[:, e].reshape(-1, *[1] * (x.dim() - 1))
            z = z + (gate * mixed).to(z.dtype)
        f = z if self.adapter is None else self.adapter(z)
        cosines = None
        if self.training and self.sparsity:
            wide = torch.promote_types(f.dtype, torch.float32)
            cosines = torch.stack(
                [F.cosine_similarity(f.to(wide), output.to(wide), dim=-1) for output in outputs], -1
            )
        self.agreement = Agreement(weights, cosines)
        return f

    def __getstate__(self):
        # What belongs to the last call's autograd graph is not to be copied or pickled.
        return {**self.__dict__, "encoder_states": None, "ffn_input": None, "agreement": None}


def _like(base: nn.Module, device, dtype) -> dict:
    """Device and dtype of new parameters: those of the base's weight unless given."""
    weight = getattr(base, "weight", None)
    if isinstance(weight, Tensor):
        device = weight.device if device is None else device
        dtype = weight.dtype if dtype is None and weight.is_floating_point() else dtype
    return {"device": device, "dtype": dtype}
