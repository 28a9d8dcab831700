"""OrchMoE and Polytropon in the benchmark: skills weighted per sequence, summed or averaged."""

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
    Floors,
    Method,
    SequenceCase,
    Variant,
    directions,
    generator,
    has_peft,
)
from .numerics import DX, FORWARD, TRAIN


@dataclass(frozen=True)
class OrchMoECase(SequenceCase):
    """One row of the table: a layer and a number of tokens, in sequences of up to 128.

    Every sequence is a task of its own, and weights come from the task-skill matrix as in eval.
    """

    name: str
    dtype: str
    tokens: int
    in_features: int
    out_features: int
    skills: int = 8
    rank: int = 8
    combine: str = "sum"
    directions: tuple[str, ...] = (FORWARD, TRAIN)

    def __str__(self) -> str:
        return (
            f"T={self.tokens} K={self.in_features} N={self.out_features} S={self.skills}"
            f" r={self.rank}, {self.combine}"
        )

    @property
    def mix(self) -> str:
        return "averaged" if self.combine == "average" else "gated"


def _cases() -> tuple[OrchMoECase, ...]:
    # One token's gradients are a few errors repeated over K or N: no measure of an implementation.
    return tuple(
        OrchMoECase(
            f"{combine}-t{tokens}", dtype, tokens, 2048, 2048, combine=combine,
            directions=(FORWARD, TRAIN) if tokens >= 64 else (FORWARD,),
        )
        for combine, tokens, dtype in itertools.product(
            ("sum", "average"), (1024, 512, 64, 8, 1), ("bf16", "fp32")
        )
    )  # fmt: skip


def _gpu_cases() -> tuple[OrchMoECase, ...]:
    return tuple(
        OrchMoECase(
            f"{combine}-qkvo-t{tokens}", "bf16", tokens, *LLAMA_7B["qkvo"], combine=combine,
            directions=directions(tokens),
        )
        for tokens in (8192, 2048, 512, 32, 1)
        for combine in ("sum", "average")
    )  # fmt: skip


class _Plain(nn.OrchMoELinear):
    """Plain PyTorch with the parameters, and the weights, of the fused layer."""

    @classmethod
    def of(cls, layer: nn.OrchMoELinear) -> "_Plain":
        """The plain layer that shares `layer`'s parameters."""
        other = copy.copy(layer)
        other.__class__ = cls
        return other

    def _weights(self) -> Tensor:
        return self.skill_weights(self.tasks_from())  # [batch, S], float32


class StackedLinear(_Plain):
    """All skills as one wide LoRA whose columns the weights mix: the baseline that counts.

    The mix is in float32: in 16 bits the gradients of the weights lose most of their digits.  The
    base must not keep its output for its backward (``nn.Linear`` does not): the skills are added in
    place.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x ``[batch, length, K]`` to y ``[batch, length, N]``."""
        y, weights = self.base(x), self._weights()
        hidden = F.linear(x, self.lora_down.flatten(0, 1)).to(weights.dtype)
        hidden = hidden.unflatten(-1, (self.num_skills, self.rank))
        mixed = hidden * weights[:, None, :, None]
        if self.combine == "average":
            mixed = mixed.sum(2, keepdim=True) * weights[:, None, :, None]
        mixed = mixed.flatten(2).flatten(0, 1).to(x.dtype)
        up = self.lora_up.flatten(0, 1)
        y.flatten(0, 1).addmm_(mixed, up, alpha=self.alpha / self.rank)
        return y


class MergedLinear(_Plain):
    """``"average"`` as its formula says: merge the factors of each sequence, then two products."""

    def forward(self, x: Tensor) -> Tensor:
        """x ``[batch, length, K]`` to y ``[batch, length, N]``."""
        y, weights = self.base(x), self._weights()
        down, up = (
            (weights.to(t.dtype) @ t.flatten(1)).unflatten(-1, t.shape[1:])
            for t in (self.lora_down, self.lora_up)
        )
        return y.baddbmm_(x @ down.mT, up, alpha=self.alpha / self.rank)


class SkillLoopLinear(_Plain):
    """``"sum"`` in the manner of the papers' code: a loop over the skills' outputs."""

    def forward(self, x: Tensor) -> Tensor:
        """x ``[batch, length, K]`` to y ``[batch, length, N]``."""
        y, weights = self.base(x), self._weights().to(x.dtype)
        for s, (down, up) in enumerate(zip(self.lora_down, self.lora_up, strict=True)):
            output = F.linear(x, down) @ up * (self.alpha / self.rank)
            y = y + weights[:, s, None, None] * output
        return y


