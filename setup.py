"""Builds the compiled extension.

What is built is decided by the environment, never by the devices of this machine:

MOELORA_CPP    auto (default): build if there is a C++ compiler, else install pure Python and say
               so; 0: never; 1: fail without a compiler
MOELORA_CUDA   auto (default): build the CUDA kernels if there is nvcc (CUDA_HOME, the path,
               /usr/local/cuda), else say so; 0: never; 1: fail without nvcc
TORCH_CUDA_ARCH_LIST  for which GPUs, as torch reads it: "8.0;9.0a;10.0a;8.0+PTX" (the default,
               without what nvcc does not know yet; there 10.0a is made of the PTX of 8.0); wgmma
               is used if there is 9.0a and no 9.0
MOELORA_DEBUG  1: -O1 -g, warnings and assertions instead of -O3
MAX_JOBS       compilations at once (default: processors)
CXX            the compiler (default: c++ or g++), of nvcc's host code too

One binary serves every torch from 2.10 on (LibTorch stable ABI) and every Python from 3.10 on (its
limited API, abi3).
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

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


def find_nvcc() -> str | None:
    wanted = flag("MOELORA_CUDA", ("auto", "0", "1"))
    if wanted == "0" or COMPILER is None:
        return None
    places = (f"{os.environ.get('CUDA_HOME')}/bin", None, "/usr/local/cuda/bin")  # None: the path
    for place in places:
        if found := shutil.which("nvcc", path=place):
            return found
    if wanted == "1":
        raise SystemExit("MOELORA_CUDA=1, but no nvcc was found (set CUDA_HOME)")
    print("moelora_ops: no nvcc found; installing without CUDA kernels")
    return None


def gencode() -> list[str]:
    """nvcc's flags for the architectures that are wanted."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not wanted:
        listed = subprocess.run(
            [NVCC, "--list-gpu-arch"], check=True, capture_output=True, text=True
        )
        known = listed.stdout.split()
        # The sources ask only 9.0a for more than 8.0 has, and half of the time goes into PTX.
        made_from = {"80": "80", "90a": "90a", "100a": "80"}
        return [
            f"-gencode=arch=compute_{ptx},code=sm_{arch}"
            for arch, ptx in made_from.items()
            if f"compute_{arch.rstrip('a')}" in known
        ] + ["-gencode=arch=compute_80,code=compute_80"]
    flags = []
    for entry in wanted.replace(" ", ";").split(";"):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", entry)
        if not match:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST: wanted entries such as 8.0, 9.0a or 9.0+PTX, got {entry!r}"
            )
        arch = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{arch},code=compute_{arch}")
    return flags


def cuda_libraries() -> list[str]:
    """Link flags for the static CUDA runtime, whose symbols stay inside."""
    # nvcc may be a script elsewhere; what it would run names the toolkit.
    dry = subprocess.run(
        [NVCC, "--dryrun", "-x", "cu", "-c", os.devnull], check=True, capture_output=True, text=True
    ).stderr
    top = Path(re.search(r"^#\$ TOP=(.*)$", dry, re.M)[1].strip())
    places = [top / "lib64", top / "lib", *top.glob("targets/*/lib")]
    return [
        *(f"-L{place}" for place in places if place.is_dir()), "-lcudart_static", "-ldl", "-lrt",
        "-lpthread", "-Wl,--exclude-libs,libcudart_static.a",
    ]  # fmt: skip


class BuildExtension(build_ext):
    """Compiles each source with its own flags, by ninja if it is there, and links one module."""

    def build_extension(self, ext):
        import torch  # for its headers and libraries only

        root, objects = Path(torch.__file__).parent, Path(self.build_temp)
        objects.mkdir(parents=True, exist_ok=True)
        debug = flag("MOELORA_DEBUG", ("0", "1")) == "1"
        host = [
            *shlex.split(COMPILER),
            *(["-O1", "-g", "-Wall", "-Wextra"] if debug else ["-O3", "-DNDEBUG", "-g0"]),
            "-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-Icsrc",
        ]  # fmt: skip
        if len(LEVELS) > 1:
            host.append("-DMOELORA_X86_LEVELS")
        tensors = [
            *host, f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-DPy_LIMITED_API=0x030a0000",
            "-isystem", str(root / "include"), *(f"-I{d}" for d in self.compiler.include_dirs),
        ]  # fmt: skip
        units = {}
        for source in sorted(Path("csrc").glob("bindings_cpu*.cpp")):
            units[source.stem] = (str(source), tensors)
        units["dispatch"] = ("csrc/cpu/dispatch.cpp", host)
        for level, flags in LEVELS.items():
            command = [*host, f"-DMOELORA_LEVEL={level}", *flags]
            units[f"level_{level}"] = ("csrc/cpu/level.cpp", command)
        if NVCC:
            archs = gencode()
            names = ",".join(a.rsplit("=", 1)[1] for a in archs)
            for source in sorted(Path("csrc").glob("bindings_cuda*.cpp")):
                command = [*tensors, f'-DMOELORA_CUDA_ARCHS="{names}"']
                units[source.stem] = (str(source), command)
            # Of two binaries for one device, the runtime need not take the one with wgmma.
            wgmma = {"sm_90", "sm_90a"} & set(names.split(",")) == {"sm_90a"}
            device = [
                # A mix is compiled into several kernels, and what the compiler would fuse in one it
                # need not in another: a token's bits would differ.
                NVCC, "-ccbin", shlex.split(COMPILER)[0], "-O3", "-std=c++20", "-Icsrc",
                "-fmad=false", "-lineinfo" if debug else "-DNDEBUG",
                "-Xcompiler=-fPIC,-fvisibility=hidden", *(["-DMOELORA_SM_90A"] if wgmma else []),
                *archs,
            ]  # fmt: skip
            for source in sorted(Path("csrc/cuda").glob("*.cu")):
                units[f"cuda_{source.stem}"] = (str(source), device)
        compile_all(objects, units)

        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        run([
            *shlex.split(COMPILER), "-shared", *(str(objects / f"{n}.o") for n in units),
            "-o", str(target), f"-L{root / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu",
            *(cuda_libraries() if NVCC else []), *([] if debug else ["-s"]),
        ])  # fmt: skip


def compile_all(objects: Path, units: dict[str, tuple[str, list[str]]]) -> None:
    """units: name -> source and command without its files."""
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    command = {
        name: [*prefix, "-MMD", "-MF", str(objects / f"{name}.d"), "-c", source,
               "-o", str(objects / f"{name}.o")]
        for name, (source, prefix) in units.items()
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


COMPILER = find_compiler()
NVCC = find_nvcc()
setup(
    ext_modules=[Extension("moelora_ops._C", [], py_limited_api=True)] if COMPILER else [],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if COMPILER else {},
)
