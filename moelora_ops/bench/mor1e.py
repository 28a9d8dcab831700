"""Intuition-MoR1E in the benchmark: cases, inputs, what competes, and the least arithmetic."""

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
from .numerics import DX, FORWARD, TRAIN


@dataclass(frozen=True)
class MoR1ECase(Case):
    """One row of the table: a layer and a number of tokens, in up to four sequences."""

    mix = "grid"

    name: str
    dtype: str
    tokens: int
    in_features: int
    out_features: int
    rank_down: int = 4
    rank_up: int = 8
    mode: str = "grid"
    directions: tuple[str, ...] = (FORWARD, TRAIN)

    def __post_init__(self):
        super().__post_init__()
        if self.mode == "rank1" and self.rank_up != self.rank_down:
            raise ValueError(f"rank_up: wanted rank_down={self.rank_down}, got {self.rank_up}")

    def __str__(self) -> str:
        return (
            f"T={self.tokens} K={self.in_features} N={self.out_features}"
            f" {self.mode} r1={self.rank_down} r2={self.rank_up}"
        )


def _cases() -> tuple[MoR1ECase, ...]:
    tokens = (1024, 512, 64, 8, 1)
    modes = (("", {}), ("-rank1", {"rank_down": 32, "rank_up": 32, "mode": "rank1"}))
    # One token's gradients are a few errors repeated over K or N: no measure of an implementation.
    return tuple(
        MoR1ECase(
            f"t{T}{suffix}",
            dtype,
            T,
            2048,
            2048,
            **rest,
            directions=(FORWARD, TRAIN) if T >= 64 else (FORWARD,),
        )
        for (suffix, rest), T, dtype in itertools.product(modes, tokens, ("bf16", "fp32"))
    )


def _gpu_cases() -> tuple[MoR1ECase, ...]:
    sizes = [
        *(("qkvo", tokens) for tokens in (8192, 2048, 512, 32, 1, 16384)),
        *((shape, tokens) for shape in ("up", "down") for tokens in (8192, 2048)),
    ]
    return tuple(
        MoR1ECase(
            f"{shape}-t{tokens}", "bf16", tokens, *LLAMA_7B[shape], directions=directions(tokens)
        )
        for shape, tokens in sizes
    )


class _Scored:
    """Mixin: a layer with the scores of its batch inside, called with x alone."""

    def with_scores(self, scores: Tensor):
        self.register_buffer("scores", scores)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, self.scores)


class ScoredMoR1ELinear(_Scored, nn.MoR1ELinear):
    """Our layer."""


class _ScoredReference(_Scored, reference.MoR1ELinear):
    pass


class _PlainMoR1ELinear(nn.MoR1ELinear):
    """What the plain PyTorch layers share: the gate, in float32 or wider."""

    @classmethod
    def of(cls, layer: ScoredMoR1ELinear) -> "_PlainMoR1ELinear":
        """The plain layer with `layer`'s parameters and scores."""
        plain = cls.from_reference(layer)
        plain.register_buffer("scores", layer.scores)
        return plain

    def _scalars(self) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(self.omega.dtype, torch.float32)
        return torch.sigmoid(100 * self.omega.to(wide)), torch.sigmoid(100 * self.beta.to(wide))


class StackedMoR1ELinear(_PlainMoR1ELinear):
    """Router and down rows in one product, the mix in float32, one product up in place.

    The base must not keep its output for its backward (``nn.Linear`` does not): the experts are
    added in place.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x ``[batch, length, K]`` to y ``[batch, length, N]``."""
        omega, beta = self._scalars()
        y = self.base(x)
        both = F.linear(x, torch.cat([self.lora_down, self.router])).to(omega.dtype)
        hidden, logits = both.split([self.rank_down, self.num_experts], -1)
        task = (self.task_scale * (1 - omega)) * self.scores
        gate = torch.addcmul(task.unsqueeze(1), logits.softmax(-1), self.token_scale * omega)
        if self.mode == "grid":
            grid = gate.unflatten(-1, (self.rank_down, self.rank_up))
            mixed = (hidden.unsqueeze(-2) @ grid).squeeze(-2)
        else:
            mixed = hidden * gate
        mixed = (mixed * beta).to(x.dtype)
        y.flatten(0, -2).addmm_(mixed.flatten(0, -2), self.lora_up)
        return y


