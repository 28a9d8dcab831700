"""The methods as stateless functions: validate, apply autocast, run the chosen back end."""

import math

import torch
from torch import Tensor

from . import backends, ops, reference
from .autograd import TopkMixture, topk_mixture
from .backends import extension
from .reference import Routing

__all__ = ["Routing", "mola"]

DROPOUT_MODES = ("token", "expert")


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
            ``"auto"`` decides from E and k.
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
    device_type = x.device.type if isinstance(x, Tensor) else "cpu"
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        low = torch.get_autocast_dtype(device_type)
        x, weight, bias, lora_down, lora_up, router, base_output = (
            _autocast(t, low) for t in (x, weight, bias, lora_down, lora_up, router, base_output)
        )
    _check_mola(
        x, weight, bias, lora_down, lora_up, router, top_k, scale, dropout, dropout_mode, seed,
        base_output, strategy,
    )  # fmt: skip
    backend = backends.choose(x.device, x.dtype)
    if backend == "reference":
        with reference.no_autocast(device_type):
            y, routing = reference.mola(
                x, weight, bias, lora_down, lora_up, router, top_k, scale, renormalize,
                dropout=dropout, dropout_mode=dropout_mode, seed=seed, base_output=base_output,
            )  # fmt: skip
        return (y, routing) if return_routing else y

    # The kernels walk rows: a contiguous x goes as it is, sparing a view on either side.
    rows = x
    if not x.is_contiguous():
        rows = x.reshape(-1, x.shape[-1])
        if rows.stride(-1) != 1:
            rows = rows.contiguous()
        if base_output is not None:
            base_output = base_output.reshape(rows.shape[0], lora_up.shape[2])
    tokens = x.numel() // x.shape[-1] if x.shape[-1] else 0
    small = tokens <= extension.small_linear_tokens(x.dtype) and weight is not None
    small_base = small and weight.stride(-1) == 1
    # The adapter first and the base GEMM with beta = 1 on top is free in float32, while it costs
    # 1 % in bfloat16 (docs/design.md).
    expand_first = not small and x.dtype == torch.float32
    if bias is not None:
        bias = bias.contiguous()
    arguments = (
        rows, weight, bias, base_output, lora_down.contiguous(), lora_up.contiguous(),
        router.contiguous(), seed, expand_first, small_base, top_k, scale, renormalize, dropout,
        dropout_mode == "expert", ops.is_stacked(strategy, lora_down.shape[0], top_k),
    )  # fmt: skip
    # Outside autograd its bookkeeping is a tenth of what a single token costs.
    run = TopkMixture.apply if torch.is_grad_enabled() else topk_mixture
    y, *_, counts, prob_sums = run(*arguments)
    if rows is not x:
        y = y.view(*x.shape[:-1], y.shape[-1])
    return (y, Routing(counts, prob_sums)) if return_routing else y


def _autocast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if t is None or not t.is_floating_point() or t.dtype == torch.float64:
        return t
    return t.to(dtype)


def _check_mola(
    x, weight, bias, lora_down, lora_up, router, top_k, scale, dropout, dropout_mode, seed,
    base_output, strategy,
) -> None:  # fmt: skip
    """Every contract of :func:`mola`; the kernels trust it."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: wanted a tensor, got {type(x).__name__}")
    if x.dim() == 0:
        raise ValueError("x: wanted shape [..., in_features], got a scalar")
    if not x.is_floating_point():
        raise TypeError(f"x: wanted a floating-point dtype, got {x.dtype}")
    if not isinstance(lora_down, Tensor) or lora_down.dim() != 3:
        raise ValueError(f"lora_down: wanted shape [E, r, in_features], got {_shape(lora_down)}")
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
            f"lora_up: wanted shape [{num_experts}, {rank}, out_features], got {_shape(lora_up)}"
        )
    out_features = lora_up.shape[2]
    wanted = [
        ("lora_down", lora_down, lora_down.shape),
        ("lora_up", lora_up, lora_up.shape),
        ("router", router, (num_experts, in_features)),
    ]
    if base_output is None:
        wanted.append(("weight", weight, (out_features, in_features)))
        if bias is not None:
            wanted.append(("bias", bias, (out_features,)))
    elif weight is not None or bias is not None:
        raise ValueError("base_output: replaces weight and bias; pass either, not both")
    else:
        wanted.append(("base_output", base_output, (*x.shape[:-1], out_features)))
    dtype, device = x.dtype, x.device
    for name, t, shape in wanted:
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: wanted a tensor, got {type(t).__name__}")
        if t.shape != shape:
            raise ValueError(f"{name}: wanted shape {list(shape)}, got {list(t.shape)}")
        if t.dtype != dtype:
            raise TypeError(
                f"{name}: wanted dtype {dtype} like x, got {t.dtype}; cast it or use autocast"
            )
        if t.device != device:
            raise ValueError(f"{name}: wanted device {device} like x, got {t.device}")
    check_top_k(top_k, num_experts)
    check_finite("scale", scale)
    check_dropout(dropout, dropout_mode)
    if dropout > 0:
        if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.numel() != 1:
            got = f"{seed.dtype} {_shape(seed)}" if isinstance(seed, Tensor) else _shape(seed)
            raise ValueError(
                f"seed: wanted an int64 tensor of one element, as dropout > 0, got {got}"
            )
        if seed.device != x.device:
            raise ValueError(f"seed: wanted device {x.device} like x, got {seed.device}")
    if strategy not in ops.STRATEGIES:
        raise ValueError(f"strategy: wanted one of {ops.STRATEGIES}, got {strategy!r}")


def check_top_k(top_k: int, num_experts: int) -> None:
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k: wanted an int in 1..num_experts={num_experts}, got {top_k!r}")


def check_finite(name: str, value: float) -> None:
    if not _is_number(value) or not -math.inf < value < math.inf:
        raise ValueError(f"{name}: wanted a finite number, got {value!r}")


def check_dropout(dropout: float, dropout_mode: str) -> None:
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise ValueError(f"dropout: wanted a probability in [0, 1), got {dropout!r}")
    if dropout_mode not in DROPOUT_MODES:
        raise ValueError(f"dropout_mode: wanted one of {DROPOUT_MODES}, got {dropout_mode!r}")


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shape(t) -> str:
    return str(list(t.shape)) if isinstance(t, Tensor) else type(t).__name__
