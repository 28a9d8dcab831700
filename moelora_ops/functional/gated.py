"""Experts with given weights as a stateless function: LoRA, PEMT, OrchMoE's sum, external gates."""

from collections.abc import Sequence

from torch import Tensor

from .. import ops, reference
from ..autograd import GatedMixture, gated_mixture
from . import common


def gated(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_down: Tensor,
    lora_up: Tensor,
    weights: Tensor,
    scale: float | Tensor | Sequence[float] = 1.0,
    *,
    activation: str | None = None,
    row_map: Tensor | None = None,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    base_output: Tensor | None = None,
) -> Tensor:
    """A frozen linear plus experts whose weights are given per token, sequence or task.

    In PyTorch, for weights per token::

        hidden = [activation(dropout(x) @ lora_down[e].T + down_bias[e]) for e in range(E)]
        y = F.linear(x, weight, bias)
        y += sum(scale * weights[..., e, None] * (hidden[e] @ lora_up[e] + up_bias[e]) for e in ...)

    Args:
        x: ``[..., K]``; float32, bfloat16, float16 or float64, any leading shape, also empty.
        weight: ``[N, K]`` or None if `base_output` is given.  Gets a gradient if it requires one.
        bias: ``[N]`` or None.
        lora_down: ``[E, r, K]``.
        lora_up: ``[E, r, N]``.
        weights: ``[..., E]`` with x's leading dimensions, per token; or ``[batch, E]`` for x
            ``[batch, length, K]``, per sequence; or ``[rows, E]`` with `row_map`.  Any floating
            dtype; never rounded to 16 bits.
        scale: one number, or ``[E]``.
        activation: φ between the factors: None, ``"relu"``, ``"gelu"`` (erf) or ``"gelu_tanh"``.
        row_map: int32 ``[T]`` or x's leading dimensions, the row of `weights` that each token
            reads: packed batches, tasks.
        down_bias: ``[E, r]``, added before the activation.
        up_bias: ``[E, N]``, weighted like its expert.
        dropout: probability of dropping an expert's input, in [0, 1), in steps of 2**-16; one mask
            per token and feature, shared by the experts.
        seed: int64 tensor of one element on x's device; the same seed gives the same mask on every
            back end.  Required if dropout > 0.
        base_output: ``[..., N]``, output of a frozen layer that is not a plain linear; replaces
            weight and bias.

    Returns:
        y ``[..., N]`` in x's dtype; differentiable with respect to every floating-point tensor.

    Under autocast all of them but `weights` and `scale` are cast to the autocast dtype first.
    Frozen experts cost no weight gradient and x is not kept for them.

    Raises:
        TypeError: an argument has another dtype than x, or is no tensor.
        ValueError: a shape, device or value is out of range; the message names the argument.
        RuntimeError: a back end was forced that cannot run here.
    """
    low = common.autocast_dtype(x)
    if low is not None:
        x, weight, bias, lora_down, lora_up, down_bias, up_bias, base_output = common.autocast(
            low, x, weight, bias, lora_down, lora_up, down_bias, up_bias, base_output
        )
    arguments = (
        x, weight, bias, lora_down, lora_up, weights, scale, activation, row_map, down_bias,
        up_bias, dropout, seed, base_output,
    )  # fmt: skip
    try:
        return _run(*arguments)
    except Exception as error:
        failure = error
    _check(*arguments)
    raise failure


def _run(
    x, weight, bias, lora_down, lora_up, weights, scale, activation, row_map, down_bias, up_bias,
    dropout, seed, base_output,
):  # fmt: skip
    num_experts = lora_down.shape[0]
    if not num_experts:
        raise ValueError("lora_down: wanted at least one expert, got E = 0")
    common.check_dropout(dropout)
    table, rows = common.row_weights("weights", weights, x, row_map, (num_experts,))
    scale = common.expert_scales(scale, num_experts, x)
    backend = common.backend_for(x, "gated")
    if backend == "reference":
        _check(
            x, weight, bias, lora_down, lora_up, weights, scale, activation, row_map, down_bias,
            up_bias, dropout, seed, base_output,
        )  # fmt: skip
        with reference.no_autocast(x.device.type):
            return reference.gated(
                x, weight, bias, lora_down, lora_up, weights, scale, activation=activation,
                row_map=row_map, down_bias=down_bias, up_bias=up_bias, dropout=dropout, seed=seed,
                base_output=base_output,
            )  # fmt: skip
    if isinstance(scale, Tensor):
        table, scale = table * scale, 1.0
    y, *_ = common.run_mixture(
        gated_mixture, GatedMixture, backend, x, weight, bias, base_output, lora_up.shape[-1],
        lora_down.contiguous(), None if down_bias is None else down_bias.contiguous(),
        lora_up.contiguous(), None if up_bias is None else up_bias.contiguous(), table, rows, seed,
        float(scale), ops.ACTIVATIONS[activation], dropout,
    )  # fmt: skip
    return y


def _check(
    x, weight, bias, lora_down, lora_up, weights, scale, activation, row_map, down_bias, up_bias,
    dropout, seed, base_output,
) -> None:  # fmt: skip
    num_experts, rank, _, out_features = common.check_experts(x, lora_down, lora_up)
    biases = [("down_bias", down_bias, (num_experts, rank))] if down_bias is not None else []
    if up_bias is not None:
        biases.append(("up_bias", up_bias, (num_experts, out_features)))
    common.check_tensors(
        x, out_features, weight, bias, base_output, ("lora_down", lora_down, lora_down.shape),
        ("lora_up", lora_up, lora_up.shape), *biases,
    )  # fmt: skip
    common.check_one_of("activation", activation, common.ACTIVATIONS)
    common.check_dropout(dropout)
    common.check_seed(seed, dropout, x.device)
    common.check_floating("weights", weights, x.device)
    common.row_weights("weights", weights, x, row_map, (num_experts,))
    common.expert_scales(scale, num_experts, x)
