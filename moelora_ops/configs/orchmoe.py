"""OrchMoE for a whole model, and its relatives that take task ids."""

import dataclasses
from typing import Any

import torch
from torch import nn

from ..companions import Companion
from ..depth import NumberedLayer, numbered_layer
from ..nn import TaskIds, TaskRouters
from ..nn.checks import check_bool, check_count
from ..nn.orchmoe import check_arguments
from ..nn.routed_tasks import check_attention
from .base import AdapterConfig, is_linear

SHARE = ("layer", "model")


@dataclasses.dataclass(frozen=True)
class OrchMoEConfig(AdapterConfig):
    """OrchMoE for a whole model (2401.10559): no task ids, a router finds the tasks.

    The paper's text could not be read; see :class:`moelora_ops.nn.OrchMoELinear` for what is known.
    Sharing the router, all forms of attention but ``"sequence"`` and `normalize` are our choices.

    Padding is left out, by the ``attention_mask`` ``[batch, length]`` that the model is called
    with.  Works unchanged under generation, gradient checkpointing and ``torch.compile``.

    Args:
        num_skills, num_tasks, rank, alpha, combine: see :class:`moelora_ops.nn.OrchMoELinear`.
        share: ``"layer"``, a task router per numbered layer, reading the hidden states that enter
            it, for all its linears; or ``"model"``, one per stack of layers, reading what enters
            the first (a decoder's embeddings).
        attention: what the router sees.  ``"causal"``: for each token what comes up to it, so that
            every token has tasks of its own, and generation with a cache agrees with a full
            forward; leave out linears that read other tokens than their layer's (k and v of
            cross-attention).  ``"prompt"``: for a whole sequence, its prompt; in training and
            wherever answers follow say which tokens that is (:func:`moelora_ops.prompt_mask`);
            generation takes its first call.  ``"sequence"``, the quoted formula: for a whole
            sequence, all of it; right for encoders, while a decoder that learns to predict would be
            told the answer; generation keeps what its first call gives.
        normalize: divide hidden states by their root mean square before the router, see
            :class:`moelora_ops.nn.TaskRouter`; False is the quoted formula.
        hidden_size: width of the hidden states; by default the in_features of a layer's first
            linear.
        target_modules, adapter_dtype: see :class:`AdapterConfig`; linears of numbered layers only.

    A transformers cache holds the router's state behind the model's layers: with ``"causal"`` two
    vectors of hidden_size per token and router, otherwise the tasks.

    Raises:
        TypeError, ValueError: a field is out of range; the message names it.
    """

    num_skills: int = 8
    num_tasks: int = 8
    rank: int = 8
    alpha: float = 16.0
    combine: str = "sum"
    share: str = "layer"
    attention: str = "causal"
    normalize: bool = True
    hidden_size: int | None = None

    def __post_init__(self):
        super().__post_init__()
        check_arguments(
            self.num_skills, self.num_tasks, self.rank, self.alpha, self.combine, 1, None
        )
        if self.share not in SHARE:
            raise ValueError(f"share: wanted one of {SHARE}, got {self.share!r}")
        check_attention(self.attention)
        check_bool("normalize", self.normalize)
        if self.hidden_size is not None:
            check_count("hidden_size", self.hidden_size)

    def layer_arguments(self, name: str, layer: NumberedLayer | None) -> dict[str, Any]:
        """See :meth:`AdapterConfig.layer_arguments`."""
        same = ("num_skills", "num_tasks", "rank", "alpha", "combine")
        return {field: getattr(self, field) for field in same}

    def companions(
        self,
        model: nn.Module,
        layers: dict[str, dict[str, Any]],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> dict[str, Companion]:
        """The task routers; see :meth:`AdapterConfig.companions`."""
        places: dict[tuple[str, str], int] = {}
        for name in layers:
            layer = numbered_layer(model, name)
            if layer is None:
                raise ValueError(
                    "target_modules: wanted linears of the numbered layers, whose input the task "
                    f"router reads, but {name} is outside"
                )
            reads = serves = layer.name
            if self.share == "model":
                stack = layer.name.rpartition(".")[0]
                reads = ".".join(filter(None, [stack, "0"]))
                serves = stack.rpartition(".")[0]
            if (reads, serves) not in places:
                places[reads, serves] = self._width(model.get_submodule(reads))
        routers = TaskRouters(
            [[*names, width] for names, width in places.items()],
            self.num_tasks,
            self.attention,
            self.normalize,
            device=device,
            dtype=dtype,
        )
        return {"task_routers": routers}

    def _width(self, layer: nn.Module) -> int:
        if self.hidden_size is not None:
            return self.hidden_size
        return next(m.in_features for m in layer.modules() if is_linear(m))


@dataclasses.dataclass(frozen=True)
class PolytroponConfig(AdapterConfig):
    """Polytropon, MHR and C-Poly for a whole model: skills chosen by task ids.

    Every call of the model happens inside ``with moelora_ops.task_ids(model, ids):``.

    Args:
        num_tasks: ids are below it.
        num_skills: shared skills of every linear; 4 in PEFT.
        rank, alpha: see :class:`moelora_ops.nn.PolytroponLinear`.
        splits: above 1 it is MHR.
        private: ``"matrix"`` or ``"simple"``: C-Poly.
        target_modules, adapter_dtype: see :class:`AdapterConfig`.

    Raises:
        TypeError, ValueError: a field is out of range; the message names it.
    """

    num_tasks: int
    num_skills: int = 4
    rank: int = 8
    alpha: float = 1.0
    splits: int = 1
    private: str | None = None

    def __post_init__(self):
        super().__post_init__()
        check_arguments(
            self.num_skills, self.num_tasks, self.rank, self.alpha, "average", self.splits,
            self.private,
        )  # fmt: skip

    def layer_arguments(self, name: str, layer: NumberedLayer | None) -> dict[str, Any]:
        """See :meth:`AdapterConfig.layer_arguments`."""
        same = ("num_skills", "num_tasks", "rank", "alpha", "splits", "private")
        return {field: getattr(self, field) for field in same}

    def companions(
        self,
        model: nn.Module,
        layers: dict[str, dict[str, Any]],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> dict[str, Companion]:
        """What :func:`moelora_ops.task_ids` talks to; see :meth:`AdapterConfig.companions`."""
        return {"task_ids": TaskIds(self.num_tasks)}
