"""MoLE in the benchmark: cases, inputs, what competes, and the least arithmetic."""

import copy
import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import nn, reference
from .method import (
    DTYPES,
    LLAMA_7B,
    OURS,
    Case,
    Floors,
    Method,
    Variant,
    directions,
    generator,
)
from .numerics import FORWARD, TRAIN


@dataclass(frozen=True)
class MoLECase(Case):
    """One row of the table: a layer with a gate per token, and a number of tokens."""

    mix = "output_gate"

    name: str
    dtype: str
    tokens: int
    in_features: int
    out_features: int
    experts: int = 8
    rank: int = 16
    normalization: str = "l2"
    directions: tuple[str, ...] = (FORWARD, TRAIN)

    def __str__(self) -> str:
        return (
            f"T={self.tokens} K={self.in_features} N={self.out_features}"
            f" E={self.experts} r={self.rank} {self.normalization}"
        )


def _cases() -> tuple[MoLECase, ...]:
    sizes = (("", {}), ("-e3", {"experts": 3, "rank": 8}))
    return tuple(
        MoLECase(
            f"t{T}{suffix}", dtype, T, 2048, 2048, **rest,
            directions=(FORWARD, TRAIN) if T >= 64 else (FORWARD,),
        )
        for (suffix, rest), T, dtype in itertools.product(
            sizes, (1024, 512, 64, 8, 1), ("bf16", "fp32")
        )
    )  # fmt: skip


def _gpu_cases() -> tuple[MoLECase, ...]:
    def case(tokens: int, **size) -> MoLECase:
        name = f"qkvo{'-e128' if size else ''}-t{tokens}"
        return MoLECase(
            name, "bf16", tokens, *LLAMA_7B["qkvo"], directions=directions(tokens), **size
        )

    return (
        *(case(tokens) for tokens in (8192, 2048, 512, 32, 1)),
        # More would not fit: the reference has [T, E, N] in float64.
        *(case(tokens, experts=128, rank=8) for tokens in (1024, 32, 1)),
    )


class _PlainMoLELinear(nn.MoLELinear):
    """What the plain PyTorch layers share: one normalisation, no masks, no by-products."""

    @classmethod
    def of(cls, layer: nn.MoLELinear) -> "_PlainMoLELinear":
        """The plain layer with `layer`'s experts and parameters."""
        if (layer.normalization, layer.granularity) != ("l2", "token"):
            raise ValueError("the baselines have l2 gates per token only")
        return cls.from_reference(layer)


