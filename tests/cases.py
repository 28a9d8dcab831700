"""The shared case list: every implementation of an operator must agree on all of it."""

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from moelora_ops import functional, reference
from moelora_ops.bench import numerics
from moelora_ops.bench.mola import near_ties

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Shape(NamedTuple):
    """T tokens, K in_features, N out_features, E experts, r rank, k top-k."""

    T: int
    K: int
    N: int
    E: int
    r: int
    k: int

    def __str__(self) -> str:
        return "T{}-K{}-N{}-E{}-r{}-k{}".format(*self)


# Nothing is a multiple of anything on purpose; the plain sizes are there for the fast paths.
SHAPES = tuple(
    itertools.starmap(
        Shape,
        [
            (0, 32, 48, 4, 2, 2),  # no tokens
            (1, 64, 128, 8, 8, 2),  # decode
            (3, 1, 1, 2, 1, 1),  # one feature, one column
            (5, 33, 47, 4, 3, 2),
            (15, 257, 129, 8, 4, 2),  # the largest T whose threads share a token
            (16, 257, 129, 8, 4, 2),
            (17, 128, 64, 1, 8, 1),  # one expert: LoRA
            (77, 256, 512, 32, 1, 4),  # rank-1 experts
            (130, 200, 136, 8, 8, 2),
            (40, 128, 130, 3, 4, 3),  # k = E: stacked by the automatic choice
            (33, 130, 258, 2, 64, 2),
            (64, 96, 100, 5, 16, 4),  # nearly all experts, still grouped
            (300, 70, 65, 8, 9, 1),
            (9, 40, 24, 128, 2, 3),
            (21, 48, 56, 6, 12, 6),
            (513, 17, 19, 4, 2, 2),  # several expand passes and outer blocks
        ],
    )
)


class Inputs(NamedTuple):
    """Arguments of ``functional.mola`` and the incoming gradients."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    lora_down: Tensor
    lora_up: Tensor
    router: Tensor
    dy: Tensor
    dprob_sums: Tensor

    def to(self, dtype_or_device: torch.dtype | str) -> "Inputs":
        return Inputs(*(t.to(dtype_or_device) for t in self))


def make_inputs(shape: Shape, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Inputs on which no right implementation chooses other experts: near ties are drawn again."""
    T, K, N, E, r, k = shape
    random = torch.Generator().manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=random) * scale).to(dtype)

    router = normal(E, K, scale=2 * K**-0.5)
    x = normal(T, K)
    for _ in range(1000):
        near = near_ties(x, router, k, 1e-3)
        if not near.any():
            break
        x[near] = normal(int(near.sum()), K)
    else:
        raise AssertionError(f"{shape}: near ties remain")
    return Inputs(
        x, normal(N, K, scale=K**-0.5), normal(N), normal(E, r, K, scale=K**-0.5),
        normal(E, r, N, scale=r**-0.5), router, normal(T, N), normal(E),
    )  # fmt: skip


QUANTITIES = ("y", "prob_sums", "dx", "dlora_down", "dlora_up", "drouter")


def run(
    function, inputs: Inputs, top_k: int, *, balance: bool = False, **options
) -> dict[str, Tensor]:
    """Outputs, counts and gradients of `function` (``functional.mola`` or ``reference.mola``)."""
    leaves = [t.detach().clone().requires_grad_() for t in
              (inputs.x, inputs.lora_down, inputs.lora_up, inputs.router)]  # fmt: skip
    x, lora_down, lora_up, router = leaves
    if function is functional.mola:
        options["return_routing"] = True
    else:
        options.pop("strategy", None)
    y, routing = function(
        x, inputs.weight, inputs.bias, lora_down, lora_up, router, top_k, 2.0, **options
    )
    outputs, gradients = [y], [inputs.dy]
    if balance:
        outputs.append(routing.prob_sums)
        gradients.append(inputs.dprob_sums.to(routing.prob_sums.dtype))
    grads = torch.autograd.grad(outputs, leaves, gradients)
    named = dict(zip(QUANTITIES, (y.detach(), routing.prob_sums.detach(), *grads), strict=True))
    return named | {"counts": routing.counts}


def reference_run(inputs: Inputs, top_k: int, dtype: torch.dtype, **options) -> dict[str, Tensor]:
    """The literal reference on the same (already rounded) inputs, computed in `dtype`."""
    return run(reference.mola, inputs.to(dtype), top_k, **options)


def assert_within_budget(
    shape: Shape,
    dtype: torch.dtype,
    on: Callable[[], AbstractContextManager],
    draws: int | None = None,
    device: str = "cpu",
    **options,
) -> None:
    """``functional.mola`` within `on()`: output, statistics, all gradients against the reference.

    Errors are pooled over several draws: a tiny one may flatter the plain version by chance.
    """
    got, plain, want = [], [], []
    for seed in range(draws or (8 if shape.T < 64 else 2)):
        inputs = make_inputs(shape, dtype, seed).to(device)
        with on():
            got.append(run(functional.mola, inputs, shape.k, **options))
        want.append(reference_run(inputs, shape.k, torch.float64, **options))
        plain.append(reference_run(inputs, shape.k, dtype, **options))
        counts = [runs[-1].pop("counts") for runs in (got, plain, want)]
        assert torch.equal(counts[0], counts[2])
        if shape.k == 1 and options.get("renormalize", True) and not options.get("balance"):
            # The weight is the constant 1: the reference's zero is rounded, ours is exact.
            assert not got[-1]["drouter"].any()
            plain[-1]["drouter"].zero_()
            want[-1]["drouter"].zero_()
    pooled = [
        {name: torch.stack([r[name] for r in runs]) for name in QUANTITIES}
        for runs in (got, plain, want)
    ]
    numerics.check_numerics(str(shape), *pooled)


def assert_prob_sums_within_budget(on, T: int, draws: int, **options) -> None:
    """Of many tokens, by what `on()` makes the default.

    Random logits, pooled over draws, as sums are few numbers; and those of a router that prefers
    an expert and, from the middle on, shuns it.

    options: of ``functional.mola``.
    """
    skewed = torch.zeros(T, 5)
    skewed[: T // 2, 0], skewed[T // 2 :, 0] = 12, -5
    normal = torch.Generator().manual_seed(0)
    for pool in ([torch.randn(T, 5, generator=normal) for _ in range(draws)], [skewed]):
        errors = torch.zeros(2, dtype=torch.float64)
        for logits in pool:
            experts = torch.zeros(5, 1, 5)
            with on():
                _, routing = functional.mola(
                    logits, torch.zeros(5, 5), None, experts, experts, torch.eye(5), 2, 1.0,
                    return_routing=True, **options,
                )  # fmt: skip
            want = logits.double().softmax(-1).sum(0)
            plain = logits.softmax(-1).sum(0)
            errors += torch.stack([(t - want).square().sum() for t in (routing.prob_sums, plain)])
        ours, plain = errors.sqrt()
        assert ours <= 2 * plain
