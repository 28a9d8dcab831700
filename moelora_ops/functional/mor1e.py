"""Intuition-MoR1E as a stateless function."""

from torch import Tensor

from .. import reference
from ..autograd import GridMixture, grid_mixture
from . import common

MODES = ("grid", "rank1")


def mor1e(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_down: Tensor,
    lora_up: Tensor,
    router: Tensor,
    omega: Tensor,
    beta: Tensor,
    intuition: Tensor | None,
    token_scale: float = 32.0,
    task_scale: float = 4.0,
    *,
    mode: str = "grid",
    row_map: Tensor | None = None,
    base_output: Tensor | None = None,
) -> Tensor:
    """A frozen linear plus a grid of rank-1 experts (Intuition-MoR1E, 2404.08985, authors' code).

    In PyTorch, for ``mode="grid"``::

        o, b = sigmoid(100 * omega), sigmoid(100 * beta)
        gates = token_scale * o * softmax(x.float() @ router.float().T) \\
            + task_scale * (1 - o) * intuition
        hidden = einsum("ti,tij->tj", x @ lora_down.T, gates.unflatten(-1, (r1, r2)))
        y = F.linear(x, weight, bias) + b * hidden @ lora_up

    Args:
        x: ``[..., K]``; float32, bfloat16, float16 or float64, any leading shape, also empty.
        weight: ``[N, K]`` or None if `base_output` is given.  Gets a gradient if it requires one.
        bias: ``[N]`` or None.
        lora_down: ``[r1, K]``.
        lora_up: ``[r2, N]``.
        router: ``[gates, K]``, gates = r1 * r2; in ``"rank1"`` mode r1 = r2 = gates.  Logits,
            softmax and gates are float32 (float64 for float64 x), never rounded to 16 bits.
        omega, beta: one element each, before ``sigmoid(100 ·)``.
        intuition: ``[batch, gates]`` for x ``[batch, length, K]``, per sequence; ``[..., gates]``
            with x's leading dimensions, per token; ``[rows, gates]`` with `row_map`; None is zero.
        token_scale, task_scale: of the token's and the sequence's part; 32 and 4 in the authors'
            code, whatever the number of gates.
        mode: ``"grid"``, any down row with any up row; ``"rank1"``, row i with row i.
        row_map: int32 ``[T]`` or x's leading dimensions, the row of `intuition` that each token
            reads.
        base_output: ``[..., N]``, output of a frozen layer that is not a plain linear; replaces
            weight and bias.

    Returns:
        y ``[..., N]`` in x's dtype; differentiable with respect to every floating-point tensor.

    Under autocast all of them but `intuition` are cast to the autocast dtype first.

    Raises:
        TypeError: an argument has another dtype than x, or is no tensor.
        ValueError: a shape, device or value is out of range; the message names the argument.
        RuntimeError: a back end was forced that cannot run here.
    """
    low = common.autocast_dtype(x)
    if low is not None:
        x, weight, bias, lora_down, lora_up, router, omega, beta, base_output = common.autocast(
            low, x, weight, bias, lora_down, lora_up, router, omega, beta, base_output
        )
    arguments = (
        x, weight, bias, lora_down, lora_up, router, omega, beta, intuition, token_scale,
        task_scale, mode, row_map, base_output,
    )  # fmt: skip
    try:
        return _run(*arguments)
    except Exception as error:
        failure = error
    _check(*arguments)
    raise failure


def _run(
    x, weight, bias, lora_down, lora_up, router, omega, beta, intuition, token_scale, task_scale,
    mode, row_map, base_output,
):  # fmt: skip
    common.check_one_of("mode", mode, MODES)
    common.check_finite("token_scale", token_scale)
    common.check_finite("task_scale", task_scale)
    table = rows_of = None
    if intuition is not None:
        table, rows_of = common.row_weights("intuition", intuition, x, row_map, (router.shape[0],))
    backend = common.backend_for(x, "grid")
    if backend == "reference":
        _check(
            x, weight, bias, lora_down, lora_up, router, omega, beta, intuition, token_scale,
            task_scale, mode, row_map, base_output,
        )  # fmt: skip
        with reference.no_autocast(x.device.type):
            return reference.mor1e(
                x, weight, bias, lora_down, lora_up, router, omega, beta, intuition, token_scale,
                task_scale, mode=mode, row_map=row_map, base_output=base_output,
            )  # fmt: skip
    y, *_ = common.run_mixture(
        grid_mixture, GridMixture, backend, x, weight, bias, base_output, lora_up.shape[-1],
        lora_down.contiguous(), lora_up.contiguous(), router.contiguous(), omega, beta, table,
        rows_of, float(token_scale), float(task_scale), mode == "rank1",
    )  # fmt: skip
    return y


def _check(
    x, weight, bias, lora_down, lora_up, router, omega, beta, intuition, token_scale, task_scale,
    mode, row_map, base_output,
) -> None:  # fmt: skip
    common.check_one_of("mode", mode, MODES)
    common.check_input(x)
    for name, rows, columns in (("lora_down", lora_down, "in"), ("lora_up", lora_up, "out")):
        if not isinstance(rows, Tensor) or rows.dim() != 2 or not len(rows):
            raise ValueError(
                f"{name}: wanted shape [r, {columns}_features] with r of at least 1, got"
                f" {common.shape(rows)}"
            )
    r1, in_features = lora_down.shape
    r2, out_features = lora_up.shape
    if x.shape[-1] != in_features:
        raise ValueError(
            f"x: wanted last dimension {in_features} like lora_down's, got {x.shape[-1]}"
        )
    if mode == "rank1" and r1 != r2:
        raise ValueError(f"lora_up: wanted {r1} rows like lora_down, as mode is 'rank1', got {r2}")
    gates = r1 if mode == "rank1" else r1 * r2
    for name, scalar in (("omega", omega), ("beta", beta)):
        if isinstance(scalar, Tensor) and scalar.numel() != 1:
            raise ValueError(f"{name}: wanted one element, got {common.shape(scalar)}")
    common.check_tensors(
        x, out_features, weight, bias, base_output, ("lora_down", lora_down, lora_down.shape),
        ("lora_up", lora_up, lora_up.shape), ("router", router, (gates, in_features)),
        ("omega", omega, getattr(omega, "shape", ())), ("beta", beta, getattr(beta, "shape", ())),
    )  # fmt: skip
    common.check_finite("token_scale", token_scale)
    common.check_finite("task_scale", task_scale)
    if intuition is not None:
        common.check_floating("intuition", intuition, x.device)
        common.row_weights("intuition", intuition, x, row_map, (gates,))
