"""Checks, memory and interleaved timing of one case."""

import dataclasses
import functools
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import backends
from . import devices, numerics
from .baselines import TouchedLinear
from .devices import Device
from .method import DTYPES, Method, Variant, Within
from .numerics import DX, FORWARD, TRAIN, InputsError, NumericsError

BASE = "base"
TOUCH = "touch"
WAITS = "it waits for the device, which no CUDA graph can hold"
_MIN_ROUNDS = 3


class Settings(NamedTuple):
    """How long to measure.

    Attributes:
        rounds: most rounds; every variant is sampled once a round.
        seconds: of measuring after which a case ends early.
        seed: of the inputs and of the order inside the rounds.
        variants: names to measure, or None for all.
        compile: whether to measure the compiled variants.
        device: "cpu" or "cuda".
        backends: several on which our layer competes once each; else it runs on the one in force.
        graphs: replay every call as a CUDA graph.
    """

    rounds: int = 60
    seconds: float = 20.0
    seed: int = 0
    variants: tuple[str, ...] | None = None
    compile: bool = True
    device: str = "cpu"
    backends: tuple[str, ...] = ()
    graphs: bool = False


class Competition(NamedTuple):
    """A case made ready: the variants built, checked and warm.

    Attributes:
        layer: our layer; every variant has its parameters.
        x, dy: the inputs.
        layers: what to time, by name; the frozen linear first, then the same with x and y touched.
        skipped: why a variant is not among them, by name.
        coarse: baselines among them that round more than their budget allows, and where, by name.
        errors: of each checked variant and quantity.
    """

    layer: nn.Module
    x: Tensor
    dy: Tensor
    layers: dict[str, nn.Module]
    skipped: dict[str, str]
    coarse: dict[str, str]
    errors: dict[str, dict[str, numerics.Error]]


def prepare(method: Method, case: Any, direction: str, settings: Settings) -> Competition:
    """Build every variant and hold it to its error budget.

    A baseline may err four times as much as the reference run in the same dtype: enough for
    rounding in other places, not for another function.  One that exceeds this in 16 bits and keeps
    to it in float32 is the right function, coarsely rounded, as the papers' code may be: it
    competes, and is marked.  Our layer may err twice as much as the method's plain baseline.

    Raises:
        NumericsError: a variant is wrong; nothing of this case may be reported then.
    """
    if settings.compile:
        # Recompilations are limited per code object, and every case is a new shape.
        torch.compiler.reset()
    exam = _Exam(method, case, direction, settings)
    layer, outputs = exam.layer, exam.outputs
    builders = {variant.name: variant.build for variant in method.variants}
    plain = outputs(exam.build(builders[method.plain]))
    exam.check_baseline(method.plain, plain)

    layers: dict[str, nn.Module] = {BASE: layer.base, TOUCH: TouchedLinear(layer.base)}
    skipped, coarse, errors = {}, {}, {}
    for variant in _competitors(method, settings):
        module = exam.build(variant.build)
        if module is None:
            continue
        if variant.waits and settings.graphs:
            skipped[variant.name] = WAITS
            continue
        if variant.compiled:
            if not settings.compile:
                skipped[variant.name] = "compiling was switched off"
                continue
            module = torch.compile(module, dynamic=False)
        try:
            got = outputs(module)
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError) and variant.baseline:
                skipped[variant.name] = "out of memory"
            elif variant.compiled:  # whatever the compiler runs into is a reason to skip it
                skipped[variant.name] = f"torch.compile: {_in_a_line(error)}"
            else:
                raise
            continue
        layers[variant.name] = module
        if not variant.baseline:
            errors[variant.name] = numerics.check_numerics(variant.name, got, plain, exam.want)
            continue
        try:
            errors[variant.name] = exam.check_baseline(variant.name, got)
        except NumericsError as failure:
            if variant.compiled or DTYPES[case.dtype].itemsize > 2:
                raise
            wide = dataclasses.replace(case, dtype="fp32")
            again = _Exam(method, wide, direction, settings)
            again.check_baseline(variant.name, again.outputs(again.build(variant.build)))
            coarse[variant.name] = str(failure)
            errors[variant.name] = {k: numerics.error(got[k], t) for k, t in exam.want.items()}
    return Competition(layer, exam.x, exam.dy, layers, skipped, coarse, errors)


