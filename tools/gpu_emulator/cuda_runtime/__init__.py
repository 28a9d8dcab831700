"""The package's CUDA back end on CPU tensors: its own bindings and host launchers, as nvcc built
them, on a runtime whose launches execute the kernels' PTX.

    library = build(directory, archs=("80", "90a"))   # nvcc and a C++ compiler; about a minute
    with emulated_cuda(library, "80") as gpu:
        ops.of("cuda").topk_forward(x, ...)           # CPU tensors
    for launch in gpu.launches:
        launch.name, launch.grid, launch.block, launch.given, launch.counts

Everything that an operator allocates on the device is filled with NaN first.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from ..counting import Counts
from ..machine import run
from ..ptx import load
from .arguments import Given, read

ROOT = Path(__file__).parents[3]
TORCH = Path(torch.__file__).parent
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
BINDINGS = sorted((ROOT / "csrc").glob("bindings_cuda*.cpp"))
RUNTIME = Path(__file__).parent / "runtime.c"
LAUNCH_FAILURE = 719  # cudaErrorLaunchFailure


class Library:
    """What :func:`build` made in a directory."""

    def __init__(self, directory: Path):
        self.runtime = directory / "libcudart.so.13"
        self.module = directory / "cuda_emulated.so"
        self.directory = directory

    def ptx(self, arch: str) -> list[Path]:
        """The files of an architecture's kernels."""
        return sorted(self.directory.glob(f"*.compute_{arch}.ptx"))


def sources() -> list[Path]:
    """All that the result depends on."""
    csrc = ROOT / "csrc"
    headers = [*csrc.glob("*.h"), *(csrc / "mix").glob("*.h"), *(csrc / "cuda").glob("*.*h")]
    return [*sorted(headers), *SOURCES, *BINDINGS, RUNTIME]


def build(directory: Path, archs: tuple[str, ...] = ("80", "90a"), nvcc: str = "nvcc") -> Library:
    """Compiles csrc/cuda and its bindings for the emulator.

    directory: for one state of the sources; objects that are there already are taken.

    Raises subprocess.CalledProcessError, with the compiler's messages on stderr.
    """

    library = Library(directory)
    compile(
        library.runtime, "cc", "-O2", "-shared", "-fPIC", f"-Wl,-soname,{library.runtime.name}",
        RUNTIME,
    )  # fmt: skip
    first, *others = archs
    device_code = [nvcc, "-O3", "-std=c++20", "-fmad=false", "-lineinfo", "-Icsrc"]
    for_others = [
        (directory / f"{s.stem}.compute_{a}.ptx", *device_code, "-ptx", f"-arch=compute_{a}", s)
        for s in SOURCES
        for a in others
    ]
    with compilers() as pool:
        kernels = pool.map(lambda s: compile_kernels(directory, s, first, device_code), SOURCES)
        made = pool.map(lambda task: compile(*task), for_others)
        objects = [*compile_bindings(directory, pool), *kernels]
        list(made)  # raises what failed
    compile(
        library.module, "c++", "-shared", *objects, library.runtime, f"-L{TORCH / 'lib'}",
        "-ltorch_cpu", "-Wl,-rpath,$ORIGIN",
    )  # fmt: skip
    return library


def cached(folder: Path) -> Library:
    """:func:`build` for the sources as they are, in a folder that several processes may share."""
    compiler = subprocess.run(["nvcc", "--version"], check=True, capture_output=True).stdout
    contents = b"".join(path.read_bytes() for path in sources())
    key = hashlib.sha256(compiler + torch.__version__.encode() + contents).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    place, building = folder / key, folder / f"{key}.building"
    with open(folder / "lock", "w") as lock:  # one of them builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            building.mkdir(exist_ok=True)
            build(building)
            building.rename(place)
    return Library(place)


def compilers() -> ThreadPoolExecutor:
    """As many at once as there are processors, or as the environment's MAX_JOBS says."""
    return ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count()))


def compile(target: Path, *command) -> Path:
    """Makes a file, unless it is there, by a command that takes ``-o``."""
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = Path(scratch) / target.name
            subprocess.run([*map(str, command), "-o", str(made)], check=True, cwd=ROOT)
            made.rename(target)
    return target


def compile_kernels(directory: Path, source: Path, arch: str, device_code: list[str]) -> Path:
    """The host's object of a source; beside it the PTX, which nvcc keeps on the way."""
    target = directory / f"{source.stem}.o"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            command = [
                *device_code, f"-gencode=arch=compute_{arch},code=compute_{arch}", "-cudart=shared",
                "-Xcompiler=-fPIC", "-DMOELORA_SM_90A", "-c", source, "--keep", "--keep-dir",
                scratch, "-o", f"{scratch}/{target.name}",
            ]  # fmt: skip
            subprocess.run(command, check=True, cwd=ROOT)
            (kept,) = Path(scratch).glob("*.ptx")
            kept.rename(directory / f"{source.stem}.compute_{arch}.ptx")
            Path(scratch, target.name).rename(target)
    return target


