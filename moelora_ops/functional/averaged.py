"""Experts whose factors are averaged: Polytropon, MHR and OrchMoE's average, stateless."""

from torch import Tensor

from .. import reference
from ..autograd import AveragedMixture, averaged_mixture
from . import common


def averaged(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_down: Tensor,
    lora_up: Tensor,
    weights: Tensor,
    scale: float = 1.0,
    *,
    row_map: Tensor | None = None,
    splits: int = 1,
    base_output: Tensor | None = None,
) -> Tensor:
    """A frozen linear plus one LoRA whose factors are weighted sums of the experts' factors.

    In PyTorch, for one token and ``splits=1``::

        down = sum(weights[e] * lora_down[e] for e in range(E))
        up = sum(weights[e] * lora_up[e] for e in range(E))
        y = F.linear(x, weight, bias) + scale * x @ down.T @ up

    With splits Q (multi-head routing) the features fall into Q equal segments, on either side, and
    segment q of `down`'s and `up`'s columns is summed with ``weights[..., q, :]``.

    Args:
        x: ``[..., K]``; float32, bfloat16, float16 or float64, any leading shape, also empty.
        weight: ``[N, K]`` or None if `base_output` is given.  Gets a gradient if it requires one.
        bias: ``[N]`` or None.
        lora_down: ``[E, r, K]``.
        lora_up: ``[E, r, N]``.
        weights: ``[..., E]``, or ``[..., splits, E]`` if `splits` is not 1; the leading dimensions
            are x's, per token; or ``[batch, E]`` for x ``[batch, length, K]``, per sequence; or
            ``[rows, E]`` with `row_map`.  Any floating dtype; never rounded to 16 bits.
        scale: of the product of the merged factors.
        row_map: int32 ``[T]`` or x's leading dimensions, the row of `weights` that each token
            reads.
        splits: Q, divides K and N.
        base_output: ``[..., N]``, output of a frozen layer that is not a plain linear; replaces
            weight and bias.

    Returns:
        y ``[..., N]`` in x's dtype; differentiable with respect to every floating-point tensor.

    Under autocast all of them but `weights` are cast to the autocast dtype first.

    Raises:
        TypeError: an argument has another dtype than x, or is no tensor.
        ValueError: a shape, device or value is out of range; the message names the argument.
        RuntimeError: a back end was forced that cannot run here.
    """
    low = common.autocast_dtype(x)
    if low is not None:
        x, weight, bias, lora_down, lora_up, base_output = common.autocast(
            low, x, weight, bias, lora_down, lora_up, base_output
        )
    arguments = (
        x, weight, bias, lora_down, lora_up, weights, scale, row_map, splits, base_output
    )  # fmt: skip
    try:
        return _run(*arguments)
    except Exception as error:
        failure = error
    _check(*arguments)
    raise failure


def _run(x, weight, bias, lora_down, lora_up, weights, scale, row_map, splits, base_output):
    num_experts = lora_down.shape[0]
    if not num_experts:
        raise ValueError("lora_down: wanted at least one expert, got E = 0")
    _check_splits(splits, lora_down.shape[-1], lora_up.shape[-1])
    columns = (num_experts,) if splits == 1 else (splits, num_experts)
    table, rows = common.row_weights("weights", weights, x, row_map, columns)
    common.check_finite("scale", scale)
    backend = common.backend_for(x, "averaged")
    if backend == "reference":
        _check(x, weight, bias, lora_down, lora_up, weights, scale, row_map, splits, base_output)
        with reference.no_autocast(x.device.type):
            return reference.averaged(
                x, weight, bias, lora_down, lora_up, weights, scale, row_map=row_map,
                splits=splits, base_output=base_output,
            )  # fmt: skip
    # One row for a whole sequence: its factors are merged once for all of its tokens.
    merged = row_map is None and weights.dim() - len(columns) < x.dim() - 1
    y, *_ = common.run_mixture(
        averaged_mixture, AveragedMixture, backend, x, weight, bias, base_output, lora_up.shape[-1],
        lora_down.contiguous(), lora_up.contiguous(), table, rows, splits, float(scale), merged,
    )  # fmt: skip
    return y


def _check(x, weight, bias, lora_down, lora_up, weights, scale, row_map, splits, base_output):
    num_experts, _, in_features, out_features = common.check_experts(x, lora_down, lora_up)
    common.check_tensors(
        x, out_features, weight, bias, base_output, ("lora_down", lora_down, lora_down.shape),
        ("lora_up", lora_up, lora_up.shape),
    )  # fmt: skip
    _check_splits(splits, in_features, out_features)
    columns = (num_experts,) if splits == 1 else (splits, num_experts)
    common.check_floating("weights", weights, x.device)
    common.row_weights("weights", weights, x, row_map, columns)
    common.check_finite("scale", scale)


def _check_splits(splits: int, in_features: int, out_features: int) -> None:
    if isinstance(splits, bool) or not isinstance(splits, int) or splits < 1:
        raise ValueError(f"splits: wanted an int of at least 1, got {splits!r}")
    if in_features % splits or out_features % splits:
        raise ValueError(
            f"splits: wanted a divisor of in_features={in_features} and"
            f" out_features={out_features}, got {splits}"
        )
