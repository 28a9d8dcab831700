"""MoLA in the benchmark: cases, inputs, what competes, and the least arithmetic."""

import copy
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import nn, reference
from .baselines import (
    ExpertLoopMoLALinear,
    FastStackedMoLALinear,
    GroupedMoLALinear,
    StackedMoLALinear,
)
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
from .numerics import DX, FORWARD, TRAIN, InputsError


@dataclass(frozen=True)
class MoLACase(Case):
    """One row of the table: a layer and a number of tokens."""

    mix = "topk"

    name: str
    dtype: str
    tokens: int
    in_features: int
    out_features: int
    experts: int = 8
    rank: int = 8
    top_k: int = 2
    directions: tuple[str, ...] = (FORWARD, TRAIN)

    def __post_init__(self):
        super().__post_init__()
        if self.top_k > self.experts:
            raise ValueError(f"top_k: wanted 1..experts={self.experts}, got {self.top_k}")

    def __str__(self) -> str:
        return (
            f"T={self.tokens} K={self.in_features} N={self.out_features}"
            f" E={self.experts} r={self.rank} k={self.top_k}"
        )


def _cases() -> tuple[MoLACase, ...]:
    shapes = [
        ("t1024", 1024, 2048, {}),
        ("t512", 512, 4096, {}),
        ("t64", 64, 4096, {"directions": (FORWARD,)}),
        ("t8", 8, 4096, {"directions": (FORWARD,)}),
        ("t4", 4, 4096, {"directions": (FORWARD,)}),
        ("t2", 2, 4096, {"directions": (FORWARD,)}),
        ("t1", 1, 4096, {"directions": (FORWARD,)}),
        ("rank1", 1024, 2048, {"experts": 32, "rank": 1, "top_k": 4}),
        ("dense", 1024, 2048, {"top_k": 8}),
    ]
    return tuple(
        MoLACase(name, dtype, tokens, width, width, **rest)
        for (name, tokens, width, rest), dtype in itertools.product(shapes, ("bf16", "fp32"))
    )


def _gpu_cases() -> tuple[MoLACase, ...]:
    def case(shape: str, tokens: int, suffix: str = "", dtype: str = "bf16", **rest) -> MoLACase:
        return MoLACase(
            f"{shape}-t{tokens}{suffix}", dtype, tokens, *LLAMA_7B[shape],
            directions=directions(tokens), **rest,
        )  # fmt: skip

    return (
        *(case("qkvo", tokens) for tokens in (8192, 2048, 512, 16384, 1, 32, 8)),
        *(case(shape, tokens) for shape in ("up", "down") for tokens in (8192, 2048, 512, 1, 32)),
        case("qkvo", 8192, "-r16", rank=16),
        *(case("qkvo", 8192, f"-e{experts}", experts=experts) for experts in (2, 4, 6)),
        *(case("qkvo", 8192, f"-{dtype}", dtype) for dtype in ("fp16", "fp32")),
        *(case(shape, tokens) for shape in ("up", "down") for tokens in (16384, 8)),
    )


