"""Where layers of skills get their tasks from: a router over hidden states, or ids of the caller.

A source hangs in the model as a companion and hooks the modules around the layers, so that any
model runs unmodified.  What it says holds for one forward call, :class:`_Call`, and holds again in
the backward of that call, where gradient checkpointing runs the layers once more:

    forward         the hook before the decoder layer sets the call; layers read it
    end of forward  the hook after it clears the call, and hooks the gradients of the outputs
    backward        those gradients are the first of the decoder layer; their hooks set the call
    recomputation   the layers read the same tasks, whatever ran in the meantime

Noise is drawn by the layers from torch's generator, whose state checkpointing puts back.

The reentrant mode runs a backward inside the backward, which would free the router's graph at the
first layer.  Recomputed layers therefore read a leaf, and a node behind the decoder layer's input,
which runs after all of them, hands the leaf's gradient to the router.
"""

import contextlib
import inspect
import math
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import reference
from ..companions import Companion, companions_of
from ..depth import numbered_layer

ATTENTION = ("causal", "prompt", "sequence")
_NO_ARGUMENT = "no argument"
_EPSILON = 1e-6  # in a root mean square


class TaskRouter(nn.Module):
    """Which abstract tasks a sequence belongs to: ``softmax(mean_t(X̂) Wᵀ + b)`` (OrchMoE).

    ``X̂ = softmax(X Xᵀ/√d) X + X`` and the linear are quoted from the paper (2401.10559); the mean
    over tokens and the softmax are our reading, and so is the causal form.

    Args:
        in_features: d, width of the hidden states X.
        num_tasks: number of abstract tasks.
        causal: attend and average over the positions up to each one, which gives tasks per token;
            otherwise over the whole sequence.
        normalize: divide each hidden state by its root mean square first (our choice; the quoted
            formula does not).  In language models single tokens of a hundredfold norm, such as the
            first one, otherwise are all that attention and mean see: in SmolLM2-135M the tasks were
            the same for every input from layer 5 on.
        device, dtype: of the parameters.

    Parameters:
        weight, bias: ``[num_tasks, in_features]`` and ``[num_tasks]``, initialised like
            ``nn.Linear`` (our choice).
    """

    def __init__(
        self,
        in_features: int,
        num_tasks: int,
        causal: bool = False,
        normalize: bool = True,
        *,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_count("in_features", in_features)
        check_count("num_tasks", num_tasks)
        self.in_features, self.num_tasks = in_features, num_tasks
        self.causal, self.normalize = causal, normalize
        self.weight = nn.Parameter(torch.empty(num_tasks, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_tasks, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Both uniform within ±1/√d."""
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Probabilities of the tasks, see :meth:`extend`."""
        return self.extend(x, mask)[0]

    def extend(
        self, x: Tensor, mask: Tensor | None = None, past: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Tasks of `x` behind earlier positions, and what `x` adds to the past.

        Args:
            x: ``[batch, length, d]``.
            mask: ``[batch, past + length]``, nonzero on real tokens; None if all are.
            past: X (normalised, if so) and X̂ of earlier positions, each ``[batch, past, d]``;
                causal only.

        Returns:
            Probabilities, at least float32, ``[batch, num_tasks]``, or per token
            ``[batch, length, num_tasks]`` if causal; and X and X̂ of these positions, each
            ``[batch, length, d]``.  Where nothing real is to be seen the mean is 0.

        Raises:
            ValueError: a shape does not fit; the message names the argument.
        """
        if x.dim() != 3 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"x: wanted shape [batch, length, {self.in_features}], got {list(x.shape)}"
            )
        wide = torch.promote_types(x.dtype, torch.float32)
        if self.normalize:
            square = x.to(wide).square().mean(-1, keepdim=True)
            x = (x * torch.rsqrt(square + _EPSILON)).to(x.dtype)
        keys = x if past is None else torch.cat([past[0], x], 1)
        if mask is not None:
            if mask.shape != keys.shape[:2]:
                raise ValueError(
                    f"mask: wanted shape {list(keys.shape[:2])}, got {list(mask.shape)}"
                )
            mask = mask.to(device=x.device) != 0
        attended = self._attend(x, keys, mask) + x
        seen = attended if past is None else torch.cat([past[1], attended], 1)
        real = torch.ones_like(seen[..., 0], dtype=torch.bool) if mask is None else mask
        real = real.unsqueeze(-1)
        terms = seen.to(wide).where(real, 0)
        if self.causal:
            pooled = terms.cumsum(1) / real.cumsum(1).clamp(min=1)
            pooled = pooled[:, keys.shape[1] - x.shape[1] :]
        else:
            pooled = terms.sum(1) / real.sum(1).clamp(min=1)
        with reference.no_autocast(x.device.type):  # the softmax's logits stay wide
            logits = F.linear(pooled, self.weight.to(wide), self.bias.to(wide))
        return logits.softmax(-1), (x, attended)

    def _attend(self, x: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
        new, total = x.shape[1], keys.shape[1]
        if mask is None and (not self.causal or new == total):
            return _attention(x, keys, is_causal=self.causal)
        allowed = torch.ones(new, total, dtype=torch.bool, device=x.device)
        own = allowed.triu(total - new).tril(total - new)
        if self.causal:
            allowed = allowed.tril(total - new)
        if mask is not None:
            # Padding sees itself: a softmax over nothing would be NaN.  It is left out of the mean.
            allowed = (allowed & mask.unsqueeze(1)) | own
            allowed = allowed.unsqueeze(1)
        return _attention(x, keys, attn_mask=allowed)

    def extra_repr(self) -> str:
        shown = ("in_features", "num_tasks", "causal", "normalize")
        return ", ".join(f"{name}={getattr(self, name)}" for name in shown)


def _attention(x: Tensor, keys: Tensor, **options) -> Tensor:
    """softmax(x keysᵀ/√d) keys, with one head."""
    keys = keys.unsqueeze(1)
    return F.scaled_dot_product_attention(x.unsqueeze(1), keys, keys, **options).squeeze(1)


class _Call:
    """The tasks of one forward call."""

    def __init__(self, tasks: Tensor):
        self.tasks = tasks
        self.leaf: Tensor | None = None

    def read(self) -> Tensor:
        if torch.compiler.is_compiling() or not self.tasks.requires_grad:
            return self.tasks
        if torch._C._current_graph_task_id() == -1:
            return self.tasks
        if self.leaf is None:  # inside a backward, hence recomputing
            self.leaf = self.tasks.detach().requires_grad_()
        return self.leaf


class _Masks(NamedTuple):
    """What a model was called with that its routers need: attention_mask, and the prompt."""

    attention: Any  # _NO_ARGUMENT of a module that takes none
    prompt: Tensor | None


class _Collect(torch.autograd.Function):
    """Identity on the input of the layers; its backward hands the leaf's gradient to the tasks."""

    @staticmethod
    def forward(ctx, x: Tensor, tasks: Tensor, call: _Call) -> Tensor:
        ctx.call = call
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx: Tensor):
        leaf, ctx.call.leaf = ctx.call.leaf, None
        return dx, None if leaf is None else leaf.grad, None


class TaskSource(Companion):
    """Base class: the calls that layers read from, and the hooks that set them.

    ``layer.tasks_from`` of every layer served is a function that returns its tasks.
    """

    missing: ClassVar[str]

    def __init__(self):
        super().__init__()
        self._calls: list[Any] = []  # one slot per place: a _Call, and what else a call has
        self._before: dict[tuple[int, int], Any] = {}
        self._handles: list = []

    def read(self, place: int) -> Tensor:
        """The tasks of the layers at `place`."""
        call = self._calls[place]
        if call is None:
            raise RuntimeError(self.missing)
        return call.read()

    def _start_over(self, places: int) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._calls = [], [None] * places

    def _remember(self, place: int, call: Any, output: Any) -> None:
        """Have the backward of `output` set `call` again before it reaches the layers."""
        for t in _tensors(output):
            if t.grad_fn is not None:
                t.register_hook(partial(self._recall, place, call))

    def _recall(self, place: int, call: Any, gradient: Tensor) -> None:
        backward = (place, torch._C._current_graph_task_id())
        if backward not in self._before:
            self._before[backward] = self._calls[place]

            def forget():
                self._calls[place] = self._before.pop(backward)

            torch.autograd.Variable._execution_engine.queue_callback(forget)
        self._calls[place] = call

    def __getstate__(self):
        # The last call's tasks belong to its autograd graph: not to be copied or pickled.
        return {**self.__dict__, "_calls": [None] * len(self._calls), "_before": {}}


class TaskIds(TaskSource):
    """Task ids that the caller names around a forward call, see :func:`task_ids`.

    Args:
        num_tasks: ids are below it.
    """

    arguments = ("num_tasks",)
    missing = (
        "tasks: wanted task ids, got none; call the model inside "
        "`with moelora_ops.task_ids(model, ids):`, or pass tasks to the layer"
    )

    def __init__(self, num_tasks: int, *, device=None, dtype=None):
        super().__init__()
        check_count("num_tasks", num_tasks)
        self.num_tasks = num_tasks

    def attach(self, model: nn.Module, layers: dict[str, nn.Module]) -> None:
        """See :meth:`Companion.attach`; hooks what holds the stacks of layers."""
        self._start_over(1)
        holders = {"": None} | {h: None for name in layers for h in _holders(model, name)}
        for name in holders:
            hook = model.get_submodule(name).register_forward_hook(self._leave)
            self._handles.append(hook)
        for layer in layers.values():
            layer.tasks_from = partial(self.read, 0)

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        call = self._calls[0]
        if call is not None and not torch.compiler.is_compiling():
            self._remember(0, call, output)


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
            h: None for reads, *_ in self.places for h in _holders(model, reads)
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
        call = self._calls[place] = _Call(tasks)
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
def task_ids(model: nn.Module, ids: Tensor) -> Iterator[None]:
    """Name the task of each example for the forward calls inside the block (Polytropon's layers).

        with moelora_ops.task_ids(model, torch.tensor([0, 2, 2, 1])):
            loss = model(**batch).loss
        loss.backward()

    Args:
        model: adapted with :class:`moelora_ops.PolytroponConfig`.
        ids: integers ``[batch]`` in 0..num_tasks-1.

    Raises:
        TypeError, ValueError: `ids` are no such integers, or no layer of `model` takes ids.
    """
    source = _companion(model, TaskIds, "PolytroponConfig")
    check_ids("ids", ids, source.num_tasks)
    if ids.dim() != 1:
        raise ValueError(f"ids: wanted shape [batch], got {list(ids.shape)}")
    before = source._calls[0]
    source._calls[0] = _Call(ids)
    try:
        yield
    finally:
        source._calls[0] = before


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
    source = _companion(model, TaskRouters, "OrchMoEConfig")
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: wanted a tensor, got {type(mask).__name__}")
    if mask.dim() != 2:
        raise ValueError(f"mask: wanted shape [batch, length], got {list(mask.shape)}")
    before, source.prompt = source.prompt, mask
    try:
        yield
    finally:
        source.prompt = before


def check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: wanted an int of at least 1, got {value!r}")


def check_bool(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: wanted a bool, got {value!r}")


def check_attention(attention: str) -> None:
    if attention not in ATTENTION:
        raise ValueError(f"attention: wanted one of {ATTENTION}, got {attention!r}")


def check_ids(name: str, ids: Tensor, num_tasks: int) -> None:
    """Integers in range; on an accelerator, and in a graph, an assertion on the device."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name}: wanted an integer tensor, got {type(ids).__name__}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name}: wanted an integer dtype, got {ids.dtype}")
    wanted = f"{name}: wanted task ids in 0..{num_tasks - 1}"
    inside = ((ids >= 0) & (ids < num_tasks)).all()
    if torch.compiler.is_compiling() or ids.device.type != "cpu":
        torch._assert_async(inside, wanted)
    elif not inside:
        outside = ids[(ids < 0) | (ids >= num_tasks)]
        raise ValueError(f"{wanted}, got {outside[0].item()}")


def _companion(model: nn.Module, kind: type, config: str) -> Any:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: wanted a torch.nn.Module, got {type(model).__name__}")
    found = [c for c in companions_of(model).values() if isinstance(c, kind)]
    if not found:
        raise ValueError(f"model: wanted one adapted with {config}, got one without its layers")
    return found[0]


def _holders(model: nn.Module, name: str) -> list[str]:
    """Names of the modules on the way from the root to the stack that `name` sits in."""
    layer = numbered_layer(model, name)
    parts = layer.name.split(".")[:-1] if layer else []
    above = [".".join(parts[:i]) for i in range(len(parts) + 1)]
    return [n for n in above if not isinstance(model.get_submodule(n), nn.ModuleList)]


def _tensors(output: Any) -> Iterator[Tensor]:
    """Every tensor in a module's output: in tuples, lists and mappings, at any depth."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from _tensors(item)
    elif isinstance(output, dict):
        yield from _tensors(list(output.values()))


def _cache_layer(cache: Any, slot: int) -> Any:
    """The router's own layer in a transformers cache, behind those of the model.

    What generation does to a cache (reordering for beams, cropping) it then does to the router too.
    """
    cache = getattr(cache, "self_attention_cache", cache)
    from transformers.cache_utils import DynamicLayer

    while len(cache.layers) <= slot:
        cache.layers.append((cache.layer_class_to_replicate or DynamicLayer)())
    return cache.layers[slot]
