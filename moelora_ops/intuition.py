"""The intuition of MoR1E (2404.08985): scores that tell every layer what kind of task this is.

Once, before training: embed all instructions with any sentence encoder, and :func:`cluster` the
embeddings.  For each batch: embed its instructions, let the :class:`IntuitionEncoder` turn the
embeddings into scores, and run the model in a block::

    model = moelora_ops.apply(model, MoR1EConfig(centroids=cluster(embeddings, 32)))
    scores = model.moelora_companions.encoder(embed(batch))         # [batch, 32]
    with moelora_ops.intuition(model, scores):
        loss = model(**batch).loss
    loss.backward()
"""

import contextlib
import math
import threading
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .companions import Companion, check_model
from .reference import NO_SCORES, AmbientScores, Scores, no_autocast


@contextlib.contextmanager
def intuition(
    model: nn.Module, scores: Tensor | None, *, row_map: Tensor | None = None
) -> Iterator[None]:
    """Inside the block every MoR1E layer of `model` sees `scores` as its intuition.

    Blocks nest, the inner one holds; `scores` None is as outside.  A block concerns the calls of
    its own thread only.  Compiled models see it too.  The backward pass may come after the block:
    what gradient checkpointing recomputes sees the scores of the forward call that it belongs to,
    also if several calls with different scores share a backward pass.  For that the block must be
    entered with gradients enabled.

    Limits: a layer that is compiled *and* called by a checkpoint outside of every module of `model`
    is recomputed without scores.  Eager layers under such a checkpoint in the reentrant mode
    remember the last forward call only, and on a GPU they raise an error.  Where layers are
    compiled inside checkpoints, or are reference layers, a call without scores that shares a
    backward pass with a call with scores needs a block too, of None.

    Args:
        model: holds MoR1E layers, fused or reference.
        scores: ``[batch, G]`` for a model whose linears see ``[batch, length, width]``; ``[T, G]``
            or ``[batch, length, G]`` for scores per token; ``[rows, G]`` with `row_map`.  G is the
            layers' number of experts.  On the model's device, any floating dtype.
        row_map: int32 ``[T]``, the row of `scores` of each of the T tokens that the linears see,
            for packed sequences.

    Raises:
        TypeError, ValueError: `model` has no such layers, or `scores` is not theirs.  A batch size
            that does not fit is an error of the layer that meets it.
    """
    layers = _layers(model)
    _check_scores(layers, scores, row_map)
    block = Scores(scores, row_map)
    block.first, block.last = torch._C._autograd._get_sequence_nr(), math.inf
    before = [(layer.ambient_scores, layer.ambient_scores.now) for layer in layers.values()]
    for ambient, _ in before:
        ambient.now = block
    hooks = []
    if torch.is_grad_enabled():
        # The modules around layers, outermost included: in a backward pass, what they return comes
        # before all that is recomputed inside of them.
        inside: dict[str, list[AmbientScores]] = {}
        for name, layer in layers.items():
            while name:
                name = name.rpartition(".")[0]
                inside.setdefault(name, []).append(layer.ambient_scores)
        hooks = [
            model.get_submodule(name).register_forward_hook(_Remember(ambients))
            for name, ambients in inside.items()
        ]
    try:
        yield
    finally:
        block.last = torch._C._autograd._get_sequence_nr()
        for hook in hooks:
            hook.remove()
        for ambient, scores_before in before:
            ambient.now = scores_before


