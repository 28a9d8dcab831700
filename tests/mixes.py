"""The shared case list of the dense mixes: every implementation must agree on all of it."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from moelora_ops import functional, ops, use_backend
from moelora_ops.bench import numerics
from moelora_ops.reference import averaged, gated, mole, mor1e


class Size(NamedTuple):
    """Leading shape of x, K in_features, N out_features, E experts, r rank."""

    lead: tuple[int, ...]
    K: int
    N: int
    E: int
    r: int

    def __str__(self) -> str:
        return "T{}-K{}-N{}-E{}-r{}".format("x".join(map(str, self.lead)), *self[1:])


# Nothing is a multiple of anything on purpose; the plain sizes are there for the fast paths.
SIZES = tuple(
    itertools.starmap(
        Size,
        [
            ((0, 4), 32, 48, 4, 2),  # no tokens
            ((1,), 64, 128, 8, 8),  # decode
            ((3,), 2, 2, 2, 1),
            ((5,), 34, 46, 4, 3),
            ((3, 5), 258, 130, 8, 4),  # the largest T whose threads share a token
            ((4, 4), 128, 64, 1, 8),  # one expert: LoRA
            ((7, 11), 256, 512, 32, 1),  # rank-1 experts
            ((2, 65), 200, 136, 8, 8),
            ((33,), 130, 258, 2, 64),
            ((3, 100), 70, 66, 5, 9),
            ((9,), 40, 96, 128, 3),
            ((3, 3, 57), 18, 20, 4, 2),  # several expand passes and outer blocks
        ],
    )
)


class Inputs(NamedTuple):
    """One call.

    Attributes:
        tensors: floating-point arguments by name; all but those in `fixed` get a gradient.
        options: the other arguments.
        dy: the incoming gradient.
        fixed: names of tensors that are constants.
        wide: names of tensors that stay in float32 (or float64).
    """

    tensors: dict[str, Tensor]
    options: dict[str, Any]
    dy: Tensor
    fixed: frozenset[str] = frozenset()
    wide: frozenset[str] = frozenset()

    def to(self, dtype: torch.dtype) -> "Inputs":
        wide = torch.promote_types(dtype, torch.float32)
        tensors = {n: t.to(wide if n in self.wide else dtype) for n, t in self.tensors.items()}
        return self._replace(tensors=tensors, dy=self.dy.to(dtype))

    def on(self, device: str) -> "Inputs":
        def moved(values: dict[str, Any]) -> dict[str, Any]:
            return {n: v.to(device) if isinstance(v, Tensor) else v for n, v in values.items()}

        return self._replace(
            tensors=moved(self.tensors), options=moved(self.options), dy=self.dy.to(device)
        )


class Mix(NamedTuple):
    """A mix under test: its function, its reference and its variants."""

    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    make: Callable[..., Inputs]
    variants: dict[str, dict[str, Any]]


def _normal(size: Size, seed: int) -> Callable[..., Tensor]:
    random = torch.Generator().manual_seed(seed + hash(size) % 1000)
    return lambda *shape, scale=1.0: torch.randn(shape, generator=random) * scale


def _linear(size: Size, normal) -> dict[str, Tensor]:
    return {
        "x": normal(*size.lead, size.K),
        "weight": normal(size.N, size.K, scale=size.K**-0.5),
        "bias": normal(size.N),
    }


def _experts(size: Size, normal) -> dict[str, Tensor]:
    return {
        "lora_down": normal(size.E, size.r, size.K, scale=size.K**-0.5),
        "lora_up": normal(size.E, size.r, size.N, scale=size.r**-0.5),
    }


def _rows(size: Size, rows: str, seed: int) -> tuple[tuple[int, ...], dict[str, Tensor]]:
    """Leading shape of the weights and the row_map, if any."""
    if rows == "token" or (rows == "sequence" and len(size.lead) != 2):
        return size.lead, {}
    if rows == "sequence":
        return size.lead[:1], {}
    tokens = torch.Size(size.lead).numel()
    random = torch.Generator().manual_seed(seed)
    # The last row is read by no token.
    return (4,), {
        "row_map": torch.randint(3, (tokens,), generator=random).to(torch.int32),
    }


def make_gated(size: Size, draw: int = 0, rows: str = "token", biases: bool = False, **options):
    normal = _normal(size, draw)
    lead, maps = _rows(size, rows, draw)
    tensors = _linear(size, normal) | _experts(size, normal)
    tensors["weights"] = normal(*lead, size.E)
    if biases:
        tensors["down_bias"] = normal(size.E, size.r)
        tensors["up_bias"] = normal(size.E, size.N)
    options = {"scale": 0.7, **maps, **options}
    return Inputs(tensors, options, normal(*size.lead, size.N), wide=frozenset({"weights"}))


def make_averaged(size: Size, seed: int = 0, rows: str = "token", splits: int = 1):
    normal = _normal(size, seed)
    lead, maps = _rows(size, rows, seed)
    tensors = _linear(size, normal) | _experts(size, normal)
    columns = (size.E,) if splits == 1 else (splits, size.E)
    tensors["weights"] = normal(*lead, *columns, scale=size.E**-0.5)
    options = {"scale": 0.7, "splits": splits, **maps}
    return Inputs(tensors, options, normal(*size.lead, size.N), wide=frozenset({"weights"}))


def make_grid(size: Size, seed: int = 0, rows: str = "token", mode: str = "grid", bare=False):
    normal = _normal(size, seed)
    lead, maps = _rows(size, rows, seed)
    r1, r2 = (size.E, size.E) if mode == "rank1" else (size.E, size.r)
    gates = size.E if mode == "rank1" else r1 * r2
    tensors = _linear(size, normal) | {
        "lora_down": normal(r1, size.K, scale=size.K**-0.5),
        "lora_up": normal(r2, size.N, scale=r2**-0.5),
        "router": normal(gates, size.K, scale=size.K**-0.5),
        "omega": torch.tensor([0.004]),
        "beta": torch.tensor([-0.003]),
    }
    options = {"mode": mode, "token_scale": 3.0, "task_scale": 0.5}
    if bare:
        options["intuition"] = None
    else:
        tensors["intuition"] = normal(*lead, gates)
        options |= maps
    return Inputs(tensors, options, normal(*size.lead, size.N), wide=frozenset({"intuition"}))


def make_output_gate(size: Size, seed: int = 0, masked: str | None = None, **options):
    normal = _normal(size, seed)
    tensors = _linear(size, normal) | _experts(size, normal)
    # Logits of about unit variance, so that the softmax is neither flat nor saturated.
    terms = {
        "l2": 1,
        "l2_per_expert": size.E,
        "layernorm": size.E * size.N,
        "none": size.E * size.N,
    }
    scale = terms[options.get("normalization", "l2")] ** -0.5
    tensors["gate"] = normal(size.E, size.N, size.E, scale=scale)
    tensors["tau"] = torch.tensor([0.8])
    options = {"scale": torch.linspace(0.5, 1.5, size.E, dtype=torch.float64), **options}
    if masked:
        options |= {"mask_mode": masked, "expert_mask": torch.arange(size.E) % 3 != 1}
    if options.get("granularity") == "sequence" and len(size.lead) > 1:
        length = size.lead[-1]
        keep = torch.arange(1, 1 + torch.Size(size.lead[:-1]).numel()).view(*size.lead[:-1], 1)
        options["sequence_mask"] = torch.arange(length) < length - keep % max(length, 1)
    return Inputs(
        tensors, options, normal(*size.lead, size.N), fixed=frozenset({"lora_down", "lora_up"}),
        wide=frozenset({"gate", "tau"}),
    )  # fmt: skip


SEED = torch.tensor([0x1234567890ABCDE])

MIXES = {
    "gated": Mix(functional.gated, gated, make_gated, {
        "token": {},
        "sequence": {"rows": "sequence"},
        "map-relu": {"rows": "map", "activation": "relu", "biases": True},
        "gelu-biases": {"activation": "gelu", "biases": True},
        "gelu_tanh-biases": {"activation": "gelu_tanh", "biases": True, "rows": "sequence"},
        "dropout": {"dropout": 0.3, "seed": SEED, "biases": True},
        "scales": {"scale": "each"},
    }),
    "averaged": Mix(functional.averaged, averaged, make_averaged, {
        "token": {}, "sequence": {"rows": "sequence"}, "map": {"rows": "map"},
        "splits": {"splits": 2}, "splits-sequence": {"splits": 2, "rows": "sequence"},
    }),
    "grid": Mix(functional.mor1e, mor1e, make_grid, {
        "token": {}, "sequence": {"rows": "sequence"}, "map": {"rows": "map"},
        "bare": {"bare": True}, "rank1": {"mode": "rank1"},
        "rank1-sequence": {"mode": "rank1", "rows": "sequence"},
    }),
    "output_gate": Mix(functional.mole, mole, make_output_gate, {
        "l2": {"normalization": "l2"},
        "l2_per_expert": {"normalization": "l2_per_expert"},
        "layernorm": {"normalization": "layernorm"},
        "none": {"normalization": "none"},
        "masked": {"masked": "gate"},
        "masked-input": {"masked": "input"},
        "masked-input-layernorm": {"masked": "input", "normalization": "layernorm"},
        "sequence": {"granularity": "sequence"},
        "sequence-layernorm": {"granularity": "sequence", "normalization": "layernorm",
                               "masked": "input"},
        "sequence-per-expert": {"granularity": "sequence", "normalization": "l2_per_expert"},
    }),
}  # fmt: skip


def cases() -> Iterator[tuple[str, str, Size]]:
    """(mix, variant, size) of all combinations that make sense."""
    for name, mix in MIXES.items():
        for variant, options in mix.variants.items():
            for size in SIZES:
                if options.get("granularity") == "sequence" and len(size.lead) < 2:
                    continue
                # An output of rank 1 cannot turn, one of rank 2 hardly: what is left of the
                # gradient of its direction is rounding.
                if options.get("normalization") == "l2_per_expert" and size.r < 3:
                    continue
                yield name, variant, size


def make_inputs(name: str, variant: str, size: Size, dtype: torch.dtype, seed: int = 0) -> Inputs:
    options = dict(MIXES[name].variants[variant])
    if options.get("scale") == "each":
        options["scale"] = torch.linspace(0.5, 1.5, size.E, dtype=torch.float64)
    return MIXES[name].make(size, seed, **options).to(dtype)


def run(function: Callable[..., Tensor], inputs: Inputs) -> dict[str, Tensor]:
    """y and the gradient of every tensor that is not fixed."""
    tensors = {n: t.detach().clone() for n, t in inputs.tensors.items()}
    leaves = {n: t.requires_grad_() for n, t in tensors.items() if n not in inputs.fixed}
    y = function(**tensors, **inputs.options)
    grads = torch.autograd.grad(y, list(leaves.values()), inputs.dy, allow_unused=True)
    named = {
        f"d{n}": torch.zeros_like(leaves[n]) if g is None else g
        for n, g in zip(leaves, grads, strict=True)
    }
    return {"y": y.detach()} | named


def same_dtype(name: str, variant: str, inputs: Inputs) -> Inputs:
    """Inputs of the plain implementation, which keeps wide what the kernels keep wide.

    Merged factors are rounded to x's dtype, as tensors of parameters are; with wide weights the
    reference would merge and multiply in float32 throughout.
    """
    if name == "averaged" and "sequence" in variant:
        return inputs._replace(wide=frozenset()).to(inputs.dy.dtype)
    return inputs


def assert_within_budget(
    backend: Callable[[], AbstractContextManager], name: str, variant: str, size: Size,
    dtype: torch.dtype, draws: int, agree_with: str | None = None, device: str = "cpu",
) -> None:  # fmt: skip
    """Output and gradients within their error budgets, in the context of `backend`.

    Args:
        draws: over how many the errors are pooled: a tiny one may flatter the plain version.
        agree_with: a back end whose results have to be as close as the reference's.
    """
    mix = MIXES[name]
    results = []
    for seed in range(draws):
        inputs = make_inputs(name, variant, size, dtype, seed).on(device)
        with backend():
            got = run(mix.function, inputs)
        wanted = [run(mix.reference, inputs.to(torch.float64))]
        if agree_with:
            with use_backend(agree_with):
                wanted.append({n: t.double() for n, t in run(mix.function, inputs).items()})
        plain = run(mix.reference, same_dtype(name, variant, inputs))
        if "dweights" in plain:
            plain["dweights"] = plain["dweights"].to(got["dweights"].dtype)
        results.append((got, plain, *wanted))
    got, plain, *wanted = (
        {key: torch.stack([result[key] for result in column]) for key in column[0]}
        for column in zip(*results, strict=True)
    )
    for want in wanted:
        numerics.check_numerics(f"{name} {variant} {size}", got, plain, want)


@contextlib.contextmanager
def recorded_calls(
    operators: ops.Operators, names: Iterable[str]
) -> Iterator[dict[str, list[tuple]]]:
    """The arguments of the calls of some operators made inside, by name, with tensors copied."""
    calls = {name: [] for name in names}

    def recorder(name: str, operator: Callable) -> Callable:
        def call(*arguments):
            keep = (a.detach().clone() if isinstance(a, Tensor) else a for a in arguments)
            calls[name].append(tuple(keep))
            return operator(*arguments)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in calls:
            patch.setattr(operators, name, recorder(name, getattr(operators, name)))
        yield calls