class PeftPolyLinear(_Plain):
    """PEFT's Poly layer, run on views of our parameters."""

    def __init__(self, *args, **kwargs):
        raise TypeError("made from a layer, by of()")

    @classmethod
    def of(cls, layer: nn.OrchMoELinear) -> "PeftPolyLinear":
        """See :meth:`_Plain.of`."""
        from peft import PolyConfig
        from peft.tuners.poly.layer import Linear

        config = PolyConfig(r=layer.rank, n_tasks=layer.num_tasks, n_skills=layer.num_skills)
        poly = Linear(copy.copy(layer.base), "default", config).eval()
        router = poly.poly_router["default"]
        for module, name in (
            (poly, "poly_lora_A"), (poly, "poly_lora_B"), (router, "module_logits"),
        ):  # fmt: skip
            delattr(module, name)  # instead of Parameters they get views at every call
        other = super().of(layer)
        other.poly = (poly, router)
        return other

    def forward(self, x: Tensor) -> Tensor:
        """x ``[batch, length, K]`` to y ``[batch, length, N]``."""
        poly, router = self.poly
        # PEFT divides by the rank; alpha is 1 here.
        poly.poly_lora_A = {"default": self.lora_down.mT.unsqueeze(0)}
        poly.poly_lora_B = {"default": self.lora_up.unsqueeze(0)}
        router.module_logits = self.skill_logits.flatten(1)
        return poly(x, task_ids=self.tasks_from())


def make_inputs(case: OrchMoECase, seed: int = 0) -> tuple[nn.OrchMoELinear, Tensor, Tensor]:
    """The fused layer, x ``[batch, length, K]`` and dy of `case`, all in its dtype.

    Base and skills contribute alike to y, so that an error of either shows.
    """
    dtype = DTYPES[case.dtype]
    random = generator(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=random) * scale

    batch = case.tokens // case.length
    base = torch.nn.Linear(case.in_features, case.out_features, dtype=dtype)
    layer = nn.OrchMoELinear(base, case.skills, batch, case.rank, 1.0, case.combine).eval()
    ids = torch.arange(batch)
    layer.tasks_from = lambda: ids
    with torch.no_grad():
        base.weight.copy_(normal(*base.weight.shape, scale=case.in_features**-0.5))
        base.bias.copy_(normal(case.out_features))
        layer.lora_down.copy_(normal(*layer.lora_down.shape, scale=case.in_features**-0.5))
        # Weights near 1/S: sums over S skills are √S times smaller, and in "average" both are.
        shrunk = case.skills if case.combine == "average" else case.skills**0.5
        layer.lora_up.copy_(normal(*layer.lora_up.shape, scale=shrunk * case.rank**0.5))
        layer.skill_logits.copy_(normal(*layer.skill_logits.shape))
    x = normal(batch, case.length, case.in_features).to(dtype)
    return layer, x, normal(batch, case.length, case.out_features).to(dtype)


def reference_layer(layer: nn.OrchMoELinear, dtype: torch.dtype) -> reference.OrchMoELinear:
    """The literal layer with copies of `layer`'s parameters in `dtype`."""
    arguments = {name: getattr(layer, name) for name in layer.arguments}
    literal = reference.OrchMoELinear(copy.deepcopy(layer.base).to(dtype), **arguments).eval()
    literal.load_state_dict(layer.state_dict())
    literal.tasks_from = layer.tasks_from
    return literal


def floors(case: OrchMoECase, direction: str) -> Floors:
    """Multiply-adds of the skills over those of the frozen linear.

    ``dense``: every skill for every token; backward adds two products per factor.  ``sparse``, for
    ``"average"``: merge the factors once per sequence if that is less, then one LoRA per token;
    backward is twice that again.
    """
    K, N = case.in_features, case.out_features
    one = case.rank * (K + N)  # a LoRA for a token, or a skill's share of a merge
    dense = case.tokens * case.skills * one
    sparse = dense
    if case.combine == "average":
        sequences = case.tokens // case.length
        sparse = min(dense, (case.tokens + sequences * case.skills) * one)
    passes = {FORWARD: 1, DX: 2, TRAIN: 3}[direction]
    base = case.tokens * K * N * (1 if direction == FORWARD else 2)
    return Floors(dense=passes * dense / base, sparse=passes * sparse / base)


def _only(combine: str, cls: type[_Plain]):
    return lambda case, layer: cls.of(layer) if case.combine == combine else None


def _peft(case: OrchMoECase, layer: nn.OrchMoELinear) -> PeftPolyLinear | None:
    """None where PEFT is missing, or adds outputs: its Poly averages."""
    return PeftPolyLinear.of(layer) if case.combine == "average" and has_peft() else None


ORCHMOE = Method(
    name="orchmoe",
    title="OrchMoE and Polytropon: skills weighted per sequence, summed or averaged",
    case_type=OrchMoECase,
    cases=_cases(),
    gpu_cases=_gpu_cases(),
    make_inputs=make_inputs,
    reference=reference_layer,
    floors=floors,
    memory_target=lambda case: 8 * case.tokens * (case.skills * case.rank + case.skills),
    plain="stacked",
    variants=(
        Variant("stacked", lambda case, layer: StackedLinear.of(layer)),
        Variant("stacked-compiled", lambda case, layer: StackedLinear.of(layer), compiled=True),
        Variant("merged", _only("average", MergedLinear)),
        Variant("skill-loop", _only("sum", SkillLoopLinear)),
        Variant("peft-poly", _peft, waits=True),
        *OURS,
    ),
)