def _competitors(method: Method, settings: Settings) -> Iterator[Variant]:
    """The variants that are wanted, ours once for each back end if there are several."""
    for variant in method.variants:
        if settings.variants is not None and variant.name not in settings.variants:
            continue
        if variant.baseline or not settings.backends:
            yield variant
            continue
        for backend in settings.backends:
            build = functools.partial(_on_backend, backend, variant.build)
            yield variant._replace(name=f"{variant.name}-{backend}", build=build)


def _on_backend(backend: str, build: Callable, case: Any, layer: nn.Module) -> nn.Module | None:
    built = build(case, layer)
    if built is None:
        return None
    return Within(functools.partial(backends.use_backend, backend), built)


def _in_a_line(error: Exception) -> str:
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line}"


class _Exam:
    """The inputs of a case, and what its variants are held to."""

    def __init__(self, method: Method, case: Any, direction: str, settings: Settings):
        self.case, self.direction = case, direction
        self.device = torch.device(settings.device)
        with self.device:
            self.layer, self.x, self.dy = method.make_inputs(case, settings.seed)
        if direction == DX:
            self.layer.requires_grad_(False)
        exact, literal = (method.reference(self.layer, t) for t in (torch.float64, self.x.dtype))
        self.want = numerics.run(exact, self.x.double(), self.dy.double(), direction)
        self.literal = self.outputs(literal)

    def build(self, build: Callable[[Any, nn.Module], nn.Module | None]) -> nn.Module | None:
        with self.device:
            return build(self.case, self.layer)

    def outputs(self, module: nn.Module) -> dict[str, Tensor]:
        return numerics.run(module, self.x, self.dy, self.direction)

    def check_baseline(self, name: str, got: dict[str, Tensor]) -> dict[str, numerics.Error]:
        return numerics.check_numerics(name, got, self.literal, self.want, factor=4)


class Call:
    """One forward call, or the forward and backward of one training step, as a user makes it."""

    def __init__(self, layer: nn.Module, x: Tensor, dy: Tensor, direction: str):
        self.layer, self.x, self.dy = layer, x, dy
        self.leaves: list[Tensor] = []
        if direction != FORWARD:
            self.x = x.detach().requires_grad_()
            self.leaves = [self.x, *(p for p in layer.parameters() if p.requires_grad)]

    def __call__(self) -> None:
        if not self.leaves:
            with torch.no_grad():
                self.layer(self.x)
            return
        self.release()
        self.layer(self.x).backward(self.dy)

    def release(self) -> None:
        """Free the gradients of the last step, as the next one does at first."""
        for leaf in self.leaves:
            leaf.grad = None


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """What a forward call keeps for its backward beyond x and the parameters.

    Sums the distinct storages that autograd packs (``torch.autograd.graph.saved_tensors_hooks``),
    each in full: a view keeps all of its storage alive.
    """
    x = x.detach().requires_grad_()
    known = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters(), *layer.buffers())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)  # alive until the sum is taken, so that no address is used twice
    del y
    return sum(kept.values())


def least_bytes(layer: nn.Module, x: Tensor, dy: Tensor, direction: str) -> int:
    """What an adapter has to move beside a frozen linear whose products it does not share.

    Forward it reads x and writes y, for dx it reads dy and writes dx, for the gradients of its
    parameters it reads both x and dy; its parameters each time, or their gradients.
    """
    frozen = {id(p) for p in layer.base.parameters()}
    parameters = sum(p.nbytes for p in layer.parameters() if id(p) not in frozen)
    return {FORWARD: 1, DX: 2, TRAIN: 3}[direction] * (x.nbytes + dy.nbytes + parameters)


def time_rounds(
    calls: dict[str, Callable[[], object]],
    settings: Settings,
    on_round: Callable[[float], None] = lambda share: None,
) -> tuple[dict[str, list[float]], int]:
    """Seconds per call of each variant, one sample a round, in a new random order every round.

    Neighbours in time share the machine's mood, so ratios are taken inside a round.  Where the
    device wants it, short calls are repeated inside a sample; the first call's time says how often.

    Args:
        calls: by name, all warm.
        settings: rounds, seconds, seed and device.
        on_round: told after each round what share of the measurement is done.

    Returns:
        The samples by name, and the calls per sample.
    """
    device = devices.device(settings.device)
    device.calibrate(calls[next(iter(calls))])
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(settings.seed).shuffle
    begin = time.perf_counter()
    for done in range(1, settings.rounds + 1):
        shuffle(order)
        for name in order:
            samples[name].append(device.sample(calls[name]))
        spent = time.perf_counter() - begin
        on_round(min(1.0, max(done / settings.rounds, spent / settings.seconds)))
        if spent > settings.seconds and done >= _MIN_ROUNDS:
            break
    return samples, device.repeats


