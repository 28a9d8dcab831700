"""What the functions share: checking arguments, autocast, and the frozen linear's way through."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .. import backends, ops
from ..backends import extension
from ..sharded import is_sharded

DROPOUT_MODES = ("token", "expert")
NORMALIZATIONS = tuple(ops.NORMALIZATIONS)
ACTIVATIONS = tuple(ops.ACTIVATIONS)


# ---------------------------------------------------------------- autocast


_AUTOCAST_DEVICES = frozenset(
    device_type
    for device_type in ("cpu", "cuda", "xpu", "mps", "mtia", "hpu", "xla")
    if torch.amp.is_autocast_available(device_type)
)


def autocast_dtype(x: Any) -> torch.dtype | None:
    """What autocast computes in on x's device; None where it is off."""
    device_type = x.device.type if isinstance(x, Tensor) else "cpu"
    if device_type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def autocast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    """`tensors` in `dtype`, except what is no floating-point tensor or float64."""
    return [
        t
        if not isinstance(t, Tensor) or not t.is_floating_point() or t.dtype == torch.float64
        else t.to(dtype)
        for t in tensors
    ]


# ---------------------------------------------------------------- checks
#
# Checking every argument in Python took 200 µs right after a large GEMM had emptied the caches (25
# otherwise), as much as a tenth of an adapter.  So a function runs at once, checks only what no
# kernel would notice, and checks all of it if that fails, for an error that names the argument.


def check_bias(weight: Tensor | None, bias: Tensor | None, base_output: Tensor | None) -> None:
    """What `F.linear` would broadcast, promote or ignore."""
    if base_output is not None:
        if weight is not None or bias is not None:
            raise ValueError("base_output: replaces weight and bias; pass either, not both")
    elif bias is not None and (bias.dtype != weight.dtype or bias.shape != weight.shape[:1]):
        raise ValueError(f"bias: wanted shape {list(weight.shape[:1])}, got {shape(bias)}")


def check_tensor(name: str, t: Any) -> None:
    """A tensor that kernels can read: torch refuses a ``DTensor`` at the operator, unnamed."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: wanted a tensor, got {type(t).__name__}")
    if is_sharded(t):
        raise TypeError(
            f"{name}: wanted a plain tensor, got a DTensor; pass its full_tensor() or to_local(), "
            "and call layers from the module that was sharded with fully_shard"
        )


def check_input(x: Tensor) -> None:
    check_tensor("x", x)
    if x.dim() == 0:
        raise ValueError("x: wanted shape [..., in_features], got a scalar")
    if not x.is_floating_point():
        raise TypeError(f"x: wanted a floating-point dtype, got {x.dtype}")


def check_experts(x: Tensor, lora_down: Tensor, lora_up: Tensor) -> tuple[int, int, int, int]:
    """The shapes of x ``[..., K]``, lora_down ``[E, r, K]`` and lora_up ``[E, r, N]``.

    Returns:
        E, r, K, N.
    """
    check_input(x)
    if not isinstance(lora_down, Tensor) or lora_down.dim() != 3:
        raise ValueError(f"lora_down: wanted shape [E, r, in_features], got {shape(lora_down)}")
    num_experts, rank, in_features = lora_down.shape
    if num_experts < 1:
        raise ValueError("lora_down: wanted at least one expert, got E = 0")
    if rank < 1:
        raise ValueError("lora_down: wanted rank of at least 1, got r = 0")
    if x.shape[-1] != in_features:
        raise ValueError(
            f"x: wanted last dimension {in_features} like lora_down's, got {x.shape[-1]}"
        )
    is_stack = isinstance(lora_up, Tensor) and lora_up.dim() == 3
    if not is_stack or lora_up.shape[:2] != lora_down.shape[:2]:
        raise ValueError(
            f"lora_up: wanted shape [{num_experts}, {rank}, out_features], got {shape(lora_up)}"
        )
    return num_experts, rank, in_features, lora_up.shape[2]


def check_tensors(
    x: Tensor,
    out_features: int,
    weight: Tensor | None,
    bias: Tensor | None,
    base_output: Tensor | None,
    *others: tuple[str, Tensor, Sequence[int]],
) -> None:
    """The frozen linear's arguments and `others` (name, tensor, shape) are like x."""
    wanted = list(others)
    if base_output is None:
        wanted.append(("weight", weight, (out_features, x.shape[-1])))
        if bias is not None:
            wanted.append(("bias", bias, (out_features,)))
    elif weight is not None or bias is not None:
        raise ValueError("base_output: replaces weight and bias; pass either, not both")
    else:
        wanted.append(("base_output", base_output, (*x.shape[:-1], out_features)))
    dtype, device = x.dtype, x.device
    for name, t, size in wanted:
        check_tensor(name, t)
        if t.shape != size:
            raise ValueError(f"{name}: wanted shape {list(size)}, got {list(t.shape)}")
        if t.dtype != dtype:
            raise TypeError(
                f"{name}: wanted dtype {dtype} like x, got {t.dtype}; cast it or use autocast"
            )
        if t.device != device:
            raise ValueError(f"{name}: wanted device {device} like x, got {t.device}")


