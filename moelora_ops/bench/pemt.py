"""PEMT in the benchmark: gate, frozen sources, serial adapter and, in training, its loss."""

import copy
import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import reference
from ..nn import PEMTLinear
from .method import (
    DTYPES,
    LLAMA_7B,
    OURS,
    Floors,
    Method,
    SequenceCase,
    Variant,
    directions,
    generator,
)
from .numerics import FORWARD, TRAIN

PROMPT = 20


@dataclass(frozen=True)
class PEMTCase(SequenceCase):
    """One row of the table: W_o of a T5 encoder's feed-forward, sequences of up to 128 tokens."""

    mix = "gated"

    name: str
    dtype: str
    tokens: int
    in_features: int = 3072
    out_features: int = 768
    experts: int = 6
    rank: int = 64
    bottleneck: int = 48
    directions: tuple[str, ...] = (FORWARD, TRAIN)

    def __str__(self) -> str:
        return (
            f"T={self.tokens} K={self.in_features} N={self.out_features} E={self.experts}"
            f" r={self.rank}, adapter {self.bottleneck}"
        )


def _cases() -> tuple[PEMTCase, ...]:
    # One token's gradients are a few errors repeated over K or N: no measure of an implementation.
    t5 = tuple(
        PEMTCase(
            f"t{tokens}", dtype, tokens,
            directions=(FORWARD, TRAIN) if tokens >= 64 else (FORWARD,),
        )
        for tokens, dtype in itertools.product((4096, 1024, 512, 64, 8, 1), ("bf16", "fp32"))
    )  # fmt: skip
    # As the other methods' main case is.
    return t5 + tuple(PEMTCase("square", dtype, 1024, 2048, 2048) for dtype in ("bf16", "fp32"))


def _gpu_cases() -> tuple[PEMTCase, ...]:
    t5 = (PEMTCase.in_features, PEMTCase.out_features)
    return tuple(
        PEMTCase(f"{name}-t{tokens}", "bf16", tokens, *size, directions=directions(tokens))
        for tokens in (8192, 2048, 512, 32, 1)
        for name, size in (("qkvo", LLAMA_7B["qkvo"]), ("t5", t5))
    )


class _WithLoss(torch.autograd.Function):
    """f, whose backward also goes into the loss: a training step that the runner can make."""

    @staticmethod
    def forward(ctx, f: Tensor, loss: Tensor, coefficient: float) -> Tensor:
        ctx.dloss = loss.new_tensor(coefficient)
        return f.view_as(f)

    @staticmethod
    def backward(ctx, df: Tensor):
        return df, ctx.dloss, None


class Step(nn.Module):
    """A layer called with x alone, the task sparsity loss included where gradients are taken."""

    def __init__(self, layer: nn.Module, coefficient: float):
        super().__init__()
        self.layer, self.coefficient = layer, coefficient

    @property
    def base(self) -> nn.Module:
        return self.layer.base

    def forward(self, x: Tensor) -> Tensor:
        """x ``[batch, length, K]`` to f ``[batch, length, N]``."""
        self.layer.sparsity = torch.is_grad_enabled()
        f = self.layer(x)
        if not self.layer.sparsity:
            return f
        return _WithLoss.apply(f, reference.task_sparsity(self.layer.agreement), self.coefficient)


class _PlainPEMTLinear(PEMTLinear):
    """What the plain PyTorch layers share; they have no biases and a gate on x."""

    def forward(self, x: Tensor) -> Tensor:
        """x ``[batch, length, K]`` to f ``[batch, length, N]``."""
        query = reference.prompt_query(x, self.prompt_length)
        weights = reference.prompt_gate(query, self.gate)
        z, outputs = self._mix(x, weights)
        adapter = self.adapter
        inner = F.gelu(F.linear(z, adapter.down[0], adapter.down_bias[0]), approximate="tanh")
        f = z + F.linear(inner, adapter.up[0].T, adapter.up_bias[0])
        cosines = None
        if self.sparsity:
            wide = weights.dtype  # float32 or wider: a mean of 16-bit cosines has few digits
            cosines = F.cosine_similarity(f.unsqueeze(-1).to(wide), outputs().to(wide), dim=2)
        self.agreement = reference.Agreement(weights, cosines)
        return f


class StackedPEMTLinear(_PlainPEMTLinear):
    """The mixture as one wide LoRA; experts' outputs are made for the loss alone.

    The base must not keep its output for its backward (``nn.Linear`` does not): the experts are
    added in place.
    """

    def _mix(self, x: Tensor, weights: Tensor):
        z = self.base(x)
        hidden = F.linear(x, self.lora_down.flatten(0, 1)).unflatten(-1, self.lora_down.shape[:2])
        mixed = (hidden.to(weights.dtype) * weights[:, None, :, None]).flatten(2).flatten(0, 1)
        z.flatten(0, 1).addmm_(mixed.to(x.dtype), self.lora_up.flatten(0, 1))
        return z, lambda: torch.einsum("bler,ern->blne", hidden, self.lora_up)