def compile_bindings(directory: Path, pool: ThreadPoolExecutor) -> list[Path]:
    """The operators for CPU tensors, over what the kernels' host code is linked with."""
    command = [
        "c++", "-O1", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Icsrc", "-DMOELORA_EMULATED",
        "-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", TORCH / "include", "-c",
    ]  # fmt: skip
    return list(pool.map(lambda b: compile(directory / f"{b.stem}.o", *command, b), BINDINGS))


@dataclass
class Launch:
    """A launch.

    Attributes:
        name: of the kernel in the source.
        symbol: mangled, with its template arguments.
        shared: bytes of dynamic shared memory.
        parameters: the bytes of each.
        counts: None if it was not executed.
    """

    name: str
    symbol: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    parameters: list[bytes]
    counts: Counts | None

    @property
    def threads(self) -> int:
        x, y, z = self.block
        return x * y * z

    @functools.cached_property
    def given(self) -> Given:
        return read(self.name, self.symbol, self.parameters)


class _Memory:
    """An allocation of C++ code, as the emulator wants a tensor."""

    def __init__(self, address: int, size: int):
        self.data_ptr, self.shape = lambda: address, (size,)

    def stride(self):
        return (1,)

    def element_size(self):
        return 1

    def numel(self):
        return self.shape[0]


_HOOKS = (
    ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint * 3),
        ctypes.POINTER(ctypes.c_uint * 3), ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t,
    ),
    ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t),
)  # fmt: skip


class Device:
    """Records launches, and executes them if it has options for that."""

    def __init__(self, kernels: dict, options: dict | None):
        self.launches: list[Launch] = []
        self.kernels, self.options = kernels, options
        self.memory: dict[str, object] = {}
        self.error: Exception | None = None

    def take(self, arguments) -> None:
        """The tensors of a call are all the memory that its kernels may use, beside their own."""
        tensors = [a for a in arguments if isinstance(a, torch.Tensor) and a.numel()]
        self.memory = {f"argument {i}": t for i, t in enumerate(tensors)}

    def allocate(self, address: int | None, size: int) -> None:
        if size and self.options is not None:
            ctypes.memset(address, 0xFF, size)
            self.memory[f"allocation {len(self.memory)}"] = _Memory(address, size)

    def launch(self, name, grid, block, pointers, shared) -> int:
        try:
            kernel = self.kernels[name.decode()]
            arguments = [
                ctypes.string_at(pointers[i], parameter.size)
                for i, parameter in enumerate(kernel.parameters.values())
            ]
            grid, block = tuple(grid.contents), tuple(block.contents)
            counts = None
            if self.options is not None:
                counts = run(
                    kernel, grid, block, arguments, shared=shared, buffers=self.memory,
                    **self.options,
                )  # fmt: skip
            name = plain_name(kernel.name)
            self.launches.append(Launch(name, kernel.name, grid, block, shared, arguments, counts))
        except Exception as error:
            self.error = error
            return LAUNCH_FAILURE
        return 0


def plain_name(mangled: str) -> str:
    """The kernel's name in the source."""
    return re.search(r"\d+([a-z_]+_kernel)", mangled)[1]


_loaded: dict[Path, ctypes.CDLL] = {}


@contextlib.contextmanager
def emulated_cuda(
    library: Library, arch: str, *, execute: bool = True, multiprocessors: int = 132,
    shared_bytes: int = 232448, **options,
) -> Iterator[Device]:  # fmt: skip
    """The CUDA operators (``ops.of("cuda")``) take CPU tensors and run on the PTX of `arch`.

    execute: else launches are only recorded.
    options: of :func:`tools.gpu_emulator.run`.  A fault of a kernel is raised by the operator.
    """
    from moelora_ops import ops

    kernels = {}
    for path in library.ptx(arch):
        kernels |= load(path.read_text())
    if library.module not in _loaded:
        _loaded[library.module] = ctypes.CDLL(str(library.runtime), mode=ctypes.RTLD_GLOBAL)
        torch.ops.load_library(str(library.module))
    device = Device(kernels, options if execute else None)
    hooks = [kind(f) for kind, f in zip(_HOOKS, (device.launch, device.allocate), strict=True)]
    _loaded[library.module].emulated_device(
        *hooks, multiprocessors, shared_bytes, int(arch.rstrip("a"))
    )

    operators = ops.of("cuda")
    originals = dict(vars(operators))

    def emulated(operator):
        def call(*arguments):
            device.take(arguments)
            try:
                return operator(*arguments)
            except RuntimeError:
                error, device.error = device.error, None
                if error:
                    raise error from None
                raise

        return call

    for name, operator in originals.items():
        setattr(operators, name, emulated(operator))
    try:
        yield device
    finally:
        vars(operators).update(originals)
        _loaded[library.module].emulated_device(None, None, 0, 0, 0)
