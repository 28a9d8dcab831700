"""Every operator's schema, fake and dispatch, in one place.

The schemas live here and not in C++, so that the package imports, traces and falls back without its
compiled part.  Kernels only add implementations: the CPU extension through the stable ABI when it
is loaded.

An operator is one direction of the skeleton *shrink -> mix -> expand* with one mix.  The frozen
linear itself stays outside, since the library's GEMM often is the better one; beside it there are
two operators for all mixes.  `y` and `dx` are written in place because they are the base product's
output or its accumulator, and a second [T, N] buffer would cost more than the adapter.

Letters: T tokens, K in_features, N out_features, E experts, r rank, k top-k.
"""

import functools
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

# Back end -> the namespace of its operators.  The dispatch key alone cannot tell two sets of
# kernels for one device apart, so each has a namespace of its own, with the same schemas and fakes.
NAMESPACES = {"cpu": "moelora_ops", "cuda": "moelora_ops_cuda", "triton": "moelora_ops_triton"}

_SCHEMAS = {
    "topk_forward": (
        "(Tensor x, Tensor lora_down, Tensor lora_up, Tensor router, Tensor? bias,"
        " Tensor? seed, Tensor(a!) y, int top_k, float scale, bool renormalize, float dropout,"
        " bool dropout_per_expert, bool stacked, bool accumulate)"
        " -> (Tensor saved, Tensor counts, Tensor prob_sums)"
    ),
    "topk_backward": (
        "(Tensor dy, Tensor x, Tensor lora_down, Tensor lora_up, Tensor router,"
        " Tensor? seed, Tensor saved, Tensor? dprob_sums, Tensor(a!) dx, int top_k, float scale,"
        " bool renormalize, float dropout, bool dropout_per_expert, bool stacked, bool accumulate,"
        " bool need_dx, bool need_dparams)"
        " -> (Tensor dlora_down, Tensor dlora_up, Tensor drouter)"
    ),
    "gated_forward": (
        "(Tensor x, Tensor lora_down, Tensor? down_bias, Tensor lora_up, Tensor? up_bias,"
        " Tensor weights, Tensor? row_map, Tensor? bias, Tensor? seed, Tensor(a!) y, float scale,"
        " int activation, float dropout, bool accumulate) -> Tensor hidden"
    ),
    "gated_backward": (
        "(Tensor dy, Tensor x, Tensor lora_down, Tensor? down_bias, Tensor lora_up,"
        " Tensor? up_bias, Tensor weights, Tensor? row_map, Tensor? seed, Tensor hidden,"
        " Tensor(a!) dx, float scale, int activation, float dropout, bool accumulate, bool need_dx,"
        " bool need_dparams, bool need_dweights)"
        " -> (Tensor dlora_down, Tensor ddown_bias, Tensor dlora_up, Tensor dup_bias,"
        " Tensor dweights)"
    ),
    "grid_forward": (
        "(Tensor x, Tensor lora_down, Tensor lora_up, Tensor router, Tensor omega,"
        " Tensor beta, Tensor? intuition, Tensor? row_map, Tensor? bias, Tensor(a!) y,"
        " float token_scale, float task_scale, bool diagonal, bool accumulate) -> Tensor hidden"
    ),
    "grid_backward": (
        "(Tensor dy, Tensor x, Tensor lora_down, Tensor lora_up, Tensor router,"
        " Tensor omega, Tensor beta, Tensor? intuition, Tensor? row_map, Tensor hidden,"
        " Tensor(a!) dx, float token_scale, float task_scale, bool diagonal, bool accumulate,"
        " bool need_dx, bool need_dparams, bool need_dintuition)"
        " -> (Tensor dlora_down, Tensor dlora_up, Tensor drouter, Tensor domega, Tensor dbeta,"
        " Tensor dintuition)"
    ),
    "averaged_forward": (
        "(Tensor x, Tensor lora_down, Tensor lora_up, Tensor weights, Tensor? row_map,"
        " Tensor? bias, Tensor(a!) y, int splits, float scale, bool merged, bool accumulate)"
        " -> Tensor hidden"
    ),
    "averaged_backward": (
        "(Tensor dy, Tensor x, Tensor lora_down, Tensor lora_up, Tensor weights,"
        " Tensor? row_map, Tensor hidden, Tensor(a!) dx, int splits, float scale, bool merged,"
        " bool accumulate, bool need_dx, bool need_dparams, bool need_dweights)"
        " -> (Tensor dlora_down, Tensor dlora_up, Tensor dweights)"
    ),
    "output_gate_forward": (
        "(Tensor x, Tensor lora_down, Tensor lora_up, Tensor projection,"
        " Tensor factors, Tensor? means, Tensor scales, Tensor tau, Tensor? mask, Tensor? bias,"
        " Tensor(a!) y, int normalization, bool mask_input, bool accumulate)"
        " -> (Tensor hidden, Tensor gates)"
    ),
    "output_gate_backward": (
        "(Tensor dy, Tensor? dgates, Tensor lora_down, Tensor lora_up,"
        " Tensor projection, Tensor factors, Tensor? means, Tensor scales, Tensor tau,"
        " Tensor? mask, Tensor hidden, Tensor gates, Tensor(a!) dx, int normalization,"
        " bool mask_input, bool accumulate, bool need_dx)"
        " -> (Tensor normalized, Tensor dlogits, Tensor dtau)"
    ),
    "shrink": "(Tensor x, Tensor rows) -> Tensor hidden",
    "expand": "(Tensor hidden, Tensor rows, Tensor(a!) y, bool accumulate) -> ()",
    "outer": "(Tensor hidden, Tensor x) -> Tensor rows",
    # PEMT's task sparsity loss.
    "cosines": (
        "(Tensor f, Tensor seen, Tensor hidden, Tensor rotations, Tensor scales)"
        " -> (Tensor cosines, Tensor norms, Tensor f_norm)"
    ),
    "cosines_backward": (
        "(Tensor dcosines, Tensor? df_given, Tensor f, Tensor seen, Tensor hidden, Tensor grams,"
        " Tensor scales, Tensor cosines, Tensor norms, Tensor f_norm, Tensor(a!) df,"
        " Tensor(b!) dhidden) -> Tensor dseen"
    ),
}

