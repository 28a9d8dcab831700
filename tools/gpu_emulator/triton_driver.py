"""A Triton driver without a GPU.

Everything up to the launch is Triton's own: specialisation, compilation down to a binary, limits on
shared memory and threads.  The launch is recorded, and executed from the PTX if wanted.  Works with
Triton 3.6 to 3.9.
"""

import contextlib
import functools
import os
import re
import struct
import subprocess
import time
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver as triton_driver
from triton.runtime.cache import get_cache_manager

from .counting import Counts
from .machine import run
from .ptx import load


class Device(NamedTuple):
    max_shared: int  # bytes a block can have
    multiprocessors: int
    warp_size: int = 32


# The largest parts of each architecture: A100, H200, B200, MI300X.
DEVICES = {
    ("cuda", 80): Device(166912, 108),
    ("cuda", 90): Device(232448, 132),
    ("cuda", 100): Device(232448, 148),
    ("hip", "gfx942"): Device(65536, 304, 64),
}


class Resources(NamedTuple):
    """Of a compiled kernel, per thread."""

    registers: int
    stack: int  # bytes; what does not fit registers goes here
    local: int  # bytes
    scalar_spills: int = 0  # AMD: scalar registers spilled, in registers


@dataclass
class Build:
    """A kernel as Triton compiled it."""

    name: str
    module: str  # the last part of its name: where the kernel is
    target: GPUTarget
    warps: int
    shared: int  # bytes of dynamic shared memory
    options: dict  # constexpr arguments by name
    _files: dict[str, str] = field(repr=False, default_factory=dict)

    def assembly(self) -> str:
        """The PTX, or AMD's assembly."""
        return self._read("text")

    def intermediate(self) -> str:
        """Triton's own form of the kernel, before anything of the target is in it."""
        return self._read("intermediate")

    def _read(self, name: str) -> str:
        with open(self._files[name]) as file:
            return file.read()

    @functools.cached_property
    def resources(self) -> Resources:
        return _nvidia_resources(self._files["binary"]) if self.target.backend == "cuda" else (
            _amd_resources(self.assembly())
        )  # fmt: skip


@dataclass
class LaunchRecord:
    name: str
    grid: tuple[int, int, int]
    build: Build
    arguments: dict  # of the Python function, by name
    counts: Counts | None  # where launches are executed
    seconds: float  # that the emulation took
    _launcher: "_Launcher" = field(repr=False)

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.build.warps * self.build.target.warp_size

    def execute(self, grid: tuple[int, int, int], **changes) -> Counts:
        """Runs the launch once more with another grid, say a block of it, and arguments changed."""
        return self._launcher.execute(grid, self.arguments | changes, {})


def _nvidia_resources(binary: str) -> Resources:
    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    command = [os.path.join(tools, "cuobjdump"), "--dump-resource-usage", binary]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    return Resources(int(found["REG"]), int(found["STACK"]), int(found["LOCAL"]))


def _amd_resources(assembly: str) -> Resources:
    found = dict(
        re.findall(r"\.(vgpr_count|private_segment_fixed_size|sgpr_spill_count):\s*(\d+)", assembly)
    )
    stack = int(found["private_segment_fixed_size"])
    return Resources(int(found["vgpr_count"]), stack, stack, int(found["sgpr_spill_count"]))


@contextlib.contextmanager
def emulated_gpu(
    backend: str = "cuda",
    arch: int | str = 90,
    execute: bool = False,
    *,
    check_races: bool = True,
    poison: bool = True,
    seed: int | None = None,
    multiprocessors: int | None = None,
):
    """A GPU on which Triton kernels can be launched with CPU tensors.

    backend, arch: ("cuda", 80), 90 or 100, or ("hip", "gfx942").
    execute: run each launch's PTX here ("cuda" 80 and 90); else launches are only compiled for.
    check_races, seed: see `run`.
    poison: `torch.empty` and its kin are filled with NaN or the largest integer, so that results
        which no kernel has written are seen.
    multiprocessors: what the device says it has; by default as many as the real one.

    Yields the driver.  `launches` is a list of `LaunchRecord`, `builds` has the kernels in it.
    """
    if execute and (backend, arch) not in (("cuda", 80), ("cuda", 90)):
        raise ValueError(f"{backend} {arch} can be compiled for but not executed")
    device = DEVICES[backend, arch]
    if multiprocessors is not None:
        device = device._replace(multiprocessors=multiprocessors)
    options = {"check_races": check_races, "seed": seed}
    target = GPUTarget(backend, arch, device.warp_size)
    driver = EmulatedDriver(target, device, options if execute else None)
    before = triton_driver._active
    triton_driver.set_active(driver)
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if execute and poison:
        torch.use_deterministic_algorithms(True, warn_only=not deterministic or warn_only)
    try:
        yield driver
    finally:
        triton_driver._active = before
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


