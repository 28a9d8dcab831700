"""Where layers of skills get their tasks from: a router over hidden states, or ids of the caller.

A source hangs in the model as a companion and hooks the modules around the layers, so that any
model runs unmodified.  What it says holds for one forward call, :class:`TaskCall`, and holds again
in the backward of that call, where gradient checkpointing runs the layers once more:

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
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..companions import Companion, check_model, companions_of
from ..depth import numbered_layer
from .checks import check_count


class TaskCall:
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


class TaskSource(Companion):
    """Base class: the calls that layers read from, and the hooks that set them.

    ``layer.tasks_from`` of every layer served is a function that returns its tasks.
    """

    missing: ClassVar[str]

    def __init__(self):
        super().__init__()
        self._calls: list[Any] = []  # one slot per place: a TaskCall, and what else a call has
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
        holders = {"": None} | {h: None for name in layers for h in holders_of(model, name)}
        for name in holders:
            hook = model.get_submodule(name).register_forward_hook(self._leave)
            self._handles.append(hook)
        for layer in layers.values():
            layer.tasks_from = partial(self.read, 0)

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        call = self._calls[0]
        if call is not None and not torch.compiler.is_compiling():
            self._remember(0, call, output)


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
    source = source_in(model, TaskIds, "PolytroponConfig")
    check_ids("ids", ids, source.num_tasks)
    if ids.dim() != 1:
        raise ValueError(f"ids: wanted shape [batch], got {list(ids.shape)}")
    before = source._calls[0]
    source._calls[0] = TaskCall(ids)
    try:
        yield
    finally:
        source._calls[0] = before


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


def source_in(model: nn.Module, kind: type, config: str) -> Any:
    check_model(model)
    found = [c for c in companions_of(model).values() if isinstance(c, kind)]
    if not found:
        raise ValueError(f"model: wanted one adapted with {config}, got one without its layers")
    return found[0]


def holders_of(model: nn.Module, name: str) -> list[str]:
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
