"""Checks, memory and interleaved timing of one case."""

import dataclasses
import math
import os
import random
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import backends
from . import numerics
from .baselines import TouchedLinear
from .method import DTYPES, Method
from .numerics import TRAIN, InputsError, NumericsError

# Messages of torch's profiler, which peak_bytes uses; read when it first runs.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

BASE = "base"
TOUCH = "touch"
_MIN_ROUNDS = 3
_MIN_SAMPLE_SECONDS = 2e-3


class Settings(NamedTuple):
    """How long to measure.

    Attributes:
        rounds: most rounds; every variant is sampled once a round.
        seconds: of measuring after which a case ends early.
        seed: of the inputs and of the order inside the rounds.
        variants: names to measure, or None for all.
        compile: whether to measure the compiled variants.
    """

    rounds: int = 60
    seconds: float = 20.0
    seed: int = 0
    variants: tuple[str, ...] | None = None
    compile: bool = True


class Competition(NamedTuple):
    """A case made ready: the variants built, checked and warm.

    Attributes:
        x, dy: the inputs.
        layers: what to time, by name; the frozen linear first, then the same with x and y touched.
        skipped: why a variant is not among them, by name.
        coarse: baselines among them that round more than their budget allows, and where, by name.
        errors: of each checked variant and quantity.
    """

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
    exam = _Exam(method, case, direction, settings.seed)
    layer, outputs = exam.layer, exam.outputs
    builders = {variant.name: variant.build for variant in method.variants}
    plain = outputs(builders[method.plain](case, layer))
    exam.check_baseline(method.plain, plain)

    layers: dict[str, nn.Module] = {BASE: layer.base, TOUCH: TouchedLinear(layer.base)}
    skipped, coarse, errors = {}, {}, {}
    for variant in method.variants:
        if settings.variants is not None and variant.name not in settings.variants:
            continue
        module = variant.build(case, layer)
        if module is None:
            continue
        if variant.compiled:
            if not settings.compile:
                skipped[variant.name] = "compiling was switched off"
                continue
            module = torch.compile(module, dynamic=False)
            try:
                outputs(module)
            except Exception as error:  # whatever the compiler runs into is a reason to skip it
                first_line = str(error).strip().partition("\n")[0]
                skipped[variant.name] = f"torch.compile: {type(error).__name__}: {first_line}"
                continue
        layers[variant.name], got = module, outputs(module)
        if not variant.baseline:
            errors[variant.name] = numerics.check_numerics(variant.name, got, plain, exam.want)
            continue
        try:
            errors[variant.name] = exam.check_baseline(variant.name, got)
        except NumericsError as failure:
            if variant.compiled or DTYPES[case.dtype].itemsize > 2:
                raise
            wide = dataclasses.replace(case, dtype="fp32")
            again = _Exam(method, wide, direction, settings.seed)
            again.check_baseline(variant.name, again.outputs(variant.build(wide, again.layer)))
            coarse[variant.name] = str(failure)
            errors[variant.name] = {k: numerics.error(got[k], t) for k, t in exam.want.items()}
    return Competition(exam.x, exam.dy, layers, skipped, coarse, errors)


class _Exam:
    """The inputs of a case, and what its variants are held to."""

    def __init__(self, method: Method, case: Any, direction: str, seed: int):
        self.direction = direction
        self.layer, self.x, self.dy = method.make_inputs(case, seed)
        exact, literal = (method.reference(self.layer, t) for t in (torch.float64, self.x.dtype))
        self.want = numerics.run(exact, self.x.double(), self.dy.double(), direction)
        self.literal = self.outputs(literal)

    def outputs(self, module: nn.Module) -> dict[str, Tensor]:
        return numerics.run(module, self.x, self.dy, self.direction)

    def check_baseline(self, name: str, got: dict[str, Tensor]) -> dict[str, numerics.Error]:
        return numerics.check_numerics(name, got, self.literal, self.want, factor=4)