# Who computes the frozen linear: the library in either direction, we forward, or we in both.
BASE_PRODUCTS = LIBRARY, OWN_FORWARD, OWN = "library", "own forward", "own"
# Ours, where it is faster than the library's: on some CPUs.
_LINEAR = {
    "linear": "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "linear_backward": "(Tensor dy, Tensor weight) -> Tensor",
}

_libraries = {name: torch.library.Library(name, "DEF") for name in NAMESPACES.values()}
for _operators in _libraries.values():
    for _name, _schema in _SCHEMAS.items():
        _operators.define(_name + _schema)
for _name, _schema in _LINEAR.items():
    _libraries["moelora_ops"].define(_name + _schema)


class Operators:
    """The operators of one namespace, an attribute each.

    Bound once: looking a packet up costs more than the dispatch itself.
    """

    def __init__(self, namespace: str, names: Iterable[str]):
        packets = getattr(torch.ops, namespace)
        for name in names:
            setattr(self, name, getattr(packets, name).default)


_operators_of = {
    backend: Operators(namespace, _SCHEMAS) for backend, namespace in NAMESPACES.items()
}
linear = torch.ops.moelora_ops.linear.default
linear_backward = torch.ops.moelora_ops.linear_backward.default


def of(backend: str) -> Operators:
    """The operators that a back end implements, under the names of the schemas."""
    return _operators_of[backend]


