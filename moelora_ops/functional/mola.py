"""MoLA as a stateless function."""

from torch import Tensor

from .. import ops, reference
from ..autograd import TopkMixture, topk_mixture
from ..backends.strategy import is_stacked
from ..reference import Routing
from . import common


def mola(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_down: Tensor,
    lora_up: Tensor,
    router: Tensor,
    top_k: int,
    scale: float,
    renormalize: bool = True,
    *,
    dropout: float = 0.0,
    dropout_mode: str = "token",
    seed: Tensor | None = None,
    base_output: Tensor | None = None,
    strategy: str = "auto",
    return_routing: bool = False,
) -> Tensor | tuple[Tensor, Routing]:
    """A frozen linear plus a top-k routed mixture of LoRA experts (MoLA, 2402.08562, eqs. 3-4).

    In PyTorch::

        p = softmax(x.float() @ router.float().T)
        w, e = p.topk(top_k); w = w / w.sum(-1, keepdim=True)
        y = F.linear(x, weight, bias)
        y[t] += scale * sum(w[t, s] * dropout(x[t]) @ lora_down[e[t, s]].T @ lora_up[e[t, s]])

    Args:
        x: ``[..., K]``; float32, bfloat16, float16 or float64, any leading shape, also empty.
        weight: ``[N, K]`` or None if `base_output` is given.  Gets a gradient if it requires one.
        bias: ``[N]`` or None.
        lora_down: ``[E, r, K]``.
        lora_up: ``[E, r, N]``.
        router: ``[E, K]``; logits, softmax and weights are float32 (float64 for float64 x) and are
            never rounded to 16 bits.  Ties go to the lower index.
        top_k: experts per token, 1..E.
        scale: alpha / r.
        renormalize: divide the chosen probabilities by their sum (the paper).  With ``top_k=1``
            that is the constant 1 and the router gets no gradient from y; pass False for a
            Switch-style gate (our choice).
        dropout: probability of dropping an expert's input, in [0, 1), in steps of 2**-16.  The
            router sees the undropped input.
        dropout_mode: ``"token"`` one mask per token and feature, shared by the experts (our choice,
            cheaper); ``"expert"`` an independent mask per expert (the authors' code).
        seed: int64 tensor of one element on x's device; the same seed gives the same mask on every
            back end.  Required if dropout > 0.
        base_output: ``[..., N]``, output of a frozen layer that is not a plain linear; replaces
            weight and bias.
        strategy: ``"stacked"`` computes every expert, ``"grouped"`` only the chosen ones,
            ``"auto"`` decides from E, r, k and the dtype (:mod:`moelora_ops.backends.strategy`).
        return_routing: also return the :class:`Routing` by-products.

    Returns:
        y ``[..., N]`` in x's dtype, or ``(y, routing)``.

    Under autocast all floating-point arguments are cast to the autocast dtype first.  A token with
    a NaN or +inf logit, or without a finite one, still selects `top_k` existing experts; its output
    row is NaN and no other row changes.  Beside finite logits, -inf is a probability of zero.

    Raises:
        TypeError: an argument has another dtype than x, or is no tensor.
        ValueError: a shape, device or value is out of range; the message names the argument.
        RuntimeError: a back end was forced that cannot run here.
    """
    low = common.autocast_dtype(x)
    if low is not None:
        x, weight, bias, lora_down, lora_up, router, base_output = common.autocast(
            low, x, weight, bias, lora_down, lora_up, router, base_output
        )
    arguments = (
        x, weight, bias, lora_down, lora_up, router, top_k, scale, renormalize, dropout,
        dropout_mode, seed, base_output, strategy,
    )  # fmt: skip
    try:
        y, routing = _run(*arguments)
    except Exception as error:
        failure = error
    else:
        return (y, routing) if return_routing else y
    _check(*arguments)
    raise failure


def _run(
    x, weight, bias, lora_down, lora_up, router, top_k, scale, renormalize, dropout, dropout_mode,
    seed, base_output, strategy,
):  # fmt: skip
    num_experts, rank, _ = lora_down.shape
    common.check_top_k(top_k, num_experts)
    common.check_finite("scale", scale)
    common.check_dropout(dropout, dropout_mode)
    backend = common.backend_for(x, "topk")
    if backend == "reference":
        _check(
            x, weight, bias, lora_down, lora_up, router, top_k, scale, renormalize, dropout,
            dropout_mode, seed, base_output, strategy,
        )  # fmt: skip
        with reference.no_autocast(x.device.type):
            return reference.mola(
                x, weight, bias, lora_down, lora_up, router, top_k, scale, renormalize,
                dropout=dropout, dropout_mode=dropout_mode, seed=seed, base_output=base_output,
            )  # fmt: skip
    common.check_one_of("strategy", strategy, ops.STRATEGIES)
    y, *_, counts, prob_sums = common.run_mixture(
        topk_mixture, TopkMixture, backend, x, weight, bias, base_output, lora_up.shape[-1],
        lora_down.contiguous(), lora_up.contiguous(), router.contiguous(), seed, top_k, scale,
        renormalize, dropout, dropout_mode == "expert",
        is_stacked(backend, strategy, num_experts, rank, top_k, x.dtype),
    )  # fmt: skip
    return y, Routing(counts, prob_sums)


def _check(
    x, weight, bias, lora_down, lora_up, router, top_k, scale, renormalize, dropout, dropout_mode,
    seed, base_output, strategy,
) -> None:  # fmt: skip
    num_experts, _, in_features, out_features = common.check_experts(x, lora_down, lora_up)
    common.check_tensors(
        x, out_features, weight, bias, base_output, ("lora_down", lora_down, lora_down.shape),
        ("lora_up", lora_up, lora_up.shape), ("router", router, (num_experts, in_features)),
    )  # fmt: skip
    common.check_top_k(top_k, num_experts)
    common.check_finite("scale", scale)
    common.check_dropout(dropout, dropout_mode)
    common.check_seed(seed, dropout, x.device)
    common.check_one_of("strategy", strategy, ops.STRATEGIES)