class StackedMoLELinear(_PlainMoLELinear):
    """The rank-space gate in plain PyTorch: all experts in one product down and one up in place.

    Factors are kept, and without gradients P too, as in our layer.  The base must not keep its
    output for its backward (``nn.Linear`` does not): the experts are added in place.
    """

    @classmethod
    def of(cls, layer: nn.MoLELinear) -> "StackedMoLELinear":
        """The plain layer with `layer`'s experts and parameters, its factors computed."""
        plain = super().of(layer)
        wide = torch.promote_types(layer.lora_up.dtype, torch.float32)
        scales = torch.tensor(layer.scales, dtype=wide)
        up = layer.lora_up.to(wide) * scales[:, None, None]
        plain.register_buffer("scaled_up", up)
        plain.register_buffer("factors", torch.linalg.qr(up.mT, mode="r").R.mT.contiguous())
        plain.register_buffer("kept", torch.bmm(up, layer.gate.detach().to(wide)).flatten(0, 1))
        plain.register_buffer("per_row", scales.repeat_interleave(layer.rank))
        return plain

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., in_features]`` to y ``[..., out_features]``."""
        tokens = x.reshape(-1, self.in_features)
        wide = self.factors.dtype
        hidden = F.linear(tokens, self.lora_down.flatten(0, 1)).to(wide)
        if torch.is_grad_enabled():
            projection = torch.bmm(self.scaled_up, self.gate.to(wide)).flatten(0, 1)
        else:
            projection = self.kept
        per_expert = hidden.view(-1, self.num_experts, self.rank)
        images = torch.bmm(per_expert.transpose(0, 1), self.factors)
        norm = torch.linalg.vector_norm(images, dim=(0, 2)).clamp_min(1e-12)
        logits = (hidden @ projection) / (norm.unsqueeze(-1) * self.log_tau.to(wide).exp())
        gates = logits.softmax(-1).repeat_interleave(self.rank, -1)
        mixed = (hidden * gates * self.per_row).to(x.dtype)
        y = self.base(tokens).addmm_(mixed, self.lora_up.flatten(0, 1))
        return y.view(*x.shape[:-1], self.out_features)


class EagerMoLELinear(_PlainMoLELinear):
    """As the paper writes it: every expert's output is materialised, ``[T, E, N]``."""

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., in_features]`` to y ``[..., out_features]``."""
        tokens = x.reshape(-1, self.in_features)
        experts = zip(self.lora_down, self.lora_up, self.scales, strict=True)
        outputs = [F.linear(F.linear(tokens, down), up.t()) * s for down, up, s in experts]
        outputs = torch.stack(outputs, 1)
        wide = torch.promote_types(x.dtype, torch.float32)
        features = F.normalize(outputs.to(wide).flatten(1), dim=-1)
        tau = self.log_tau.to(wide).exp()
        gates = (features @ self.gate.to(wide).flatten(0, 1) / tau).softmax(-1)
        mixture = torch.bmm(gates.to(x.dtype).unsqueeze(1), outputs).squeeze(1)
        y = self.base(tokens) + mixture
        return y.view(*x.shape[:-1], self.out_features)


def make_inputs(case: MoLECase, seed: int = 0) -> tuple[nn.MoLELinear, Tensor, Tensor]:
    """The fused layer, x ``[T, K]`` and dy ``[T, N]``, in the case's dtype.

    Base and experts contribute alike to y, so that an error of either shows, and the gate is
    neither even nor collapsed.
    """
    dtype = DTYPES[case.dtype]
    random = generator(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    base = torch.nn.Linear(case.in_features, case.out_features, dtype=dtype)
    loras = [
        (
            normal(case.rank, case.in_features) / case.in_features**0.5,
            normal(case.out_features, case.rank) / case.rank**0.5,
            1 + 0.5 * (i % 2),
        )
        for i in range(case.experts)
    ]
    layer = nn.MoLELinear(base, loras, normalization=case.normalization)
    with torch.no_grad():
        base.weight.copy_(normal(*base.weight.shape) / case.in_features**0.5)
        base.bias.copy_(normal(case.out_features))
        layer.gate.copy_(normal(*layer.gate.shape) * 2)
        layer.log_tau.fill_(-0.25)
    x, dy = normal(case.tokens, case.in_features), normal(case.tokens, case.out_features)
    # Along what the temperature changes: its gradient, one number, would otherwise be a sum that
    # cancels, and its error a matter of chance.
    with torch.no_grad():
        y = layer(x)
        layer.log_tau.fill_(0.0)
        change = layer(x) - y
        layer.log_tau.fill_(-0.25)
        dy += change / change.square().mean().sqrt().clamp_min(1e-6)
    return layer, x, dy


def reference_layer(layer: nn.MoLELinear, dtype: torch.dtype) -> reference.MoLELinear:
    """The literal layer with copies of `layer`'s experts and parameters in `dtype`."""
    literal = reference.MoLELinear(
        copy.deepcopy(layer.base).to(dtype),
        nn.unstack_loras(layer.lora_down, layer.lora_up, layer.scales), layer.granularity,
        layer.normalization, mask_mode=layer.mask_mode,
    )  # fmt: skip
    literal.load_state_dict(layer.state_dict())
    return literal


def floors(case: MoLECase, direction: str) -> Floors:
    """Multiply-adds of the experts over those of the frozen linear.

    Nothing is sparse, and frozen experts have no gradient: backward is one product on either side.
    The gate is row-local but for P = s Bᵀ e, which is computed once a step, and its gradient.
    """
    K, N, R = case.in_features, case.out_features, case.experts * case.rank
    share = R * (K + N) / (K * N)
    if direction == TRAIN:
        share += 2 * N * R * case.experts / (2 * case.tokens * K * N)
    return Floors(dense=share, sparse=share)


def memory_target(case: MoLECase) -> int:
    """Twice what hidden and gates take in float32."""
    return 8 * case.tokens * (case.experts * case.rank + case.experts)


MOLE = Method(
    name="mole",
    title="MoLE: frozen LoRAs on a frozen linear, gated on their outputs",
    case_type=MoLECase,
    cases=_cases(),
    gpu_cases=_gpu_cases(),
    make_inputs=make_inputs,
    reference=reference_layer,
    floors=floors,
    memory_target=memory_target,
    plain="stacked",
    variants=(
        Variant("stacked", lambda case, layer: StackedMoLELinear.of(layer)),
        Variant("stacked-compiled", lambda case, layer: StackedMoLELinear.of(layer), compiled=True),
        Variant("eager", lambda case, layer: EagerMoLELinear.of(layer)),
        *OURS,
    ),
)
