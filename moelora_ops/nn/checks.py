"""Checks of arguments that the layers share; their messages name the argument."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import functional


def check_count(name: str, value: Any) -> None:
    """An int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: wanted an int of at least 1, got {value!r}")


def check_bool(name: str, value: Any) -> None:
    """True or False, and nothing that counts as either."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: wanted a bool, got {value!r}")


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """One of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: wanted one of {tuple(choices)}, got {value!r}")


def check_dtype(x: Tensor, lora_down: Tensor) -> None:
    """x is in the dtype of the experts that it meets, or autocast sees to it."""
    if x.dtype != lora_down.dtype and functional.autocast_dtype(x) is None:
        raise TypeError(
            f"x: wanted dtype {lora_down.dtype} like lora_down, got {x.dtype}; cast it or use "
            "autocast"
        )