class EagerMoR1ELinear(_PlainMoR1ELinear):
    """In the order of the authors' code: separate products, an einsum, passes over ``[T, N]``."""

    def forward(self, x: Tensor) -> Tensor:
        """x ``[batch, length, K]`` to y ``[batch, length, N]``."""
        omega, beta = (scalar.to(x.dtype) for scalar in self._scalars())
        y = self.base(x)
        token = F.linear(x, self.router).softmax(-1) * self.token_scale
        task = self.scores.unsqueeze(1).to(x.dtype) * self.task_scale
        gate = omega * token + (1 - omega) * task
        hidden = F.linear(x, self.lora_down)
        if self.mode == "grid":
            grid = gate.unflatten(-1, (self.rank_down, self.rank_up))
            mixed = torch.einsum("bli,blij->blj", hidden, grid)
        else:
            mixed = hidden * gate
        experts = F.linear(mixed, self.lora_up.t()) * 1.0  # the scale that their modes fix at 1
        return y + experts * beta


def make_inputs(case: MoR1ECase, seed: int = 0) -> tuple[ScoredMoR1ELinear, Tensor, Tensor]:
    """The fused layer, x ``[batch, length, K]`` and dy ``[batch, length, N]``, in the case's dtype.

    Base and experts contribute alike to y, so that an error of either shows.  Scores are cosines.
    """
    dtype = DTYPES[case.dtype]
    random = generator(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    base = torch.nn.Linear(case.in_features, case.out_features, dtype=dtype)
    layer = ScoredMoR1ELinear(base, case.rank_down, case.rank_up, mode=case.mode)
    batch = next(batch for batch in (4, 2, 1) if case.tokens % batch == 0)
    with torch.no_grad():
        base.weight.copy_(normal(*base.weight.shape) / case.in_features**0.5)
        base.bias.copy_(normal(case.out_features))
        layer.lora_down.copy_(normal(*layer.lora_down.shape) / case.in_features**0.5)
        layer.router.copy_(normal(*layer.router.shape) / case.in_features**0.5)
        # The gate is near 1/2 + 2 c with its scalars at zero, where c is small; β halves.
        rows = case.rank_up * (case.rank_down if case.mode == "grid" else 1)
        layer.lora_up.copy_(normal(*layer.lora_up.shape) * 3 / rows**0.5)
        layer.omega.fill_(0.004)
        layer.beta.fill_(-0.003)
    scores = torch.rand(batch, layer.num_experts, generator=random) * 2 - 1
    layer.with_scores(scores)
    length = case.tokens // batch
    x, dy = normal(batch, length, case.in_features), normal(batch, length, case.out_features)
    # Along what the two scalars change: their gradients, one number each, would otherwise be sums
    # that cancel, and their error a matter of chance.
    with torch.no_grad():
        y = layer(x)
        for scalar in (layer.omega, layer.beta):
            before = scalar.clone()
            scalar += 0.01
            change = layer(x) - y
            scalar.copy_(before)
            dy += change / change.square().mean().sqrt()
    return layer, x, dy


def reference_layer(layer: ScoredMoR1ELinear, dtype: torch.dtype) -> reference.MoR1ELinear:
    """The literal layer with copies of `layer`'s parameters in `dtype`."""
    literal = _ScoredReference(
        copy.deepcopy(layer.base).to(dtype), layer.rank_down, layer.rank_up, layer.token_scale,
        layer.task_scale, layer.mode,
    ).with_scores(torch.empty_like(layer.scores))  # fmt: skip
    literal.load_state_dict(layer.state_dict())
    return literal


def floors(case: MoR1ECase, direction: str) -> Floors:
    """Multiply-adds of down rows, router and up rows over those of the frozen linear.

    Nothing is sparse.  dx adds for each column of rank space one product for its gradient, training
    one for its parameter's.
    """
    K, N = case.in_features, case.out_features
    experts = case.rank_down * case.rank_up if case.mode == "grid" else case.rank_down
    work = K * (case.rank_down + experts) + N * case.rank_up
    passes = {FORWARD: 1, DX: 2, TRAIN: 3}[direction]
    share = passes * work / (K * N * (1 if direction == FORWARD else 2))
    return Floors(dense=share, sparse=share)


def memory_target(case: MoR1ECase) -> int:
    """Twice what the hidden and the logits take in float32."""
    experts = case.rank_down * case.rank_up if case.mode == "grid" else case.rank_down
    return 8 * case.tokens * (case.rank_down + experts)


MOR1E = Method(
    name="mor1e",
    title="Intuition-MoR1E: a grid of rank-1 experts on a frozen linear",
    case_type=MoR1ECase,
    cases=_cases(),
    gpu_cases=_gpu_cases(),
    make_inputs=make_inputs,
    reference=reference_layer,
    floors=floors,
    memory_target=memory_target,
    plain="stacked",
    variants=(
        Variant("stacked", lambda case, layer: StackedMoR1ELinear.of(layer)),
        Variant("stacked-compiled", lambda case, layer: StackedMoR1ELinear.of(layer), True),
        Variant("eager", lambda case, layer: EagerMoR1ELinear.of(layer)),
        *OURS,
    ),
)
