"""Builds the compiled extension.

What is built is decided by the environment, never by the devices of this machine:

MOELORA_CPP    auto (default): build if there is a C++ compiler, else install pure Python and say
               so; 0: never; 1: fail without a compiler
MOELORA_CUDA   reserved for the CUDA back end; only 0 and auto are accepted today
MOELORA_DEBUG  1: -O1 -g, warnings and assertions instead of -O3
MAX_JOBS       compilations at once (default: processors)
CXX            the compiler (default: c++ or g++)

One binary serves every torch from 2.10 on (LibTorch stable ABI) and every Python from 3.10 on (its
limited API, abi3).
"""

import os
import platform
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

BINDINGS = ("cpu", "cpu_gated", "cpu_grid", "cpu_averaged", "cpu_output_gate", "cpu_products")
TORCH_TARGET = "0x020a000000000000"  # 2.10, the oldest torch whose stable ABI has all we use
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
# Lowest first: the linker keeps the first copy of an inline function (std::vector's, say) that
# several levels have, so the copy that a level calls never needs more than that level.
LEVELS = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS |= {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}


def flag(name: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, allowed[0])
    if value not in allowed:
        raise SystemExit(f"{name}: wanted one of {allowed}, got {value!r}")
    return value


def find_compiler() -> str | None:
    wanted = flag("MOELORA_CPP", ("auto", "0", "1"))
    if wanted == "0":
        return None
    for candidate in filter(None, (os.environ.get("CXX"), "c++", "g++")):
        if shutil.which(shlex.split(candidate)[0]):
            return candidate
    if wanted == "1":
        raise SystemExit("MOELORA_CPP=1, but no C++ compiler was found (set CXX)")
    print(
        "moelora_ops: no C++ compiler found; installing without kernels, on the plain PyTorch path"
    )
    return None


class BuildExtension(build_ext):
    """Compiles each source with its own flags, by ninja if it is there, and links one module."""

    def build_extension(self, ext):
        import torch  # for its headers and libraries only

        root, objects = Path(torch.__file__).parent, Path(self.build_temp)
        objects.mkdir(parents=True, exist_ok=True)
        debug = flag("MOELORA_DEBUG", ("0", "1")) == "1"
        common = [
            *(["-O1", "-g", "-Wall", "-Wextra"] if debug else ["-O3", "-DNDEBUG", "-g0"]),
            "-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-Icsrc",
        ]  # fmt: skip
        if len(LEVELS) > 1:
            common.append("-DMOELORA_X86_LEVELS")
        python = [f"-I{d}" for d in self.compiler.include_dirs]
        torch_flags = [
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-DPy_LIMITED_API=0x030a0000",
            "-isystem", str(root / "include"), *python,
        ]  # fmt: skip
        units = {
            **{f"bindings_{n}": (f"csrc/bindings_{n}.cpp", torch_flags) for n in BINDINGS},
            "dispatch": ("csrc/cpu/dispatch.cpp", []),
        }
        for level, flags in LEVELS.items():
            units[f"level_{level}"] = ("csrc/cpu/level.cpp", [f"-DMOELORA_LEVEL={level}", *flags])
        compile_all(objects, {n: (s, [*common, *f]) for n, (s, f) in units.items()})

        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        run([
            *shlex.split(COMPILER), "-shared", *(str(objects / f"{n}.o") for n in units),
            "-o", str(target), f"-L{root / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu",
            *([] if debug else ["-s"]),
        ])  # fmt: skip


def compile_all(objects: Path, units: dict[str, tuple[str, list[str]]]) -> None:
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    command = {
        name: [*shlex.split(COMPILER), *flags, "-MMD", "-MF", str(objects / f"{name}.d"),
               "-c", source, "-o", str(objects / f"{name}.o")]
        for name, (source, flags) in units.items()
    }  # fmt: skip
    ninja = shutil.which("ninja")
    if not ninja:
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(run, command.values()))
        return
    rules = "".join(
        f"rule {n}\n  command = {shlex.join(c)}\n  depfile = {objects / n}.d\n  deps = gcc\n"
        f"build {objects / n}.o: {n} {units[n][0]}\n"
        for n, c in command.items()
    )
    (objects / "build.ninja").write_text(rules)
    run([ninja, "-f", str(objects / "build.ninja"), f"-j{jobs}"])


def run(command: list[str]) -> None:
    print(shlex.join(command), flush=True)
    subprocess.run(command, check=True)


if flag("MOELORA_CUDA", ("auto", "0", "1")) == "1":
    raise SystemExit("MOELORA_CUDA=1, but this version has no CUDA kernels yet")
COMPILER = find_compiler()
setup(
    ext_modules=[Extension("moelora_ops._C", [], py_limited_api=True)] if COMPILER else [],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if COMPILER else {},
)