def scores_now(layer: nn.Module) -> Scores:
    """The scores that hold for a forward call of `layer` that begins now, recomputed or not."""
    ambient = layer.ambient_scores
    now = ambient.now
    if torch.compiler.is_compiling():
        return now  # compiled code cannot ask the engine
    if torch._C._current_graph_task_id() == -1:
        while now.before is not None:  # set by a backward pass that failed
            now = now.before
        ambient.last = now
        layer.had_scores |= now.values is not None
        return now
    # Inside a backward pass, so this call recomputes what belongs to the node that is being
    # evaluated.  A thread numbers the nodes of its forward calls in their order.
    node = torch._C._current_autograd_node()
    for scores in (*_chain(now), *_chain(ambient.last)):
        if node is None or scores.first <= node._sequence_nr() < scores.last:
            return scores
    if ambient.last is None and layer.had_scores:
        raise RuntimeError(
            "intuition: the scores of a forward call are lost, as a reentrant checkpoint outside "
            "of every module of the model recomputes it in another thread; checkpoint with "
            "use_reentrant=False (and run calls without scores in a block of None)"
        )
    return NO_SCORES


def _chain(scores: Scores | None) -> Iterator[Scores]:
    while scores is not None:
        yield scores
        scores = scores.before


class _Remember:
    """A forward hook: backward passes through this call set the scores that hold for it again."""

    def __init__(self, ambients: list[AmbientScores]):
        self.ambients, self.thread = ambients, threading.get_ident()

    def __reduce__(self):
        return _Remember, ([],)  # a copy of a module is in no block

    def __call__(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        # A compiled forward is recomputed by its own graph, which has the scores as an input.
        if torch.compiler.is_compiling() or threading.get_ident() != self.thread:
            return
        if not self.ambients or torch._C._current_graph_task_id() != -1:
            return  # a recomputation: its forward call has been here
        held = [ambient.now for ambient in self.ambients]
        end = torch._C._autograd._get_sequence_nr()

        def on_backward(gradients: tuple) -> None:
            _hold(self.ambients, held, end)

        for tensor in _tensors(output):
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(on_backward)


def _hold(ambients: list[AmbientScores], scores: list[Scores], end: int) -> None:
    """For the rest of the current backward pass, in the thread that runs it."""
    held = []
    for ambient, wanted in zip(ambients, scores, strict=True):
        same = ambient.now.values is wanted.values and ambient.now.first == wanted.first
        if same and ambient.now.last:
            continue
        now = Scores(wanted.values, wanted.row_map)
        now.first, now.last, now.before = wanted.first, end, ambient.now
        ambient.now = now
        held.append(now)

    def release() -> None:
        # Possibly in another thread than the one that holds them, so the objects change and not
        # what the threads refer to.
        for now in held:
            *_, root = _chain(now)
            now.values, now.row_map, now.before = root.values, root.row_map, None
            now.first, now.last = root.first, root.last

    if held:
        torch.autograd.Variable._execution_engine.queue_callback(release)


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in what a module returned."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    check_model(model)
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "ambient_scores")}
    if not layers:
        raise ValueError("model: has no MoR1E layers")
    return layers


def _check_scores(layers: dict[str, nn.Module], scores: Any, row_map: Any) -> None:
    if scores is None:
        if row_map is not None:
            raise ValueError("row_map: wanted None, as there are no scores")
        return
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"scores: wanted a floating-point tensor or None, got {got}")
    for name, layer in layers.items():
        if scores.dim() < 2 or scores.shape[-1] != layer.num_experts:
            raise ValueError(
                f"scores: wanted shape [batch, {layer.num_experts}], one per expert of "
                f"{name or 'the layer'}, got {list(scores.shape)}"
            )