# The numbers by which the operators know them; csrc/mix/gated.h and output_gate.h.
ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3}
NORMALIZATIONS = {"none": 0, "l2": 1, "l2_per_expert": 2, "layernorm": 3}


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """What products of `dtype` accumulate in, and what logits, weights and hidden are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


STRATEGIES = ("auto", "stacked", "grouped")


def topk_saved_size(
    backend: str, tokens: int, num_experts: int, rank: int, top_k: int, stacked: bool
) -> int:
    """Elements of `saved`: hidden, logits, weights and selected (int32 bits), one after the other.

    One allocation instead of four: right after a large GEMM, when caches are cold, each costs more
    than the routing of a token.  Of the choices, Triton's stacked kernels keep the last alone; the
    grouped ones of a GPU keep beside them their order by expert, and where each expert's slots
    begin.
    """
    rows = num_experts if stacked else top_k
    choices, begins = 2 * top_k, 0
    if backend == "triton" and stacked:
        choices = 1
    elif backend != "cpu" and not stacked:
        choices, begins = 3 * top_k, num_experts * top_k + 1
    return tokens * (rows * rank + num_experts + choices) + begins


def _register_fake(name: str, *backends: str) -> Callable[[Callable], Callable]:
    """``torch.library.register_fake`` in every namespace (or those of `backends`).

    For functions whose tensors must share a device: one meta tensor among real ones is enough for a
    fake to run instead of a kernel, silently.
    """

    def register(fake: Callable) -> Callable:
        @functools.wraps(fake)
        def checked(*arguments):
            tensors = [a for a in arguments if isinstance(a, Tensor)]
            if any(t.device != tensors[0].device for t in tensors):
                devices = sorted({str(t.device) for t in tensors})
                raise ValueError(f"{name}: wanted all tensors on one device, got {devices}")
            return fake(*arguments)

        for backend in backends or NAMESPACES:
            torch.library.register_fake(f"{NAMESPACES[backend]}::{name}")(checked)
        return fake

    return register


def _topk_forward_fake(
    backend, x, lora_down, lora_up, router, bias, seed, y, top_k, scale, renormalize, dropout,
    dropout_per_expert, stacked, accumulate,
):  # fmt: skip
    num_experts, rank, _ = lora_down.shape
    wide = accumulator_dtype(x.dtype)
    size = topk_saved_size(backend, math.prod(x.shape[:-1]), num_experts, rank, top_k, stacked)
    return (
        x.new_empty((size,), dtype=wide),
        x.new_empty((num_experts,), dtype=torch.int64),
        x.new_empty((num_experts,), dtype=wide),
    )


for _backend in NAMESPACES:
    _register_fake("topk_forward", _backend)(functools.partial(_topk_forward_fake, _backend))


@_register_fake("topk_backward")
def _topk_backward_fake(
    dy, x, lora_down, lora_up, router, seed, saved, dprob_sums, dx, top_k, scale, renormalize,
    dropout, dropout_per_expert, stacked, accumulate, need_dx, need_dparams,
):  # fmt: skip
    if not need_dparams:
        return tuple(lora_down.new_empty((0,)) for _ in range(3))
    return tuple(p.new_empty(p.shape) for p in (lora_down, lora_up, router))


def _wide(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=accumulator_dtype(like.dtype))


def _tokens(x: Tensor) -> int:
    return math.prod(x.shape[:-1])


def _gradients(wanted: bool, *parameters: Tensor) -> tuple[Tensor, ...]:
    return tuple(p.new_empty(p.shape if wanted else (0,)) for p in parameters)


@_register_fake("gated_forward")
def _gated_forward_fake(
    x, lora_down, down_bias, lora_up, up_bias, weights, row_map, bias, seed, y, scale, activation,
    dropout, accumulate,
):  # fmt: skip
    return _wide(x, _tokens(x), lora_down.shape[0] * lora_down.shape[1])


@_register_fake("gated_backward")
def _gated_backward_fake(
    dy, x, lora_down, down_bias, lora_up, up_bias, weights, row_map, seed, hidden, dx, scale,
    activation, dropout, accumulate, need_dx, need_dparams, need_dweights,
):  # fmt: skip
    absent = x.new_empty((0,))
    biases = (absent if b is None else b for b in (down_bias, up_bias))
    ddown_bias, dup_bias = _gradients(need_dparams, *biases)
    dlora_down, dlora_up = _gradients(need_dparams, lora_down, lora_up)
    rows = weights.shape[0] if need_dweights else 0
    return dlora_down, ddown_bias, dlora_up, dup_bias, _wide(x, rows, weights.shape[1])


@_register_fake("grid_forward")
def _grid_forward_fake(
    x, lora_down, lora_up, router, omega, beta, intuition, row_map, bias, y, token_scale,
    task_scale, diagonal, accumulate,
):  # fmt: skip
    return _wide(x, _tokens(x), lora_down.shape[0] + router.shape[0])


@_register_fake("grid_backward")
def _grid_backward_fake(
    dy, x, lora_down, lora_up, router, omega, beta, intuition, row_map, hidden, dx, token_scale,
    task_scale, diagonal, accumulate, need_dx, need_dparams, need_dintuition,
):  # fmt: skip
    rows = intuition.shape[0] if intuition is not None and need_dintuition else 0
    return (
        *_gradients(need_dparams, lora_down, lora_up, router, omega, beta),
        _wide(x, rows, router.shape[0]),
    )


@_register_fake("averaged_forward")
def _averaged_forward_fake(
    x, lora_down, lora_up, weights, row_map, bias, y, splits, scale, merged, accumulate
):
    num_experts, rank, _ = lora_down.shape
    return _wide(x, _tokens(x), rank if merged else splits * num_experts * rank)


@_register_fake("averaged_backward")
def _averaged_backward_fake(
    dy, x, lora_down, lora_up, weights, row_map, hidden, dx, splits, scale, merged, accumulate,
    need_dx, need_dparams, need_dweights,
):  # fmt: skip
    rows = weights.shape[0] if need_dweights else 0
    return *_gradients(need_dparams, lora_down, lora_up), _wide(x, rows, weights.shape[1])


@_register_fake("output_gate_forward")
def _output_gate_forward_fake(
    x, lora_down, lora_up, projection, factors, means, scales, tau, mask, bias, y, normalization,
    mask_input, accumulate,
):  # fmt: skip
    num_experts, rank, _ = lora_down.shape
    return _wide(x, _tokens(x), num_experts * rank), _wide(x, _tokens(x), num_experts)


@_register_fake("output_gate_backward")
def _output_gate_backward_fake(
    dy, dgates, lora_down, lora_up, projection, factors, means, scales, tau, mask, hidden, gates,
    dx, normalization, mask_input, accumulate, need_dx,
):  # fmt: skip
    tokens = _tokens(dx)
    return _wide(dx, tokens, projection.shape[0]), _wide(dx, *gates.shape), _wide(dx, 1)


@_register_fake("shrink")
def _shrink_fake(x: Tensor, rows: Tensor) -> Tensor:
    return _wide(x, *x.shape[:-1], rows.shape[0])


@_register_fake("expand")
def _expand_fake(hidden: Tensor, rows: Tensor, y: Tensor, accumulate: bool) -> None:
    pass


@_register_fake("outer")
def _outer_fake(hidden: Tensor, x: Tensor) -> Tensor:
    return x.new_empty((hidden.shape[-1], x.shape[-1]))


@_register_fake("cosines")
def _cosines_fake(f: Tensor, seen: Tensor, hidden: Tensor, rotations: Tensor, scales: Tensor):
    per_expert = (*f.shape[:-1], len(scales))
    return _wide(f, *per_expert), _wide(f, *per_expert), _wide(f, math.prod(f.shape[:-1]))


@_register_fake("cosines_backward")
def _cosines_backward_fake(
    dcosines, df_given, f, seen, hidden, grams, scales, cosines, norms, f_norm, df, dhidden
):  # fmt: skip
    return _wide(f, *seen.shape)


@_register_fake("linear", "cpu")
def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@_register_fake("linear_backward", "cpu")
def _linear_backward_fake(dy: Tensor, weight: Tensor) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], weight.shape[1]))