class ExpertLoopPEMTLinear(_PlainPEMTLinear):
    """In the manner of PEMT's code: a list of outputs, stacked for the mixture and the loss.

    Its product rounds the weights to x's dtype, as under autocast.  That error is the same at every
    position of a sequence, so it does not average out in the loss's mean cosines: at T = 512 dgate
    errs five times as much in bfloat16 as with float32 weights, and more for more tokens.
    """

    def _mix(self, x: Tensor, weights: Tensor):
        pairs = zip(self.lora_down, self.lora_up, strict=True)
        outputs = [F.linear(x, down) @ up for down, up in pairs]
        mixture = (torch.stack(outputs, dim=3) @ weights.to(x.dtype)[:, None, :, None]).squeeze(3)
        return self.base(x) + mixture, lambda: torch.stack(outputs, dim=3)


def make_inputs(case: PEMTCase, seed: int = 0) -> tuple[Step, Tensor, Tensor]:
    """The fused layer, x ``[batch, length, K]`` and dy of `case`, all in its dtype.

    Base, experts, adapter and loss contribute alike, so that an error of any shows.
    """
    dtype = DTYPES[case.dtype]
    random = generator(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=random) * scale).to(dtype)

    K, N, r = case.in_features, case.out_features, case.rank
    base = nn.Linear(K, N, bias=False, dtype=dtype)
    loras = [(normal(r, K, scale=K**-0.5), normal(N, r, scale=r**-0.5), 1.0)] * case.experts
    layer = PEMTLinear(
        base, loras, gate_query="input", prompt_length=min(PROMPT, case.length),
        bottleneck=case.bottleneck,
    )  # fmt: skip
    with torch.no_grad():
        base.weight.copy_(normal(N, K, scale=K**-0.5))
        for t in (layer.lora_down, layer.gate):
            t.copy_(normal(*t.shape, scale=K**-0.5))
        layer.lora_up.copy_(normal(*layer.lora_up.shape, scale=r**-0.5))
        layer.adapter.down.copy_(normal(*layer.adapter.down.shape, scale=N**-0.5))
        layer.adapter.up.copy_(normal(*layer.adapter.up.shape, scale=case.bottleneck**-0.5))
    x = normal(case.tokens // case.length, case.length, K)
    dy = normal(case.tokens // case.length, case.length, N)
    # A cosine's gradient is 1 / |f| long, and the loss is a mean over tokens.
    return Step(layer, coefficient=float(case.tokens * N)), x, dy


def reference_layer(step: Step, dtype: torch.dtype) -> Step:
    """The literal layer with copies of `step`'s parameters in `dtype`."""
    layer = step.layer
    loras = [(layer.lora_down[e], layer.lora_up[e].T, 1.0) for e in range(layer.num_experts)]
    literal = reference.PEMTLinear(
        copy.deepcopy(layer.base).to(dtype), loras, gate_query="input",
        prompt_length=layer.prompt_length, bottleneck=layer.bottleneck,
    )  # fmt: skip
    literal.load_state_dict(layer.state_dict())
    return Step(literal, step.coefficient)


def floors(case: PEMTCase, direction: str) -> Floors:
    """Multiply-adds beside the frozen linear's over its own; every expert is needed.

    dx adds the gradients of the hidden, of x and of the adapter; and for the loss ``B_eᵀ f``,
    ``R_e h_e`` and their gradients.  Training adds those of the adapter's weights.
    """
    K, N, R, b = case.in_features, case.out_features, case.experts * case.rank, case.bottleneck
    work = R * (K + N) + 2 * b * N
    base = K * N
    if direction != FORWARD:
        work = 2 * R * (K + N) + 4 * b * N + 2 * R * (N + case.rank)
        base *= 2
    if direction == TRAIN:
        work += 2 * b * N
    return Floors(dense=work / base, sparse=work / base)


def _plain(cls: type[_PlainPEMTLinear]):
    return lambda case, step: Step(cls.from_reference(step.layer), step.coefficient)


PEMT = Method(
    name="pemt",
    title="PEMT: prompt gate, frozen sources, serial adapter, task sparsity loss",
    case_type=PEMTCase,
    cases=_cases(),
    gpu_cases=_gpu_cases(),
    make_inputs=make_inputs,
    reference=reference_layer,
    floors=floors,
    # Hidden and Bᵀf of the experts; z and f and the adapter's hidden.
    memory_target=lambda case: (
        case.tokens
        * max(DTYPES[case.dtype].itemsize, 4)
        * (2 * case.experts * case.rank + case.bottleneck)
        + 2 * case.tokens * case.out_features * DTYPES[case.dtype].itemsize
        + 64 * case.tokens * case.experts
    ),
    plain="stacked",
    variants=(
        Variant("stacked", _plain(StackedPEMTLinear)),
        Variant("stacked-compiled", _plain(StackedPEMTLinear), compiled=True),
        Variant("expert-loop", _plain(ExpertLoopPEMTLinear)),
        *OURS,
    ),
)
