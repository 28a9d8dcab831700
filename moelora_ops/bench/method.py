"""What the benchmark has to know about a method: one :class:`Method` each."""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..backends import extension
from .numerics import DX, FORWARD, TRAIN

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


# Tokens of a sequence, where weights or gates are per sequence.
SEQUENCE = 128


# The linears of LLaMA-7B: in_features and out_features of q, k, v and o; gate and up; down.
LLAMA_7B = {"qkvo": (4096, 4096), "up": (4096, 11008), "down": (11008, 4096)}


def generator(seed: int) -> torch.Generator:
    """On the device on which tensors are made: see ``with torch.device(...)``."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def directions(tokens: int) -> tuple[str, ...]:
    """What a case of so many tokens measures on a GPU: nobody trains on a handful."""
    return (FORWARD, DX, TRAIN) if tokens >= 512 else (FORWARD,)


class Case:
    """Base of the methods' cases, frozen dataclasses: every int is a size and at least 1.

    Attributes:
        mix: whose operators our layer runs; "" if only products.
    """

    mix: ClassVar[str] = ""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is int and value < 1:
                raise ValueError(f"{field.name}: wanted at least 1, got {value}")


class SequenceCase(Case):
    """A case whose tokens come in sequences of :data:`SEQUENCE`, or in one that is shorter."""

    def __post_init__(self):
        super().__post_init__()
        if self.tokens % self.length:
            raise ValueError(f"tokens: wanted a multiple of {SEQUENCE}, got {self.tokens}")

    @property
    def length(self) -> int:
        """Tokens of one sequence."""
        return min(self.tokens, SEQUENCE)


class Floors(NamedTuple):
    """Arithmetic of the adapter over that of the frozen linear.

    Attributes:
        dense: every expert computed.
        sparse: only what the chosen experts need.
    """

    dense: float
    sparse: float


class Variant(NamedTuple):
    """One implementation that competes.

    Attributes:
        name: in tables and json.
        build: from a case and the fused layer to a module that shares its parameters, or None where
            the variant would be the same as another one.
        compiled: run it through ``torch.compile``.
        baseline: one of the plain PyTorch implementations, not ours.
        waits: its forward reads numbers back from the device.
    """

    name: str
    build: Callable[[Any, nn.Module], nn.Module | None]
    compiled: bool = False
    baseline: bool = True
    waits: bool = False


class Within(nn.Module):
    """A layer whose forward runs inside a context."""

    def __init__(self, context: Callable[[], AbstractContextManager], layer: nn.Module):
        super().__init__()
        self.context, self.layer = context, layer

    def forward(self, x: Tensor) -> Tensor:
        with self.context():
            return self.layer(x)


def _on_library_gemm(_case: Any, layer: nn.Module) -> nn.Module | None:
    """The adapter alone against the baselines: its frozen linear is the library's product too."""
    on_cpu = next(layer.parameters()).device.type == "cpu"
    if not on_cpu or extension.linear_choice() == "library":
        return None
    return Within(functools.partial(extension.use_linear, "library"), layer)


# What competes of ours, for every method.
OURS = (
    Variant("ours", lambda _case, layer: layer, baseline=False),
    Variant("ours-library", _on_library_gemm, baseline=False),
)


class Method(NamedTuple):
    """The registry entry of a method.

    Attributes:
        name: subcommand of ``python -m moelora_ops.bench``.
        title: one line for people.
        case_type: frozen dataclass with name, dtype (a key of :data:`DTYPES`), directions and the
            shape; every int field is an option of the command.
        cases: the named cases for a CPU.
        gpu_cases: those for a GPU, the most important first.
        make_inputs: (case, seed) to the fused layer, x and dy.
        reference: (layer, dtype) to the literal layer with the same parameters.
        floors: (case, direction) to :class:`Floors`.
        memory_target: bytes that a case may save for backward beyond x.
        plain: name of the baseline that sets the error budget of our layer.
        variants: what is measured, besides the frozen linear ``layer.base``.
    """

    name: str
    title: str
    case_type: type
    cases: tuple
    gpu_cases: tuple
    make_inputs: Callable[[Any, int], tuple[nn.Module, Tensor, Tensor]]
    reference: Callable[[nn.Module, torch.dtype], nn.Module]
    floors: Callable[[Any, str], Floors]
    memory_target: Callable[[Any], int]
    plain: str
    variants: tuple[Variant, ...]


def has_peft() -> bool:
    """Whether PEFT's layers can be built; where it is missing its variants are None."""
    return importlib.util.find_spec("peft") is not None
