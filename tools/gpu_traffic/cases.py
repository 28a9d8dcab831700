"""Calls whose traffic is counted and whose kernels are compiled: one row per method."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelora_ops import functional


class Size(NamedTuple):
    """T tokens, K in_features, N out_features, E experts, r rank, k top-k."""

    T: int
    K: int
    N: int
    E: int = 8
    r: int = 8
    k: int = 2


class Method(NamedTuple):
    """A public function and how it is called.

    Attributes:
        function: takes x, weight, bias, then `tensors`, then `options`.
        tensors: shapes of the arguments that come after bias, by name.
        options: other arguments.
        fixed: names of tensors without a gradient.
        wide: names of tensors in float32.
        size: E and r that users have, and k.
        tokens: x's leading dimensions.
        operator: of ours that it runs, by default its own.
    """

    function: Callable[..., Tensor]
    tensors: Callable[[Size], dict[str, tuple[int, ...]]]
    options: Callable[[Size], dict[str, Any]]
    fixed: frozenset[str] = frozenset()
    wide: frozenset[str] = frozenset()
    size: dict[str, int] = {}  # noqa: RUF012
    tokens: Callable[[Size], tuple[int, ...]] = lambda s: (s.T,)
    operator: str = ""


def _experts(s: Size) -> dict[str, tuple[int, ...]]:
    return {"lora_down": (s.E, s.r, s.K), "lora_up": (s.E, s.r, s.N)}


def _sequences(s: Size) -> int:
    """Of a call whose weights are theirs."""
    return min(s.T, 4)


METHODS = {
    "topk": Method(
        functional.mola,
        lambda s: _experts(s) | {"router": (s.E, s.K)},
        lambda s: {"top_k": s.k, "scale": 2.0},
    ),
    "gated": Method(
        functional.gated,
        lambda s: _experts(s) | {"weights": (s.T, s.E)},
        lambda s: {"scale": 2.0},
        wide=frozenset({"weights"}),
    ),
    "averaged": Method(
        functional.averaged,
        lambda s: _experts(s) | {"weights": (s.T, s.E)},
        lambda s: {"scale": 2.0},
        wide=frozenset({"weights"}),
    ),
    "merged": Method(
        functional.averaged,
        lambda s: _experts(s) | {"weights": (_sequences(s), s.E)},
        lambda s: {"scale": 2.0},
        wide=frozenset({"weights"}),
        tokens=lambda s: (_sequences(s), s.T // _sequences(s)),
        operator="averaged",
    ),
    "grid": Method(
        functional.mor1e,
        lambda s: {
            "lora_down": (s.E, s.K), "lora_up": (s.r, s.N), "router": (s.E * s.r, s.K),
            "omega": (1,), "beta": (1,), "intuition": (s.T, s.E * s.r),
        },
        lambda s: {},
        wide=frozenset({"intuition"}),
        size={"E": 4},
    ),
    "output_gate": Method(
        functional.mole,
        lambda s: _experts(s) | {"gate": (s.E, s.N, s.E), "tau": (1,)},
        lambda s: {"scale": 2.0},
        fixed=frozenset({"lora_down", "lora_up"}),
        wide=frozenset({"gate", "tau"}),
        size={"r": 16},
    ),
}  # fmt: skip


class Call(NamedTuple):
    """One method at one size.

    Attributes:
        method: a key of `METHODS`.
        train: "all" parameters and x, "x" alone, or "" for no backward pass.
        bias: whether the frozen linear has one.
        dropout: of what the experts see.
        strategy: of topk.
    """

    method: str
    size: Size
    dtype: torch.dtype = torch.bfloat16
    train: str = "all"
    bias: bool = False
    dropout: float = 0.0
    strategy: str = "auto"

    def inputs(self, draw: Callable[..., Tensor]) -> dict[str, Tensor | None]:
        """The tensors of a call by name, dy among them; draw(shape, dtype) makes one."""
        method, s = METHODS[self.method], self.size
        tokens = method.tokens(s)
        shapes = {"x": (*tokens, s.K), "weight": (s.N, s.K), "dy": (*tokens, s.N)}
        if self.bias:
            shapes["bias"] = (s.N,)
        shapes |= method.tensors(s)
        tensors: dict[str, Tensor | None] = {"bias": None}
        for name, shape in shapes.items():
            tensors[name] = draw(shape, torch.float32 if name in method.wide else self.dtype)
        trained = {"": set(), "x": {"x"}, "all": {"x", *method.tensors(s)}}[self.train]
        for name in trained - method.fixed:
            tensors[name].requires_grad_()
        return tensors

    def run(self, tensors: dict[str, Tensor | None]) -> None:
        """Forward, and backward if anything is trained."""
        method = METHODS[self.method]
        inputs = {name: t for name, t in tensors.items() if name != "dy"}
        options = method.options(self.size)
        if self.dropout:
            options |= {"dropout": self.dropout, "seed": torch.tensor([1])}
        if self.strategy != "auto":
            options |= {"strategy": self.strategy}
        y = method.function(**inputs, **options)
        if y.requires_grad:
            leaves = [t for t in inputs.values() if t is not None and t.requires_grad]
            torch.autograd.grad(y, leaves, tensors["dy"], allow_unused=True)


def usual(method: str, T: int, K: int = 4096, N: int = 4096, **changes) -> Call:
    """A method as its users have it: E and r of the paper, bfloat16."""
    size = Size(T, K, N)._replace(**METHODS[method].size)
    fields = {n: v for n, v in changes.items() if n in Call._fields}
    sizes = {n: v for n, v in changes.items() if n in Size._fields}
    return Call(method, size._replace(**sizes), **fields)
