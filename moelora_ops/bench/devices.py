"""Where a benchmark runs: how calls are timed there, how much memory they take, and what it is."""

import functools
import math
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib import metadata

import torch

from .. import backends

# Messages of torch's profiler, which counts memory on the CPU; read when it first runs.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

Action = Callable[[], object]


class Cpu:
    """The processor: short calls are repeated inside a sample, and caches are as they come.

    Attributes:
        repeats: calls per sample.
    """

    copy_rate = None  # no floor is taken from it
    _LEAST_SAMPLE_SECONDS = 2e-3

    def __init__(self):
        self.repeats = 1

    def calibrate(self, call: Action) -> None:
        """Take as many repeats as make a sample of `call` long enough."""
        call()
        start = time.perf_counter()
        call()
        once = time.perf_counter() - start
        self.repeats = max(1, math.ceil(self._LEAST_SAMPLE_SECONDS / once))

    def sample(self, call: Action) -> float:
        """Seconds of one of `repeats` calls."""
        start = time.perf_counter()
        for _ in range(self.repeats):
            call()
        return (time.perf_counter() - start) / self.repeats

    def peak_bytes(self, call: Action, release: Action | None = None) -> int:
        """Most that tensor memory grows by during `call`, after whatever it frees at first.

        Counted from torch's own allocations: outputs, gradients, what is saved, scratch; not what a
        library allocates by itself.  `release` is for :class:`Cuda`.
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

    def facts(self) -> dict | None:
        """None: ``moelora_ops.info`` says all that there is."""
        return None


class Cuda:
    """A CUDA device: what it takes by its own clock, its L2 cache emptied before every call.

    A call's launches are queued while the device still sleeps, so that what is timed is the
    device's work and the gaps that it makes itself, as in a program whose host is ahead of it.
    What the host needs to queue a call is measured apart: where that is more than the device's
    time, a program that cannot run ahead waits for the host, or uses CUDA graphs.

    Attributes:
        repeats: calls per sample.
    """

    repeats = 1
    # Of torch.cuda._sleep; the clock may be lower, which makes it sleep longer.
    _CYCLES_PER_SECOND = 2e9

    def __init__(self):
        self._host_seconds: dict[Action, float] = {}
        properties = torch.cuda.get_device_properties()
        self._cache = torch.zeros(4 * properties.L2_cache_size, dtype=torch.uint8, device="cuda")
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def calibrate(self, call: Action) -> None:
        """Forget the calls of earlier cases; every sample is one call."""
        self._host_seconds.clear()

    def host_seconds(self, call: Action) -> float:
        """What the host needs to queue `call`, the median of five."""
        if call not in self._host_seconds:
            times = []
            for _ in range(5):
                torch.cuda.synchronize()
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
            torch.cuda.synchronize()
            self._host_seconds[call] = statistics.median(times)
        return self._host_seconds[call]

    def sample(self, call: Action) -> float:
        """Seconds of one call."""
        lead = 2 * self.host_seconds(call) + 20e-6
        # Read, not written: what is dirty in the cache would be written back at the call's expense.
        self._cache.view(torch.int32).amax()
        torch.cuda._sleep(int(lead * self._CYCLES_PER_SECOND))
        self._start.record()
        call()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3

    def captured(self, call: Action) -> Action:
        """`call` as a CUDA graph, which costs the host one launch.

        Raises:
            RuntimeError: it waits for the device, or does something else that no graph can.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # first-call costs must not be in the graph
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def peak_bytes(self, call: Action, release: Action | None = None) -> int:
        """Most that torch's memory on the device grows by during `call`.

        Args:
            call: what is measured.
            release: frees what `call` frees at first, such as the gradients of the last step.
        """
        if release is not None:
            release()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    @functools.cached_property
    def copy_rate(self) -> float:
        """Bytes per second of a large copy, what is read and what is written both counted."""
        source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
        copy = functools.partial(torch.empty_like(source).copy_, source)
        return 2 * source.nbytes / statistics.median(self.sample(copy) for _ in range(7))

    def clocks(self) -> dict[str, str]:
        """Clocks, temperature and power at this moment, if there is nvidia-smi to tell."""
        fields = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
        return dict(zip(fields, _nvidia_smi(*fields), strict=False))

    def facts(self) -> dict:
        """The device, its driver, what torch was built for, and a rate to measure others by."""
        properties = torch.cuda.get_device_properties()
        driver = _nvidia_smi("driver_version")
        return {
            "name": properties.name,
            "architecture": backends.architecture(torch.device("cuda")),
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "driver": driver[0] if driver else None,
            "cuda": torch.version.cuda,
            "triton": _triton_version(),
            "copy_bytes_per_second": self.copy_rate,
            "clocks": self.clocks(),
        }


def _nvidia_smi(*fields: str) -> list[str]:
    """What nvidia-smi tells of the current device; nothing if it does not run."""
    # By its name: numbers are others where CUDA_VISIBLE_DEVICES hides some.
    which = f"--id=GPU-{torch.cuda.get_device_properties().uuid}"
    command = ["nvidia-smi", which, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [value.strip() for value in done.stdout.split(",")]


def _triton_version() -> str | None:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None


Device = Cpu | Cuda


@functools.cache
def device(device_type: str) -> Device:
    """The device that torch calls `device_type`: "cpu" or "cuda".

    Raises:
        RuntimeError: there is none.
    """
    if device_type == "cpu":
        return Cpu()
    if not torch.cuda.is_available():
        raise RuntimeError("device: wanted cuda, but there is no CUDA device")
    return Cuda()