def check_floating(name: str, t: Tensor, device: torch.device) -> None:
    check_tensor(name, t)
    if not t.is_floating_point():
        raise TypeError(f"{name}: wanted a floating-point dtype, got {t.dtype}")
    if t.device != device:
        raise ValueError(f"{name}: wanted device {device} like x, got {t.device}")


def check_top_k(top_k: int, num_experts: int) -> None:
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k: wanted an int in 1..num_experts={num_experts}, got {top_k!r}")


def check_finite(name: str, value: float) -> None:
    if not is_number(value) or not -math.inf < value < math.inf:
        raise ValueError(f"{name}: wanted a finite number, got {value!r}")


def check_dropout(dropout: float, dropout_mode: str = "token") -> None:
    if not is_number(dropout) or not 0 <= dropout < 1:
        raise ValueError(f"dropout: wanted a probability in [0, 1), got {dropout!r}")
    if dropout_mode not in DROPOUT_MODES:
        raise ValueError(f"dropout_mode: wanted one of {DROPOUT_MODES}, got {dropout_mode!r}")


def check_seed(seed: Tensor | None, dropout: float, device: torch.device) -> None:
    if dropout <= 0:
        return
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.numel() != 1:
        got = f"{seed.dtype} {shape(seed)}" if isinstance(seed, Tensor) else shape(seed)
        raise ValueError(f"seed: wanted an int64 tensor of one element, as dropout > 0, got {got}")
    if seed.device != device:
        raise ValueError(f"seed: wanted device {device} like x, got {seed.device}")