def make_call(layer: nn.Module, x: Tensor, dy: Tensor, direction: str) -> Callable[[], None]:
    """One forward call, or the forward and backward of one training step, as a user makes it."""
    if direction != TRAIN:

        def forward():
            with torch.no_grad():
                layer(x)

        return forward

    x = x.detach().requires_grad_()
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def step():
        for leaf in leaves:
            leaf.grad = None
        layer(x).backward(dy)

    return step


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


def peak_bytes(call: Callable[[], object]) -> int:
    """Most that tensor memory grows by during `call`, after whatever it frees at first.

    Counted from torch's own allocations on the CPU: outputs, gradients, what is saved, scratch;
    not what a library allocates by itself.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    in_use = least = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        in_use += event.nbytes()
        least = min(least, in_use)
        peak = max(peak, in_use - least)
    return peak


def time_rounds(
    calls: dict[str, Callable[[], None]],
    settings: Settings,
    on_round: Callable[[float], None] = lambda share: None,
) -> tuple[dict[str, list[float]], int]:
    """Seconds per call of each variant, one sample a round, in a new random order every round.

    Neighbours in time share the machine's mood, so ratios are taken inside a round.  Short calls
    are repeated inside a sample; the first call's time says how often.

    Args:
        calls: by name, all warm.
        settings: rounds, seconds and seed.
        on_round: told after each round what share of the measurement is done.

    Returns:
        The samples by name, and the calls per sample.
    """
    first = calls[next(iter(calls))]
    first()
    start = time.perf_counter()
    first()
    repeats = max(1, math.ceil(_MIN_SAMPLE_SECONDS / (time.perf_counter() - start)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(settings.seed).shuffle
    begin = time.perf_counter()
    for done in range(1, settings.rounds + 1):
        shuffle(order)
        for name in order:
            call = calls[name]
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            samples[name].append((time.perf_counter() - start) / repeats)
        spent = time.perf_counter() - begin
        on_round(min(1.0, max(done / settings.rounds, spent / settings.seconds)))
        if spent > settings.seconds and done >= _MIN_ROUNDS:
            break
    return samples, repeats


def summarize(samples: dict[str, list[float]], floor: float) -> dict[str, dict]:
    """Time, overhead and tax of each variant over the frozen base.

    Args:
        samples: seconds by variant and round.
        floor: least overhead by arithmetic.

    Returns:
        By variant: ``median_ms`` and ``min_ms``; ``overhead``, the median over rounds of time /
        base - 1; ``overhead_of_minima``; ``tax``, layer / base; ``times_floor``, overhead in
        floors.
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
            "times_floor": None if name == BASE else overhead / floor,
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
        bytes saved for backward and those at the peak of a step (training only) and the errors;
        which are ``coarse``, see :func:`prepare`; or ``refused``, with no figure at all, if a
        variant is wrong or there are no inputs to check it on.
    """
    dtype = DTYPES[case.dtype]
    floors = method.floors(case, direction)
    record = {
        "case": case.name,
        "shape": str(case),
        "dtype": case.dtype,
        "direction": direction,
        "backend": backends.choose(torch.device("cpu"), dtype),
        "floors": floors._asdict(),
        "memory_target": method.memory_target(case) if direction == TRAIN else None,
    }
    try:
        ready = prepare(method, case, direction, settings)
    except (NumericsError, InputsError) as error:
        return record | {"refused": str(error)}
    calls = {n: make_call(layer, ready.x, ready.dy, direction) for n, layer in ready.layers.items()}
    for call in calls.values():
        call()  # first-call costs: allocator, primitive caches, backward graphs of the compiler
    samples, repeats = time_rounds(calls, settings, on_round)
    variants = summarize(samples, min(floors))
    for name, layer in ready.layers.items():
        if direction == TRAIN:
            variants[name]["saved_bytes"] = saved_bytes(layer, ready.x)
            variants[name]["peak_bytes"] = peak_bytes(calls[name])
        if name in ready.errors:
            variants[name]["errors"] = {k: e._asdict() for k, e in ready.errors[name].items()}
    return record | {
        "rounds": len(samples[BASE]),
        "calls_per_sample": repeats,
        "variants": variants,
        "skipped": ready.skipped,
        "coarse": ready.coarse,
    }