class IntuitionEncoder(Companion):
    """From the embedding of an instruction to its scores: cosines with the cluster centroids.

    Centroids and embeddings are divided by their norms here, so that scores are in [-1, 1]; in the
    authors' code only the embeddings are, and the norms of the centroids, which come from a file,
    are unknown (our choice).

    Args:
        clusters: how many, at least 1.
        width: of the embeddings, at least 1.
        experts: with a number, a learned linear map makes scores for that many experts from the
            cosines (an option of the authors' code, who leave it untrained); None: one cluster, one
            expert.
        device: of centroids and map.  Their dtype is float32 whatever `dtype` is: they are tiny.

    State:
        centroids: buffer ``[clusters, width]``, rows of norm 1; zero until filled.
        map: parameter ``[experts, clusters]`` if `experts` is given.  It starts by spreading the
            clusters evenly: cluster i feeds expert ``i mod experts`` and expert j is fed by cluster
            ``j mod clusters`` (our choice; the identity when the numbers are equal).

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    arguments: ClassVar = ("clusters", "width", "experts")

    def __init__(
        self,
        clusters: int,
        width: int,
        experts: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name in self.arguments:
            value = locals()[name]
            optional = name == "experts" and value is None
            if not optional and (type(value) is not int or value < 1):
                raise ValueError(f"{name}: wanted an int of at least 1, got {value!r}")
        self.clusters, self.width, self.experts = clusters, width, experts
        self.register_buffer("centroids", torch.zeros(clusters, width, device=device))
        self.map = None
        if experts is not None:
            spread = torch.zeros(experts, clusters, device=device)
            for i in range(max(experts, clusters)):
                spread[i % experts, i % clusters] = 1
            self.map = nn.Parameter(spread)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Scores ``[batch, clusters or experts]``, float32.

        Args:
            embeddings: ``[batch, width]``, any floating dtype, of any norm but zero.

        Raises:
            ValueError: `embeddings` has another shape.
        """
        if embeddings.dim() != 2 or embeddings.shape[-1] != self.width:
            raise ValueError(
                f"embeddings: wanted shape [batch, {self.width}], got {list(embeddings.shape)}"
            )
        with no_autocast(embeddings.device.type):
            cosines = F.normalize(embeddings.float(), dim=-1) @ self.centroids.float().T
            return cosines if self.map is None else cosines @ self.map.float().T


def cluster(embeddings: Tensor, clusters: int, *, seed: int = 0) -> Tensor:
    """Centroids of the embeddings of all training instructions.

    K-means (scikit-learn, ten starts) on the embeddings divided by their norms; that step is not in
    the authors' code, which reads a file of 32 centroids.

    Args:
        embeddings: ``[instructions, width]``, finite, none of them zero.
        clusters: at most the number of different embeddings; as many as a layer has experts, unless
            the encoder learns a map.
        seed: of the starts.

    Returns:
        ``[clusters, width]`` float32, rows of norm 1.

    Raises:
        ValueError: an argument is out of range; the message names it.
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ImportError(
            "cluster needs scikit-learn: pip install 'moelora-ops[intuition]'"
        ) from error
    if not isinstance(embeddings, Tensor) or embeddings.dim() != 2:
        got = (
            list(embeddings.shape) if isinstance(embeddings, Tensor) else type(embeddings).__name__
        )
        raise ValueError(f"embeddings: wanted shape [instructions, width], got {got}")
    points = embeddings.detach().double().cpu()
    norms = points.norm(dim=-1, keepdim=True)
    if not points.isfinite().all() or not (norms > 0).all():
        raise ValueError("embeddings: wanted finite rows that are not zero")
    points = points / norms
    different = len(torch.unique(points, dim=0))
    if type(clusters) is not int or not 1 <= clusters <= different:
        raise ValueError(
            f"clusters: wanted an int in 1..{different}, the number of different embeddings, "
            f"got {clusters!r}"
        )
    found = KMeans(clusters, n_init=10, random_state=seed).fit(points.numpy()).cluster_centers_
    return F.normalize(torch.from_numpy(found), dim=-1).float()


def check_centroids(centroids: Any) -> None:
    """Raise unless `centroids` is a finite ``[clusters, width]`` without zero rows."""
    if not isinstance(centroids, Tensor) or centroids.dim() != 2 or not centroids.numel():
        got = list(getattr(centroids, "shape", ())) or type(centroids).__name__
        raise ValueError(f"centroids: wanted shape [clusters, width], got {got}")
    norms = centroids.double().norm(dim=-1)
    if not centroids.is_floating_point() or not (norms.isfinite() & (norms > 0)).all():
        raise ValueError("centroids: wanted finite floating-point rows that are not zero")