def summarize(samples: dict[str, list[float]], floor: float | None) -> dict[str, dict]:
    """Time, overhead and tax of each variant over the frozen base.

    Args:
        samples: seconds by variant and round.
        floor: least overhead, if one is known.

    Returns:
        By variant: ``median_ms`` and ``min_ms``; ``overhead``, the median over rounds of time /
        base - 1; ``overhead_of_minima``; ``tax``, layer / base; ``times_floor``, overhead in
        floors, or None.
    """
    base = samples[BASE]
    summary = {}
    for name, times in samples.items():
        overhead = statistics.median(t / b for t, b in zip(times, base, strict=True)) - 1
        summary[name] = {
            "median_ms": statistics.median(times) * 1e3,
            "min_ms": min(times) * 1e3,
            "overhead": overhead,
            "overhead_of_minima": min(times) / min(base) - 1,
            "tax": 1 + overhead,
            "times_floor": None if name == BASE or floor is None else overhead / floor,
        }
    return summary


def run_case(
    method: Method,
    case: Any,
    direction: str,
    settings: Settings,
    on_round: Callable[[float], None] = lambda share: None,
) -> dict:
    """Check, then measure one case in one direction.

    Returns:
        A record for json: the case, its floors, and per variant what :func:`summarize` says, the
        bytes saved for backward (where there is one), those at the peak of a call, the errors, and
        on a GPU what the host needs to queue a call; which are ``coarse``, see :func:`prepare`; or
        ``refused``, with no figure at all, if a variant is wrong or there are no inputs to check it
        on.
    """
    dtype, place = DTYPES[case.dtype], torch.device(settings.device)
    record = {
        "case": case.name,
        "shape": str(case),
        "tokens": case.tokens,
        "dtype": case.dtype,
        "direction": direction,
        "graphs": settings.graphs,
        "backend": ", ".join(settings.backends) or backends.choose(place, dtype, case.mix),
        "mix": case.mix,
        "floors": method.floors(case, direction)._asdict(),
        "memory_target": None if direction == FORWARD else method.memory_target(case),
    }
    try:
        ready = prepare(method, case, direction, settings)
    except (NumericsError, InputsError) as error:
        return record | {"refused": str(error)}
    except torch.OutOfMemoryError:
        return record | {"refused": "out of memory"}
    calls = {n: Call(layer, ready.x, ready.dy, direction) for n, layer in ready.layers.items()}
    for call in calls.values():
        call()  # first-call costs: allocator, primitive caches, backward graphs of the compiler
    device, skipped = devices.device(settings.device), dict(ready.skipped)
    timed = captured(device, calls, skipped) if settings.graphs else calls
    samples, repeats = time_rounds(timed, settings, on_round)
    on_gpu = device.copy_rate is not None
    if on_gpu:
        # There the arithmetic of a skinny product hides behind its memory.
        seconds = least_bytes(ready.layer, ready.x, ready.dy, direction) / device.copy_rate
        record["floors"] = {"memory": seconds / statistics.median(samples[BASE])}
        record["clocks"] = device.clocks()
    variants = summarize(samples, min(record["floors"].values()))
    for name, variant in variants.items():
        layer, call = ready.layers[name], calls[name]
        if on_gpu:
            variant["host_ms"] = device.host_seconds(timed[name]) * 1e3
        if direction != FORWARD:
            variant["saved_bytes"] = saved_bytes(layer, ready.x)
            variant["peak_bytes"] = device.peak_bytes(call, call.release)
        if name in ready.errors:
            variant["errors"] = {k: e._asdict() for k, e in ready.errors[name].items()}
    return record | {
        "rounds": len(samples[BASE]),
        "calls_per_sample": repeats,
        "variants": variants,
        "skipped": skipped,
        "coarse": ready.coarse,
    }


def captured(
    device: Device, calls: dict[str, Callable[[], object]], skipped: dict[str, str]
) -> dict[str, Callable[[], object]]:
    """`calls` as CUDA graphs; why one cannot be goes to `skipped`, unless it is the base."""
    graphs = {}
    for name, call in calls.items():
        try:
            graphs[name] = device.captured(call)
        except RuntimeError as error:
            if name == BASE:
                raise
            skipped[name] = f"CUDA graph: {_in_a_line(error)}"
    return graphs
