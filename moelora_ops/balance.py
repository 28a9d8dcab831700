"""Balance loss and routing statistics, from the by-products of the kernels.

Every layer keeps the :class:`Routing` of its last forward call in ``layer.routing``, and the loss is made from
these after the model has run.  Normally ``prob_sums`` is part of the autograd graph and nothing more is needed.
Reentrant gradient checkpointing runs the forward without a graph and repeats it inside the backward.  There the
gradient of ``prob_sums`` takes a detour:

    aux_loss        makes a node in front of each graph-less prob_sums
    backward        runs that node before any layer (the engine takes the youngest node that is ready, and
                    aux_loss is called after the forward); it leaves the gradient in layer.dprob_sums
    recomputation   record() finds it and puts a node behind y that hands it to the new prob_sums
    end of backward if any gradient was left where it was, raises
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .depth import numbered_layer
from .functional import Routing


def record(layer: nn.Module, y: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
    """What a layer returns and keeps of a forward call: y and the routing for ``layer.routing``."""
    if layer.dprob_sums is not None and routing.prob_sums.requires_grad:
        y = _Deliver.apply(y, routing.prob_sums, layer)
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        # Inside a backward, so this call recomputes.  Keeping its routing would keep its graph, and with it the
        # activations that checkpointing exists to free.
        return y, layer.routing
    return y, routing


class _Defer(torch.autograd.Function):
    """prob_sums of a forward call that ran without a graph; its gradient waits in the layer."""

    @staticmethod
    def forward(ctx, prob_sums: Tensor, anchor: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        return prob_sums.clone()

    @staticmethod
    def backward(ctx, dprob_sums: Tensor):
        layer = ctx.layer
        waiting = layer.dprob_sums
        layer.dprob_sums = dprob_sums if waiting is None else waiting + dprob_sums

        def check_delivered():
            if layer.dprob_sums is not None:
                layer.dprob_sums = None
                raise RuntimeError(
                    "aux_loss: a layer ran without a graph and was not recomputed in this backward pass, so its "
                    "router got no gradient. Was its forward under torch.no_grad(), or aux_loss not part of the "
                    "loss that went through the layer?"
                )

        torch.autograd.Variable._execution_engine.queue_callback(check_delivered)
        return None, None, None


class _Deliver(torch.autograd.Function):
    """Identity on y; its backward gives prob_sums the gradient that waits in the layer."""

    @staticmethod
    def forward(ctx, y: Tensor, prob_sums: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy: Tensor):
        # Taken here and not in forward: of several calls of one layer only the last, whose backward comes
        # first, is the one that aux_loss saw.
        dprob_sums, ctx.layer.dprob_sums = ctx.layer.dprob_sums, None
        return dy, dprob_sums, None


def aux_loss(model: nn.Module, coefficient: float = 0.001) -> Tensor:
    """The balance loss of the last forward call, as in MoLA's code: coefficient · Σ_l E_l Σ_i f_i P_i.

    The modules of a numbered layer l are pooled: f_i is the share of their selections that went to expert i and P_i
    the mean of their softmax probabilities.  A layer adds 1 when balanced and up to E_l when all tokens choose one
    expert.  Modules outside numbered layers are pools of their own, and so are, within a layer, modules with
    different numbers of experts.  Layers that have not run are left out; a pool that saw no tokens adds 0.

    Call it after the forward and before the backward of the same batch, add it to the loss and go backward once
    through the sum.  Right under ``torch.compile`` and under both modes of gradient checkpointing; a layer that is
    called several times in one forward counts with its last call.  Reference layers support the non-reentrant mode
    only.

    Args:
        model: adapted by :func:`moelora_ops.apply`, or holding such layers.
        coefficient: weight of the loss, at least 0; 0.001 in the authors' code.

    Returns:
        scalar; part of the autograd graph in training, otherwise just the value.

    Raises:
        ValueError: `coefficient` is negative or not finite.
        RuntimeError: no layer keeps a routing, or a reference layer ran without a graph while training.
    """
    if not 0 <= coefficient < float("inf"):
        raise ValueError(f"coefficient: wanted a finite number of at least 0, got {coefficient!r}")
    pools: dict[tuple[str, int], list[tuple[Tensor, Tensor, int]]] = {}
    for name, layer in _routed_layers(model):
        counts, prob_sums = layer.routing.counts, _prob_sums(name, layer)
        place = numbered_layer(model, name)
        pool = pools.setdefault((place.name if place else name, len(counts)), [])
        pool.append((counts, prob_sums, layer.top_k))
    terms = [_pool_loss(pool) for pool in pools.values()]
    device = terms[0].device
    return coefficient * torch.stack([term.to(device) for term in terms]).sum()


class RoutingStats(NamedTuple):
    """How one module's router spread the tokens of its last forward call.

    Attributes:
        tokens: how many there were.
        share: ``[E]`` float64 on the CPU, share of the selections that went to each expert; sums to 1.
        probability: ``[E]`` float64 on the CPU, mean softmax probability of each expert; sums to 1.
        entropy: of `share`, over log E: 1 is even use, log k / log E is a collapse onto the same k experts.
        used: how many experts were selected at least once.

    Without tokens `share` and `probability` are zero, `entropy` and `used` too.
    """

    tokens: int
    share: Tensor
    probability: Tensor
    entropy: float
    used: int


def routing_stats(model: nn.Module) -> dict[str, RoutingStats]:
    """:class:`RoutingStats` of every module that has run, by qualified name.

    Waits for the device and copies from it, once per module: for a log line now and then, not for every step.

    Raises:
        RuntimeError: no layer keeps a routing.
    """
    return {name: _stats(layer.routing, layer.top_k) for name, layer in _routed_layers(model)}


def _stats(routing: Routing, top_k: int) -> RoutingStats:
    counts = routing.counts.cpu()
    total = int(counts.sum())
    tokens = total // top_k
    share = counts.double() / max(total, 1)
    probability = routing.prob_sums.detach().cpu().double() / max(tokens, 1)
    # With one expert the use is even whatever it does.
    bits = torch.special.entr(share).sum() / math.log(len(share)) if len(share) > 1 else share.sum()
    return RoutingStats(tokens, share, probability, float(bits), int((counts > 0).sum()))


def _pool_loss(pool: list[tuple[Tensor, Tensor, int]]) -> Tensor:
    """E Σ_i f_i P_i over modules of E experts each, given (counts ``[E]``, prob_sums ``[E]``, top_k)."""
    counts = sum(counts for counts, _, _ in pool)
    prob_sums = sum(prob_sums for _, prob_sums, _ in pool)
    rows = sum(counts.sum() // top_k for counts, _, top_k in pool)
    share = counts.to(prob_sums.dtype) / counts.sum().clamp(min=1)
    return len(counts) * (share * prob_sums).sum() / rows.clamp(min=1)


def _prob_sums(name: str, layer: nn.Module) -> Tensor:
    """layer.routing.prob_sums with a way back to the router, if there must be one."""
    prob_sums = layer.routing.prob_sums
    trains = layer.training and torch.is_grad_enabled() and layer.router.requires_grad
    if prob_sums.requires_grad or not trains:
        return prob_sums
    if not hasattr(layer, "dprob_sums"):
        raise RuntimeError(
            f"aux_loss: {name} is a reference layer that ran without a graph in training mode. Checkpoint with "
            "use_reentrant=False, use the fused layers, or ask under torch.no_grad() for the value alone"
        )
    return _Defer.apply(prob_sums, prob_sums.new_zeros((), requires_grad=True), layer)


def _routed_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Qualified name and module of every layer that keeps the routing of a forward call."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: wanted a torch.nn.Module, got {type(model).__name__}")
    layers = [(name, module) for name, module in model.named_modules() if hasattr(module, "routing")]
    routed = [(name, layer) for name, layer in layers if isinstance(layer.routing, Routing)]
    if not routed:
        raise RuntimeError(
            "model: no adapted layer has run yet; call the model first"
            if any(layer.routing is None for _, layer in layers)
            else "model: has no layers with routed experts"
        )
    yield from routed