def make_inputs(
    case: MoLACase, seed: int = 0, min_gap: float | None = None
) -> tuple[nn.MoLALinear, Tensor, Tensor]:
    """The fused layer, x ``[T, K]`` and dy ``[T, N]`` of `case`, all in its dtype.

    Base and experts contribute alike to y, so that an error of either shows.  Tokens whose top-k is
    a near tie
    are drawn again: two right implementations may disagree on those.

    Args:
        case: the shapes.
        seed: of everything random.
        min_gap: least distance of the last chosen and the first unchosen logit, relative to the
            largest logit; by default what rounding the logits to the case's dtype cannot close.

    Raises:
        InputsError: nearly all tokens are near ties, as when half of very many experts are chosen.
    """
    dtype = DTYPES[case.dtype]
    random = generator(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    base = torch.nn.Linear(case.in_features, case.out_features, dtype=dtype)
    layer = nn.MoLALinear(base, case.experts, case.rank, top_k=case.top_k)
    with torch.no_grad():
        base.weight.copy_(normal(*base.weight.shape) / case.in_features**0.5)
        base.bias.copy_(normal(case.out_features))
        layer.lora_down.copy_(normal(*layer.lora_down.shape) / case.in_features**0.5)
        layer.router.copy_(normal(*layer.router.shape) / case.in_features**0.5)
        # k experts of r unit columns each, weights near 1/k: sum to about unit variance.
        spread = (case.top_k / case.rank) ** 0.5 * layer.rank / layer.alpha
        layer.lora_up.copy_(normal(*layer.lora_up.shape) * spread)

    if min_gap is None:
        min_gap = max(2 * torch.finfo(dtype).eps, 1e-4)
    x = normal(case.tokens, case.in_features)
    for _ in range(1000):
        near = near_ties(x, layer.router, case.top_k, min_gap)
        if not near.any():
            return layer, x, normal(case.tokens, case.out_features)
        x[near] = normal(int(near.sum()), case.in_features)
    raise InputsError(
        f"inputs: {int(near.sum())} of {case.tokens} tokens stay near ties of {case.top_k} of"
        f" {case.experts} experts after 1000 draws; take fewer experts or a smaller min_gap than"
        f" {min_gap:.1e}"
    )


def near_ties(x: Tensor, router: Tensor, top_k: int, min_gap: float) -> Tensor:
    """bool ``[T]``: whose experts an error of `min_gap` times the largest logit could change."""
    if top_k == len(router):
        return torch.zeros(len(x), dtype=torch.bool)
    logits = x.double() @ router.detach().double().t()
    top = logits.topk(top_k + 1).values
    return top[:, -2] - top[:, -1] < min_gap * logits.abs().amax(-1)


def reference_layer(layer: nn.MoLALinear, dtype: torch.dtype) -> reference.MoLALinear:
    """The literal layer with copies of `layer`'s parameters in `dtype`."""
    literal = reference.MoLALinear(
        copy.deepcopy(layer.base).to(dtype), layer.num_experts, layer.rank, layer.alpha,
        layer.top_k, layer.dropout, layer.renormalize, dropout_mode=layer.dropout_mode,
    )  # fmt: skip
    literal.load_state_dict(layer.state_dict())
    return literal


def floors(case: MoLACase, direction: str) -> Floors:
    """Multiply-adds of the experts and the router over those of the frozen linear.

    dx adds for each rank-space column one product for its gradient and one from it, training its
    two parameters' again; with renormalised top-k the gradient of the logits is zero outside the
    chosen experts.
    """
    K, N, E = case.in_features, case.out_features, case.experts

    def work(columns: int, experts_with_gradient: int) -> int:
        forward = K * (columns + E) + N * columns
        pass_back = N * columns + K * (columns + experts_with_gradient)
        return forward + {FORWARD: 0, DX: 1, TRAIN: 2}[direction] * pass_back

    base = K * N * (1 if direction == FORWARD else 2)
    return Floors(
        dense=work(E * case.rank, E) / base, sparse=work(case.top_k * case.rank, case.top_k) / base
    )


def _grouped(case: MoLACase, layer: nn.MoLALinear) -> GroupedMoLALinear | None:
    """None on a CPU, where PyTorch's product is a loop, and where it does not take the tensors."""
    fits = DTYPES[case.dtype] == torch.bfloat16 and not case.rank % 8
    on_gpu = layer.router.is_cuda and hasattr(torch.nn.functional, "grouped_mm")
    return GroupedMoLALinear.from_reference(layer) if fits and on_gpu else None


def _fast_stacked(case: MoLACase, layer: nn.MoLALinear) -> FastStackedMoLALinear | None:
    """None in the wide dtypes, where it is the stacked layer."""
    return FastStackedMoLALinear.from_reference(layer) if DTYPES[case.dtype].itemsize < 4 else None


MOLA = Method(
    name="mola",
    title="MoLA: top-k routed LoRA experts on a frozen linear",
    case_type=MoLACase,
    cases=_cases(),
    gpu_cases=_gpu_cases(),
    make_inputs=make_inputs,
    reference=reference_layer,
    floors=floors,
    memory_target=lambda case: 8 * case.tokens * (case.experts * case.rank + case.experts),
    plain="stacked",
    variants=(
        Variant("stacked", lambda case, layer: StackedMoLALinear.from_reference(layer)),
        Variant(
            "stacked-compiled",
            lambda case, layer: StackedMoLALinear.from_reference(layer),
            compiled=True,
        ),
        Variant("stacked-16bit", _fast_stacked),
        Variant("stacked-16bit-compiled", _fast_stacked, compiled=True),
        Variant("grouped-mm", _grouped),
        Variant(
            "expert-loop",
            lambda case, layer: ExpertLoopMoLALinear.from_reference(layer),
            waits=True,
        ),
        *OURS,
    ),
)
