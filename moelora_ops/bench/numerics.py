"""Error budgets: an implementation may err twice as much as plain PyTorch of the same dtype does.

All errors are against the float64 reference on the same rounded inputs, so there is no hand-tuned
tolerance.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

# What a call computes: y; y and dx, nothing being trained; y, dx and all parameters' gradients.
FORWARD, DX, TRAIN = "forward", "dx", "train"


class NumericsError(AssertionError):
    """An implementation exceeds its error budget."""


class InputsError(ValueError):
    """There are no inputs on which all right implementations must agree."""


class Error(NamedTuple):
    """Distance from the reference.

    Attributes:
        rms: root mean square of the difference over that of the reference.
        max: largest difference over the largest reference value; one wrong element shows here.
    """

    rms: float
    max: float


def run(
    layer: nn.Module, x: Tensor, dy: Tensor | None = None, direction: str = TRAIN
) -> dict[str, Tensor]:
    """Output of `layer` and the gradients that `direction` asks for.

    Returns:
        y; unless ``"forward"`` dx; for ``"train"`` d<parameter name> of all that is trainable.
        ``.grad`` of all of them is left alone.
    """
    if direction == FORWARD:
        with torch.no_grad():
            return {"y": layer(x)}
    x = x.detach().requires_grad_()
    named = {name.split(".")[-1]: p for name, p in layer.named_parameters() if p.requires_grad}
    if direction == DX:
        named = {}
    y = layer(x)
    gradients = torch.autograd.grad(y, (x, *named.values()), dy)
    return {"y": y.detach()} | dict(zip(("dx", *(f"d{n}" for n in named)), gradients, strict=True))


def error(got: Tensor, want: Tensor) -> Error:
    """How far `got` is from the float64 `want`; infinite if not finite or of another shape."""
    if got.shape != want.shape or not got.isfinite().all():
        return Error(float("inf"), float("inf"))
    if not got.numel():
        return Error(0.0, 0.0)
    difference = got.double() - want
    rms, largest = want.square().mean().sqrt().item(), want.abs().max().item()
    if rms < 1e-12:
        # Rounding noise of a gradient that vanishes (the router's at top_k = 1): no scale but that
        # of the inputs.
        rms = largest = 1.0
    return Error(
        difference.square().mean().sqrt().item() / rms, difference.abs().max().item() / largest
    )


def budget(plain: Error, dtype: torch.dtype, factor: float = 2.0) -> Error:
    """`factor` times `plain`, which counts as no better than one rounding to `dtype`.

    The largest of some thousand errors scatters by a factor of two between right implementations:
    it gets that much more room than their root mean square.
    """
    ulp = torch.finfo(dtype).eps
    if dtype == torch.float64:
        ulp *= 64  # the reference is no closer to the truth: it sums a thousand rounded products
    return Error(factor * max(plain.rms, ulp / 12**0.5), 2 * factor * max(plain.max, ulp / 2))


def check_numerics(
    name: str,
    got: dict[str, Tensor],
    plain: dict[str, Tensor],
    want: dict[str, Tensor],
    factor: float = 2.0,
) -> dict[str, Error]:
    """Hold `got` to the budget that `plain` sets.

    Args:
        name: of the implementation, for the message.
        got: its output and gradients, from :func:`run`.
        plain: those of the plain implementation in the same dtype.
        want: those of the float64 reference.
        factor: how many times the error of `plain` is allowed; more for quantities of
            fewer than 64 numbers, up to eight times that for a scalar.

    Returns:
        The error of each quantity.

    Raises:
        NumericsError: a quantity is missing, of another dtype, or beyond its budget; the message
            lists all.
    """
    if got.keys() != want.keys():
        raise NumericsError(f"{name}: wanted {sorted(want)}, got {sorted(got)}")
    errors, wrong = {}, []
    for key, expected in want.items():
        dtype = plain[key].dtype
        if got[key].dtype != dtype:
            wrong.append(f"{key}: wanted {dtype}, got {got[key].dtype}")
            continue
        errors[key] = error(got[key], expected)
        # The errors of a few numbers say little about their size: plain may have been lucky.
        few = max(1.0, 8 / max(expected.numel(), 1) ** 0.5)
        limit = budget(error(plain[key], expected), dtype, few * factor)
        wrong += [
            f"{key}: {kind} error {e:.2e} beyond {at_most:.2e}"
            for kind, e, at_most in zip(Error._fields, errors[key], limit, strict=True)
            if not e <= at_most
        ]
    if wrong:
        raise NumericsError(f"{name}: {'; '.join(wrong)}")
    return errors