class EmulatedDriver(DriverBase):
    def __init__(self, target: GPUTarget, device: Device, execution: dict | None):
        self.target = target
        self.execution = execution  # options of `run`; None: compile only
        self.launches: list[LaunchRecord] = []
        self.utils = _Utils(device)
        self.launcher_cls = _Launcher

    @property
    def builds(self) -> list[Build]:
        return list({id(r.build): r.build for r in self.launches}.values())

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self):
        return self.target

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cpu

    def get_current_device(self):
        # Triton keeps compiled kernels per device, so every target must be one of its own.
        return (self.target.backend, self.target.arch)

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device=None):
        return 0

    def get_device_capability(self, device=None):
        return divmod(self.target.arch, 10) if self.target.backend == "cuda" else (9, 4)

    def get_benchmarker(self):
        def benchmark(function, quantiles=None, **_):
            function()
            return [1.0] * len(quantiles or [0.5])

        return benchmark

    def get_empty_cache_for_benchmark(self):
        return None

    def clear_cache(self, cache):
        pass


class _Utils:
    """What Triton asks a driver about the device."""

    def __init__(self, device: Device):
        self.device = device

    def load_binary(self, name, binary, shared, device):
        # module, function, registers, spills, threads: the numbers that it would refuse a launch
        # for
        return 1, 1, 0, 0, 1024

    def unload_module(self, module):
        pass

    def get_device_properties(self, device):
        return {
            "max_shared_mem": self.device.max_shared,
            "multiprocessor_count": self.device.multiprocessors,
            "warpSize": self.device.warp_size,
            "max_num_regs": 65536,
            "sm_clock_rate": 1, "mem_clock_rate": 1, "mem_bus_width": 1,
        }  # fmt: skip


class _Launcher:
    """Triton makes one for each compiled kernel, and calls it for each launch."""

    def __init__(self, source, metadata):
        self.source, self.metadata = source, metadata
        cache = get_cache_manager(metadata.hash)
        extensions = ("ptx", "cubin") if metadata.target.backend == "cuda" else ("amdgcn", "hsaco")
        names = ("text", "binary", "intermediate")
        files = {
            n: cache.get_file(f"{metadata.name}.{e}")
            for n, e in zip(names, (*extensions, "ttir"), strict=True)
        }
        arguments = source.fn.arg_names
        self.build = Build(
            name=metadata.name,
            module=source.fn.module.rpartition(".")[2],
            target=metadata.target,
            warps=metadata.num_warps,
            shared=metadata.shared,
            options={
                arguments[path[0]]: v for path, v in source.constants.items() if len(path) == 1
            },
            _files=files,
        )

    def __call__(
        self, x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments
    ):
        driver = triton_driver.active
        grid, counts, start = (x, y, z), None, time.perf_counter()
        named = dict(zip(self.source.signature, arguments, strict=True))
        if driver.execution is not None and x * y * z:
            counts = self.execute(grid, named, driver.execution)
        seconds = time.perf_counter() - start
        driver.launches.append(
            LaunchRecord(self.build.name, grid, self.build, named, counts, seconds, self)
        )

    def execute(self, grid, arguments: dict, options: dict) -> Counts:
        metadata = self.metadata
        kernel = load(self.build.assembly())[metadata.name]
        values, tensors = [], {}
        for name, kind in self.source.signature.items():
            _flatten(name, kind, arguments[name], values, tensors)
        for name in ("global_scratch", "profile_scratch"):
            size = getattr(metadata, f"{name}_size")
            if size:
                memory = torch.zeros(size * int(np.prod(grid)) + 128, dtype=torch.uint8)
                tensors[name] = memory[-memory.data_ptr() % 128 :]
            values.append(tensors.get(name, 0))
        return run(
            kernel, grid, (32 * metadata.num_warps,), values[: len(kernel.parameters)],
            shared=metadata.shared, buffers=tensors, **options,
        )  # fmt: skip


def _flatten(name: str, kind, argument, values: list, tensors: dict) -> None:
    """Appends what the kernel takes for one argument of the Python function: nothing for a
    constexpr, several for a tuple.
    """
    if isinstance(kind, tuple):
        for i, (k, a) in enumerate(zip(kind, argument, strict=True)):
            _flatten(f"{name}[{i}]", k, a, values, tensors)
    elif kind.startswith("*"):
        if hasattr(argument, "data_ptr"):
            tensors[name] = argument
        values.append(argument)
    elif kind in ("fp16", "bf16"):
        number = torch.tensor(argument, dtype=torch.float16 if kind == "fp16" else torch.bfloat16)
        values.append(struct.pack("<h", number.view(torch.int16).item()))
    elif kind in ("fp32", "fp64"):
        values.append(float(argument))
    elif kind.startswith("tensordesc"):
        raise NotImplementedError("descriptors made on the host; make them in the kernel")
    elif kind != "constexpr":
        values.append(int(argument))
