"""Balance loss and routing statistics, from the by-products of the kernels.

Every layer keeps the :class:`Routing` of its last forward call in ``layer.routing``, and the loss
is made from these after the model has run.  Normally ``prob_sums`` is part of the autograd graph
and nothing more is needed.  Reentrant gradient checkpointing runs the forward without a graph and
repeats it inside the backward.  There the gradient of ``prob_sums`` takes a detour:

    aux_loss        puts a node behind every prob_sums without a graph
    backward        runs that node before any layer (the engine takes the youngest node that is
                    ready, and aux_loss is called after the forward); it leaves the gradients
                    in layer.dprob_sums
    recomputation   record() finds it and puts a node behind y that hands it to the new prob_sums
    end of backward if any gradient was left where it was, raises
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .companions import check_model
from .depth import numbered_layer
from .functional import Routing, is_number
from .reference import Gating


def record(layer: nn.Module, y: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
    """What a layer returns and keeps of a forward call: y and the routing for ``layer.routing``."""
    waiting = layer.dprob_sums is not None
    # Code being compiled cannot ask the engine; a gradient can only wait during a backward.
    compiling = torch.compiler.is_compiling()
    if not (waiting if compiling else torch._C._current_graph_task_id() != -1):
        if waiting:  # since a backward that failed
            layer.dprob_sums = None
        return y, routing
    if waiting and routing.prob_sums.requires_grad:
        y = _Deliver.apply(y, routing.prob_sums, layer)
    # Inside a backward, so this call recomputes.  Keeping its routing would keep its graph, and
    # with it the activations that checkpointing exists to free.
    return y, layer.routing


class _Defer(torch.autograd.Function):
    """prob_sums of calls that ran without a graph; their gradients wait in the layers."""

    @staticmethod
    def forward(ctx, anchor: Tensor, layers: list[nn.Module], *prob_sums: Tensor):
        ctx.layers = layers
        return tuple(t.clone() for t in prob_sums)

    @staticmethod
    def backward(ctx, *dprob_sums: Tensor):
        layers = ctx.layers
        for layer, gradient in zip(layers, dprob_sums, strict=True):
            waiting = layer.dprob_sums
            layer.dprob_sums = gradient if waiting is None else waiting + gradient

        def check_delivered():
            stuck = [layer for layer in layers if layer.dprob_sums is not None]
            for layer in stuck:
                layer.dprob_sums = None
            if stuck:
                raise RuntimeError(
                    f"aux_loss: {len(stuck)} layers ran without a graph and were not recomputed in "
                    "this backward pass, so their routers got no gradient. Was the forward under "
                    "torch.no_grad(), or aux_loss not part of the loss that went through them?"
                )

        torch.autograd.Variable._execution_engine.queue_callback(check_delivered)
        return (None, None, *(None for _ in layers))


class _Deliver(torch.autograd.Function):
    """Identity on y; its backward gives prob_sums the gradient that waits in the layer."""

    @staticmethod
    def forward(ctx, y: Tensor, prob_sums: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy: Tensor):
        # Taken here and not in forward: of several calls of one layer only the last, whose backward
        # comes first, is the one that aux_loss saw.
        dprob_sums, ctx.layer.dprob_sums = ctx.layer.dprob_sums, None
        return dy, dprob_sums, None


def aux_loss(model: nn.Module, coefficient: float = 0.001) -> Tensor:
    """Balance loss of the last forward call (MoLA's code): coefficient · Σ_l E_l Σ_i f_i P_i.

    The modules of a numbered layer l are pooled: f_i is the share of their selections that went to
    expert i and P_i the mean of their softmax probabilities.  A layer adds 1 when balanced and up
    to E_l when all tokens choose one expert.  Modules outside numbered layers are pools of their
    own, and so are, within a layer, modules with different numbers of experts.  Layers that have
    not run are left out; a pool that saw no tokens adds 0.

    Call it after the forward and before the backward of the same batch, add it to the loss and go
    backward once through the sum.  Right under ``torch.compile`` and under both modes of gradient
    checkpointing; a layer that is called several times in one forward counts with its last call.
    Limits: reference layers support the non-reentrant mode only.  Under the reentrant mode a frozen
    router passes nothing on to x.  Compile around checkpoints rather than inside them: a layer that
    is compiled inside one keeps its recomputed activations until its next call, and the reentrant
    mode then needs ``fullgraph=False``.

    Args:
        model: adapted by :func:`moelora_ops.apply`, or holding such layers.
        coefficient: weight of the loss, at least 0; 0.001 in the authors' code.

    Returns:
        scalar; part of the autograd graph in training, otherwise just the value.

    Raises:
        ValueError: `coefficient` is negative or not finite.
        RuntimeError: no layer keeps a routing, or a reference layer ran without a graph while
            training.
    """
    check_coefficient(coefficient)
    layers = list(_routed_layers(model))
    pools: dict[tuple[str, int], list[tuple[Tensor, Tensor, int]]] = {}
    for (name, layer), prob_sums in zip(layers, _prob_sums(layers), strict=True):
        counts = layer.routing.counts
        place = numbered_layer(model, name)
        pool = pools.setdefault((place.name if place else name, len(counts)), [])
        pool.append((counts, prob_sums, layer.top_k))
    terms = [_pool_loss(pool) for pool in pools.values()]
    device = terms[0].device
    return coefficient * torch.stack([term.to(device) for term in terms]).sum()


def gating_balance_loss(model: nn.Module, coefficient: float = 0.5) -> Tensor:
    """MoLE's gating balance loss of the last forward call: -coefficient · Σ_i log q_i (2404.13628).

    q_i is the mean over the M gates of the weight that each gives to expert i.  The paper does not
    say what becomes of the batch: here a gate's weight is its mean over the tokens, or sequences,
    that are not padding (our choice).  Its least value is ``coefficient · E log E``, when all
    experts are used alike.  Experts that are masked in every gate are left out, gates that saw no
    token too, and q counts as at least the smallest positive number; gates with different numbers
    of experts are balanced apart from each other (our choices).

    When to call it, and its limits, are as for :func:`aux_loss`.

    Args:
        model: adapted with :class:`moelora_ops.MoLEConfig`, or holding such layers.
        coefficient: weight of the loss, at least 0; 0.5 in the paper.

    Returns:
        scalar; part of the autograd graph in training, otherwise just the value.

    Raises:
        ValueError: `coefficient` is negative or not finite.
        RuntimeError: no gate has run, or a reference layer ran without a graph while training.
    """
    check_coefficient(coefficient)
    gates = list(_routed_layers(model, Gating))
    groups: dict[int, list[tuple[Tensor, Gating]]] = {}
    for (_, gate), prob_sums in zip(gates, _prob_sums(gates), strict=True):
        groups.setdefault(len(prob_sums), []).append((prob_sums, gate.routing))
    device = next(iter(groups.values()))[0][0].device
    return coefficient * sum(_gating_loss(group).to(device) for group in groups.values())


def _gating_loss(gates: list[tuple[Tensor, Gating]]) -> Tensor:
    """-Σ_i log q_i over gates with the same number of experts."""
    device = gates[0][0].device
    means = [(sums / g.rows.clamp(min=1)).to(device) for sums, g in gates]
    seen = torch.stack([(g.rows > 0).to(device) for _, g in gates])
    kept = torch.stack([g.expert_mask.to(device) for _, g in gates]).any(0) & seen.any()
    mean = torch.stack(means).sum(0) / seen.sum().clamp(min=1)
    # A weight that underflows must not make the loss infinite.
    terms = mean.clamp(min=torch.finfo(mean.dtype).tiny).log()
    return -terms.masked_fill(~kept, 0).sum()


def check_coefficient(coefficient: float) -> None:
    """The weight of a loss."""
    if not is_number(coefficient) or not 0 <= coefficient < math.inf:
        raise ValueError(f"coefficient: wanted a finite number of at least 0, got {coefficient!r}")


class RoutingStats(NamedTuple):
    """How one module's router spread the tokens of its last forward call.

    Attributes:
        tokens: how many there were.
        share: ``[E]`` float64 on the CPU, share of the selections that went to each expert; sums to
            1.
        probability: ``[E]`` float64 on the CPU, mean softmax probability of each expert; sums to 1.
        entropy: of `share`, over log E: 1 is even use, log k / log E is a collapse onto the same k
            experts.
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

    Waits for the device and copies from it, once per module: for a log line now and then, not for
    every step.

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
    """E Σ_i f_i P_i over modules of E experts, each (counts ``[E]``, prob_sums ``[E]``, top_k)."""
    counts = sum(counts for counts, _, _ in pool)
    prob_sums = sum(prob_sums for _, prob_sums, _ in pool)
    rows = sum(counts.sum() // top_k for counts, _, top_k in pool)
    share = counts.to(prob_sums.dtype) / counts.sum().clamp(min=1)
    return len(counts) * (share * prob_sums).sum() / rows.clamp(min=1)


def _prob_sums(layers: list[tuple[str, nn.Module]]) -> list[Tensor]:
    """``routing.prob_sums`` of every layer, with a way back to its router if there must be one."""
    prob_sums = [layer.routing.prob_sums for _, layer in layers]
    if not torch.is_grad_enabled():
        return prob_sums
    graphless = [
        i
        for i, (_, layer) in enumerate(layers)
        if layer.training and _trains(layer) and not prob_sums[i].requires_grad
    ]
    for name, layer in (layers[i] for i in graphless):
        if not hasattr(layer, "dprob_sums"):
            raise RuntimeError(
                f"aux_loss: {name} is a reference layer that ran without a graph in training mode. "
                "Checkpoint with use_reentrant=False, use the fused layers, or ask under "
                "torch.no_grad() for the value alone"
            )
    if graphless:
        # Something that requires a gradient, so that there is a node; it gets none.
        anchor = torch.zeros((), requires_grad=True)
        deferred = _Defer.apply(
            anchor, [layers[i][1] for i in graphless], *(prob_sums[i] for i in graphless)
        )
        for i, t in zip(graphless, deferred, strict=True):
            prob_sums[i] = t
    return prob_sums


def _trains(layer: nn.Module) -> bool:
    """Whether what decides a layer's routing is trained."""
    decides = layer.gate if hasattr(layer, "gate") else layer.router
    return decides.requires_grad


def _routed_layers(
    model: nn.Module, kind: type[Routing | Gating] = Routing
) -> Iterator[tuple[str, nn.Module]]:
    """Qualified name and module of every layer that keeps a routing of this kind."""
    check_model(model)
    layers = [
        (name, module) for name, module in model.named_modules() if hasattr(module, "routing")
    ]
    routed = [(name, layer) for name, layer in layers if isinstance(layer.routing, kind)]
    if not routed:
        raise RuntimeError(
            "model: no adapted layer has run yet; call the model first"
            if any(layer.routing is None for _, layer in layers)
            else "model: has no layers with routed experts"
        )
    yield from routed
