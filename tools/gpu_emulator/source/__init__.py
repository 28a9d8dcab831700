"""The package's CUDA back end on CPU tensors, from the source of its kernels: compiled by a C++
compiler, with one fibre per CUDA thread, and with sanitizers.

    library = build(directory, sanitizer="thread")
    subprocess.run([sys.executable, ...], env=os.environ | environment("thread"))

and in that process, which must not have another CUDA back end:

    with scheduled(library, multiprocessors=132, seed=1):
        ops.of("cuda").topk_forward(x, ...)           # CPU tensors

Where the PTX emulator is told what a launch may touch and looks for races by rules of its own, this
finds what the sanitizers find, at lines of the source, and runs warps in any order.  What kernels
may use of CUDA is in ``cuda_runtime.h`` and ``cuda/ptx.cuh`` beside this file.
"""

import contextlib
import ctypes
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from ..cuda_runtime import ROOT, SOURCES, TORCH, compile, compile_bindings, compilers, sources

HERE = Path(__file__).parent
KERNELS = ROOT / "csrc/cuda"
# Sanitizer -> what the compiler is told, the libraries to load before Python, and their options.
SANITIZERS = {
    None: ([], [], {}),
    "address": (
        ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
        ["libasan.so", "libubsan.so"],
        {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
    ),
    "thread": (
        ["-fsanitize=thread"],
        ["libtsan.so"],
        {"TSAN_OPTIONS": "halt_on_error=1:report_thread_leaks=0"},
    ),
}


class Edit(NamedTuple):
    """Changes one place of a source: for planted bugs."""

    file: str  # of csrc/cuda
    old: str
    new: str
    # The source that is compiled with a change of a header, by default the file itself.  What other
    # sources have from that place too may stay as it is.
    source: str | None = None


def compiler() -> list[str] | None:
    """The C++ compiler that setup.py would take."""
    candidates = filter(None, (os.environ.get("CXX"), "c++", "g++"))
    return next((c for c in map(shlex.split, candidates) if shutil.which(c[0])), None)


def why_missing(sanitizer: str | None = None) -> str:
    """Why :func:`build` cannot work here, or ""."""
    if platform.machine() != "x86_64":
        return "fibres are written for x86-64"
    if compiler() is None:
        return "there is no C++ compiler"
    missing = [name for name in SANITIZERS[sanitizer][1] if _library(name) is None]
    return f"the compiler has no {', '.join(missing)}" if missing else ""


def _library(name: str) -> Path | None:
    found = subprocess.run(
        [*compiler(), f"-print-file-name={name}"], check=True, capture_output=True, text=True
    ).stdout.strip()
    return Path(found) if os.path.isabs(found) else None  # the bare name where there is none


def inputs() -> list[Path]:
    """All that the result depends on."""
    return [*sources(), *sorted(p for p in HERE.rglob("*") if p.suffix in (".h", ".cuh", ".cpp"))]


def build(
    directory: Path, sanitizer: str | None = None, edit: Edit | None = None, name: str = ""
) -> Path:
    """Compiles csrc/cuda and its bindings.

    directory: for one state of the sources; objects that are there already are taken.
    sanitizer: None, "address" (with the one for undefined behaviour) or "thread".
    edit, name: a change, and what to call the result.  One source is compiled with it; all else is
        taken from the build without it.

    Raises subprocess.CalledProcessError, with the compiler's messages on stderr.
    """
    flags = SANITIZERS[sanitizer][0]
    variant = sanitizer or "plain"
    library = directory / f"{'_'.join(filter(None, (variant, name)))}.so"
    if library.exists():
        return library
    plain = _translate(directory / "csrc/cuda")
    edited = _translate(directory / f"csrc_{name}/cuda", edit) if edit else plain
    changed = edit and (edit.source or edit.file)
    command = [
        *compiler(), "-std=c++20", "-O0", "-g1", "-fPIC", "-fno-strict-aliasing",
        "-DMOELORA_SM_90A", f"-I{HERE}", "-c",
    ]  # fmt: skip

    def compile_kernels(source: Path) -> Path:
        folder, suffix = (edited, f"_{name}") if source.name == changed else (plain, "")
        target = directory / f"{source.stem}.{variant}{suffix}.o"
        return compile(
            target, *command, *flags, f"-I{folder.parent}", "-Icsrc", "-x", "c++",
            folder / source.name,
        )  # fmt: skip

    with compilers() as pool:
        objects = list(pool.map(compile_kernels, SOURCES)) + compile_bindings(directory, pool)
    objects.append(compile(directory / "fibres.o", *command, HERE / "fibres.cpp"))
    return compile(
        library, *compiler(), "-shared", *flags, *objects, f"-L{TORCH / 'lib'}", "-ltorch_cpu"
    )


def _translate(to: Path, edit: Edit | None = None) -> Path:
    """The kernels, line by line, as C++ without what only CUDA's compilers know."""
    to.mkdir(parents=True, exist_ok=True)
    for source in [*KERNELS.glob("*.cu"), *KERNELS.glob("*.cuh")]:
        if source.name == "ptx.cuh":  # ours has its place
            continue
        text = source.read_text()
        if edit and edit.file == source.name:
            assert text.count(edit.old) == 1, f"{edit}: it is there {text.count(edit.old)} times"
            text = text.replace(edit.old, edit.new)
        text = re.sub(
            r"extern __shared__ __align__\(\d+\) char (\w+)\[\];",
            r"char* \1 = emulated::shared_memory();",
            text,
        )
        text = re.sub(r"(\w+)<<<(.*?)>>>\(", r"emulated::launch_kernel(\1, \2, ", text)
        (to / source.name).write_text(f'#line 1 "{source.relative_to(ROOT)}"\n{text}')
    return to


def environment(sanitizer: str | None) -> dict[str, str]:
    """What a process must find in its environment to load a library with the sanitizer."""
    _, libraries, options = SANITIZERS[sanitizer]
    return {"LD_PRELOAD": " ".join(str(_library(name)) for name in libraries), **options}


_loaded: dict[Path, ctypes.CDLL] = {}


@contextlib.contextmanager
def scheduled(
    library: Path, *, multiprocessors: int = 132, seed: int = 0
) -> Iterator[Callable[[], int]]:
    """The CUDA operators (``ops.of("cuda")``) take CPU tensors and run the library's kernels.

    seed: what order blocks, warps and lanes run in, and when copies in the background land; 0 for
        their own order, and as late as may be.

    Yields a function that tells how many launches there were.
    """
    from moelora_ops import ops  # noqa: F401 - the schemas

    if library not in _loaded:
        torch.ops.load_library(str(library))
        _loaded[library] = ctypes.CDLL(str(library))
    _loaded[library].emulated_schedule(multiprocessors, ctypes.c_uint(seed))
    yield _loaded[library].emulated_launches
