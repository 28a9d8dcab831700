"""The task routers of a whole model: hooks that read hidden states, masks and caches (OrchMoE).

Which call a layer reads from, also where gradient checkpointing runs it again, is explained in
``tasks.py``.
"""

import contextlib
import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..depth import numbered_layer
from .checks import check_bool, check_choice, check_count
from .task_router import TaskRouter
from .tasks import TaskCall, TaskSource, holders_of, source_in

ATTENTION = ("causal", "prompt", "sequence")
_NO_ARGUMENT = "no argument"


class _Masks(NamedTuple):
    """What a model was called with that its routers need: attention_mask, and the prompt."""

    attention: Any  # _NO_ARGUMENT of a module that takes none
    prompt: Tensor | None


class _Collect(torch.autograd.Function):
    """Identity on the input of the layers; its backward hands the leaf's gradient to the tasks."""

    @staticmethod
    def forward(ctx, x: Tensor, tasks: Tensor, call: TaskCall) -> Tensor:
        ctx.call = call
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx: Tensor):
        leaf, ctx.call.leaf = ctx.call.leaf, None
        return dx, None if leaf is None else leaf.grad, None


class TaskRouters(TaskSource):
    """The task routers of a model, each reading one module's input and serving its layers.

    Args:
        places: ``[reads, serves, in_features]`` of each router: the qualified name of the module
            whose input it reads, that of the module inside which its tasks hold, and their width.
        num_tasks: abstract tasks of every router.
        attention: what a router sees; see :class:`moelora_ops.OrchMoEConfig`.
        normalize: see :class:`TaskRouter`.
        device, dtype: of the parameters.
    """

    arguments = ("places", "num_tasks", "attention", "normalize")
    missing = (
        "tasks: wanted those of the task router, got none; the layer was called outside the module "
        "that its router reads. Pass tasks to the layer"
    )

    def __init__(
        self,
        places: list,
        num_tasks: int,
        attention: str = "causal",
        normalize: bool = True,
        *,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if not isinstance(places, (list, tuple)) or not places:
            raise ValueError(f"places: wanted a list of [reads, serves, width], got {places!r}")
        for place in places:
            if len(place) != 3 or not all(isinstance(name, str) for name in place[:2]):
                raise ValueError(f"places: wanted [reads, serves, width], got {place!r}")
            check_count("in_features", place[2])
        check_attention(attention)
        check_bool("normalize", normalize)
        self.places = [list(place) for place in places]
        self.num_tasks, self.attention, self.normalize = num_tasks, attention, normalize
        self.routers = nn.ModuleList(
            TaskRouter(
                width, num_tasks, attention == "causal", normalize, device=device, dtype=dtype
            )
            for _, _, width in places
        )
        self.prompt: Tensor | None = None  # see prompt_mask
        self._slots: list[int] = []

    def check(self, model: nn.Module) -> None:
        """See :meth:`Companion.check`."""
        for reads, serves, _ in self.places:
            try:
                model.get_submodule(serves), model.get_submodule(reads)
                stack = numbered_layer(model, reads)
            except AttributeError:
                stack = None
            if stack is None:
                raise ValueError(
                    f"model: wanted a module {reads!r} in a stack of layers, for a task router to "
                    f"read, and {serves or 'the model'!r} around those that it serves"
                )

    def attach(self, model: nn.Module, layers: dict[str, nn.Module]) -> None:
        """See :meth:`Companion.attach`."""
        holders = {"": None} | {
            h: None for reads, *_ in self.places for h in holders_of(model, reads)
        }
        self._start_over(len(self.places) + len(holders))
        self._slots = []
        for i, (reads, serves, _) in enumerate(self.places):
            stack = numbered_layer(model, reads)
            self._slots.append(stack.depth + stack.index)
            read, served = model.get_submodule(reads), model.get_submodule(serves)
            self._handles += [
                read.register_forward_pre_hook(partial(self._enter, i), with_kwargs=True),
                served.register_forward_hook(partial(self._leave, i), always_call=True),
            ]
            for name, layer in layers.items():
                if name.startswith(serves + "." if serves else ""):
                    layer.tasks_from = partial(self.read, i)
        outermost_first = sorted(holders, key=lambda n: n.count(".") + bool(n))
        for level, name in enumerate(outermost_first, len(self.places)):
            holder = model.get_submodule(name)
            names = list(inspect.signature(holder.forward).parameters)
            position = names.index("attention_mask") if "attention_mask" in names else None
            self._handles += [
                holder.register_forward_pre_hook(
                    partial(self._enter_holder, level, position), with_kwargs=True
                ),
                holder.register_forward_hook(partial(self._leave_holder, level), always_call=True),
            ]

    # ---- what the model was called with: a call of the modules around the layers ----

    def _enter_holder(
        self, level: int, position: int | None, module: nn.Module, args: tuple, kwargs: dict
    ) -> None:
        mask = kwargs.get("attention_mask", _NO_ARGUMENT if position is None else None)
        if position is not None and position < len(args):
            mask = args[position]
        self._calls[level] = _Masks(mask, self.prompt)

    def _leave_holder(self, level: int, module: nn.Module, args: tuple, output: Any) -> None:
        call, self._calls[level] = self._calls[level], None
        if call is not None and not torch.compiler.is_compiling():
            self._remember(level, call, output)

    def _masks(self) -> "list[_Masks]":
        """Innermost first."""
        return [masks for masks in reversed(self._calls[len(self.places) :]) if masks is not None]

    def _padding(self) -> Tensor | None:
        """The innermost ``attention_mask``; None, no padding, if that module was given none.

        What a model has made of its mask for its attention, of other shapes, is passed over.
        """
        passed_over = None
        for masks in self._masks():
            given = masks.attention
            if given is None or (isinstance(given, Tensor) and given.dim() == 2):
                return given
            if given is not _NO_ARGUMENT:
                passed_over = given
        if passed_over is None:
            return None
        got = list(passed_over.shape) if isinstance(passed_over, Tensor) else type(passed_over)
        raise ValueError(
            "attention_mask: wanted [batch, length] somewhere on the way to the layers, so that "
            f"the task router can leave out padding; got {got}"
        )

    # ---- one forward call of a decoder layer, or of all of them ----

    def _enter(self, place: int, module: nn.Module, args: tuple, kwargs: dict):
        x = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(x, Tensor):
            raise RuntimeError(
                f"{self.places[place][0]}: wanted hidden states as its first argument, "
                f"got {type(x).__name__}"
            )
        caches = (a for a in (*args, *kwargs.values()) if hasattr(a, "get_seq_length"))
        tasks = self._tasks(place, x, next(caches, None))
        call = self._calls[place] = TaskCall(tasks)
        if args and tasks.requires_grad and not torch.compiler.is_compiling():
            return (_Collect.apply(x, tasks, call), *args[1:]), kwargs
        return None

    def _leave(self, place: int, module: nn.Module, args: tuple, output: Any) -> None:
        call, self._calls[place] = self._calls[place], None
        if call is None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        trained = any(p.requires_grad for p in self.routers[place].parameters())
        if trained and not call.tasks.requires_grad:
            raise RuntimeError(
                f"{self.places[place][0]}: its task router ran without a graph, inside a reentrant "
                "checkpoint that does not reach to the end of the layers it serves; checkpoint "
                "with use_reentrant=False"
            )
        self._remember(place, call, output)

    def _tasks(self, place: int, x: Tensor, cache: Any) -> Tensor:
        router, mask = self.routers[place], self._padding()
        layer = None if cache is None else _cache_layer(cache, self._slots[place])
        started = layer is not None and layer.get_seq_length() > 0
        if self.attention == "causal":
            past = (layer.keys[:, 0], layer.values[:, 0]) if started else None
            tasks, new = router.extend(x, mask, past)
            if layer is not None:
                layer.update(*(t.unsqueeze(1) for t in new))
            return tasks
        if started:
            tasks = layer.keys[:, 0, -1]
        else:
            if self.attention == "prompt":
                mask = self._prompt_mask(x, mask, cache is not None and not self.training)
            tasks = router(x, mask)
        if layer is not None:
            # Once per token, so that whatever crops or reorders the cache treats it like the rest.
            same = tasks[:, None, None].expand(-1, 1, x.shape[1], -1)
            layer.update(same, same)
        return tasks

    def _prompt_mask(self, x: Tensor, mask: Tensor | None, generating: bool) -> Tensor | None:
        around = self._masks()
        given = around[0].prompt if around else self.prompt
        if given is None:
            if generating:
                return mask  # the first call with an empty cache has the prompt and nothing else
            raise RuntimeError(
                "prompt: wanted to know which tokens are the prompt, as attention='prompt'; call "
                "the model inside `with moelora_ops.prompt_mask(model, mask):`"
            )
        if given.shape != x.shape[:2]:
            raise ValueError(
                f"prompt: wanted shape {list(x.shape[:2])} like the input, got {list(given.shape)}"
            )
        prompt = given.to(x.device) != 0
        return prompt if mask is None else prompt & (mask.to(x.device) != 0)


@contextlib.contextmanager
def prompt_mask(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Say which tokens are the prompt, for the forward calls inside the block.

    For task routers with ``attention="prompt"``, which see nothing else.  Generation does not need
    it: there the first call has the prompt.

    Args:
        model: adapted with :class:`moelora_ops.OrchMoEConfig`.
        mask: ``[batch, length]``, nonzero on the tokens of the prompt.

    Raises:
        TypeError, ValueError: `mask` is no such tensor, or `model` has no task routers.
    """
    source = source_in(model, TaskRouters, "OrchMoEConfig")
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: wanted a tensor, got {type(mask).__name__}")
    if mask.dim() != 2:
        raise ValueError(f"mask: wanted shape [batch, length], got {list(mask.shape)}")
    before, source.prompt = source.prompt, mask
    try:
        yield
    finally:
        source.prompt = before


def check_attention(attention: str) -> None:
    check_choice("attention", attention, ATTENTION)


def _cache_layer(cache: Any, slot: int) -> Any:
    """The router's own layer in a transformers cache, behind those of the model.

    What generation does to a cache (reordering for beams, cropping) it then does to the router too.
    """
    cache = getattr(cache, "self_attention_cache", cache)
    from transformers.cache_utils import DynamicLayer

    while len(cache.layers) <= slot:
        cache.layers.append((cache.layer_class_to_replicate or DynamicLayer)())
    return cache.layers[slot]