def check_one_of(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: wanted one of {tuple(choices)}, got {value!r}")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def shape(t: Any) -> str:
    return str(list(t.shape)) if isinstance(t, Tensor) else type(t).__name__


# ---------------------------------------------------------------- weights per token or row


class Weights(NamedTuple):
    """Weights as the operators take them.

    Attributes:
        table: ``[rows, columns]``, contiguous, in the accumulator's dtype.
        row_map: int32 ``[T]``, or None where T / rows consecutive tokens share a row.
    """

    table: Tensor
    row_map: Tensor | None


def row_weights(
    name: str, weights: Tensor, x: Tensor, row_map: Tensor | None, columns: Sequence[int]
) -> Weights:
    """Check `weights` and bring them into the operators' form.

    Args:
        name: of the argument, for messages.
        weights: ``[..., *columns]`` with x's leading dimensions, per token; or ``[batch,
            *columns]`` for x ``[batch, length, K]``, per sequence; or ``[rows, *columns]`` with
            `row_map`.
        x: ``[..., K]``.
        row_map: int32 ``[T]``, or x's leading dimensions, values in [0, rows).
        columns: trailing sizes.
    """
    wide = ops.accumulator_dtype(x.dtype)
    if row_map is None and weights.dtype == wide and weights.shape == (*x.shape[:-1], *columns):
        # The usual case in the fewest steps.
        is_table = weights.dim() == 2 and len(columns) == 1
        table = weights if is_table else weights.reshape(-1, math.prod(columns))
        return Weights(table.contiguous(), None)
    check_floating(name, weights, x.device)
    columns = tuple(columns)
    leading, trailing = weights.shape[: -len(columns)], weights.shape[-len(columns) :]
    if trailing != columns:
        raise ValueError(f"{name}: wanted last dimensions {list(columns)}, got {shape(weights)}")
    if row_map is not None:
        check_row_map(row_map, x)
        if len(leading) != 1:
            raise ValueError(
                f"{name}: wanted one leading dimension, the rows of row_map, got {shape(weights)}"
            )
        if leading[0] == 0 and row_map.numel():
            raise ValueError(f"{name}: wanted at least one row for row_map, got {shape(weights)}")
        row_map = row_map.reshape(-1).contiguous()
        if not torch.compiler.is_compiling() and x.device.type == "cpu" and row_map.numel():
            least, most = int(row_map.min()), int(row_map.max())
            if least < 0 or most >= leading[0]:
                raise ValueError(
                    f"row_map: wanted values in 0..{leading[0] - 1}, the rows of {name}, got"
                    f" {least}..{most}"
                )
    elif leading != x.shape[:-1] and not (x.dim() == 3 and leading == x.shape[:1]):
        wanted = f"{[*x.shape[:-1], *columns]} (per token)"
        if x.dim() == 3:
            wanted += f" or {[x.shape[0], *columns]} (per sequence)"
        raise ValueError(f"{name}: wanted shape {wanted}, got {shape(weights)}")
    flat = weights.reshape(math.prod(leading), math.prod(columns))
    return Weights(flat.to(wide).contiguous(), row_map)


def check_row_map(row_map: Tensor, x: Tensor) -> None:
    if not isinstance(row_map, Tensor) or row_map.dtype != torch.int32:
        got = row_map.dtype if isinstance(row_map, Tensor) else type(row_map).__name__
        raise TypeError(f"row_map: wanted an int32 tensor, got {got}")
    tokens = math.prod(x.shape[:-1])
    if row_map.shape not in ((tokens,), x.shape[:-1]):
        raise ValueError(
            f"row_map: wanted shape [{tokens}], one row per token, got {shape(row_map)}"
        )
    if row_map.device != x.device:
        raise ValueError(f"row_map: wanted device {x.device} like x, got {row_map.device}")


def expert_scales(scale: float | Tensor, num_experts: int, x: Tensor) -> float | Tensor:
    """`scale` as a number, or one per expert: ``[E]`` in the accumulator's dtype."""
    if is_number(scale):
        check_finite("scale", scale)
        return scale
    if not isinstance(scale, Tensor):
        try:
            scale = torch.tensor([float(s) for s in scale], dtype=torch.float64, device=x.device)
        except (TypeError, ValueError):
            raise TypeError(f"scale: wanted a number or one per expert, got {scale!r}") from None
    check_floating("scale", scale, x.device)
    if scale.shape != (num_experts,):
        raise ValueError(f"scale: wanted a number or shape [{num_experts}], got {shape(scale)}")
    return scale.to(ops.accumulator_dtype(x.dtype))


# ---------------------------------------------------------------- running


def run_mixture(
    mixture: Callable[..., tuple[Tensor, ...]],
    function: type[torch.autograd.Function],
    backend: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base_output: Tensor | None,
    out_features: int,
    *arguments,
) -> tuple[Tensor, ...]:
    """Run a mixture of ``autograd.py``: y ``[..., N]``, then what else it returns, if anything."""
    check_bias(weight, bias, base_output)
    # The kernels walk rows: a contiguous x goes as it is, sparing a view on either side.
    rows = x
    if not x.is_contiguous():
        rows = x.reshape(-1, x.shape[-1])
        if rows.stride(-1) != 1:
            rows = rows.contiguous()
        if base_output is not None:
            base_output = base_output.reshape(rows.shape[0], out_features)
    on_cpu = backend == "cpu"
    base_product = ops.LIBRARY
    if on_cpu and weight is not None:
        base_product = extension.base_product(x, weight)
    # The adapter first and the library's GEMM with beta = 1 on top is free in float32, while on a
    # CPU it costs 1 % in bfloat16 (docs/design.md).
    library = base_product == ops.LIBRARY
    expand_first = library and (x.dtype == torch.float32 or not on_cpu or _is_watched())
    if bias is not None:
        bias = bias.contiguous()
    # Outside autograd its bookkeeping is a tenth of what a single token costs.
    run = function.apply if torch.is_grad_enabled() else mixture
    results = run(rows, weight, bias, base_output, expand_first, base_product, backend, *arguments)
    if isinstance(results, Tensor):  # a function with one output returns it bare
        results = (results,)
    if rows is x:
        return results
    y, *others = results
    return y.view(*x.shape[:-1], y.shape[-1]), *others


def _is_watched() -> bool:
    """Whether somebody may keep what the library computes, as selective checkpointing does.

    We would add to it in place, and to what was kept again when the forward pass is run again.
    """
    return not torch.compiler.is_compiling() and is_in_torch_dispatch_mode()


def backend_for(x: Tensor, mix: str = "") -> str:
    """Name of the back end that runs a mix, or the products alone, for x."""
    return backends.choose(x.device, x.dtype, mix)
