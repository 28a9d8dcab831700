"""What every method's configuration has: which linears it adapts, and of which dtype."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..companions import Companion
from ..depth import NumberedLayer, numbered_layer

ALL_LINEAR = "all-linear"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Base class of the configurations; frozen, and checked when it is made.

    A subclass adds its fields and their checks (``__post_init__``, which calls this one) and
    :meth:`layer_arguments`.  The other methods have defaults that fit a method whose layers are
    described by numbers alone and stand alone.

    Args:
        target_modules: names of the linears to adapt, compared with the end of the qualified name;
            or ``"all-linear"``, every linear inside the numbered layers.
        adapter_dtype: of the new parameters; None takes each base layer's.

    Raises:
        TypeError, ValueError: a field is out of range; the message names it.
    """

    target_modules: str | Sequence[str] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    adapter_dtype: torch.dtype | None = None

    def __post_init__(self):
        targets = self.target_modules
        if targets != ALL_LINEAR:
            is_list = isinstance(targets, Iterable) and not isinstance(targets, str)
            names = list(targets) if is_list else []
            if not names or not all(isinstance(name, str) and name for name in names):
                raise ValueError(
                    f"target_modules: wanted {ALL_LINEAR!r} or a sequence of module names, "
                    f"got {targets!r}"
                )
            object.__setattr__(self, "target_modules", tuple(names))
        check_dtype("adapter_dtype", self.adapter_dtype)

    def layer_arguments(self, name: str, layer: NumberedLayer | None) -> dict[str, Any]:
        """Constructor arguments, beside the base, of the adapter called `name` in `layer`."""
        raise NotImplementedError

    def layers(self, model: nn.Module) -> dict[str, dict[str, Any]]:
        """:meth:`layer_arguments` of every linear of `model` to adapt, by qualified name.

        A method whose experts come from files overrides it, since there the files say which.
        """
        names = target_names(model, self.target_modules)
        if not names:
            raise ValueError(
                "target_modules: wanted linears of the model, but none matches "
                f"{self.target_modules}"
            )
        return {name: self.layer_arguments(name, numbered_layer(model, name)) for name in names}

    def companions(
        self,
        model: nn.Module,
        layers: dict[str, dict[str, Any]],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> dict[str, Companion]:
        """The companions to hang into `model`, by name.

        Args:
            layers: what :meth:`layers` gave.
            device, dtype: of the first adapter's parameters.
        """
        return {}

    @classmethod
    def check_layer(cls, name: str, arguments: dict[str, Any]) -> None:
        """Raise if a file's `arguments` of one layer are out of range; names are checked before."""
        cls(**arguments).layer_arguments(name, None)  # one layer's, of no depth

    @classmethod
    def constructor_arguments(cls, base: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        """What the layer's constructor takes on `base`, from a file's `arguments`.

        A layer that is made from tensors gets empty ones of the right shapes (``torch.empty``
        without a device, so that a meta device around it holds); the values follow.
        """
        return arguments


def check_dtype(name: str, dtype: torch.dtype | None) -> None:
    if dtype not in (None, *_DTYPES):
        raise ValueError(f"{name}: wanted None or one of {_DTYPES}, got {dtype!r}")


def is_linear(module: nn.Module) -> bool:
    """Whether an adapter can wrap `module`."""
    # nn.MultiheadAttention reads this one's weight and never calls it.
    return not isinstance(module, NonDynamicallyQuantizableLinear) and all(
        isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features")
    )


def target_names(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Qualified names of the linears that `targets` means, outermost only."""
    names: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if names and name.startswith(names[-1] + "."):
            continue  # what is inside a target is its own business
        if targets == ALL_LINEAR:
            if is_linear(module) and name and numbered_layer(model, name) is not None:
                names.append(name)
        elif any(name == target or name.endswith("." + target) for target in targets):
            if isinstance(module, NonDynamicallyQuantizableLinear):
                raise TypeError(
                    f"target_modules: {name} belongs to an nn.MultiheadAttention, which reads its "
                    "weight and never calls it, so that experts would have no effect"
                )
            if not is_linear(module):
                raise TypeError(
                    "target_modules: wanted linears with integer in_features and out_features, "
                    f"but {name} is {type(module).__name__}"
                )
            names.append(name)
    return names
