"""What a compiled kernel must be like: no spills, within its budgets, tensor cores, wide access.

``python -m tools.gpu_traffic --compile`` holds all kernels at all shapes of `SWEEP` to it, on every
architecture; ``tests/test_triton_compile.py`` those that most users meet.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator

import torch

from tools.gpu_emulator.triton_driver import Build

from .cases import METHODS, Call, usual
from .recording import record_triton

ARCHS = (("cuda", 80), ("cuda", 90), ("cuda", 100), ("hip", "gfx942"))

# Bytes that compilers keep on the stack of kernels that spill nothing.
STACK = 16
# Of a multiprocessor: registers of 4 bytes, bytes of shared memory that blocks can have.
REGISTERS = {80: 1 << 16, 90: 1 << 16, 100: 1 << 16, "gfx942": 1 << 17}
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, "gfx942": 64 << 10}
# The share of the bytes which a product asks for in accesses of 16.
WIDE = 0.75

_TENSOR_CORES = {
    80: r"\bmma\.sync", 90: r"\b(wgmma\.mma_async|mma\.sync)",
    100: r"\b(tcgen05\.mma|mma\.sync)", "gfx942": r"\bv_mfma_",
}  # fmt: skip
# Products in Triton's own form: of 16-bit numbers; and all that tensor cores can compute.
_NARROW_DOT = re.compile(r"\btt\.dot\b.*x(bf16|f16)>")
_DOT = re.compile(r"\btt\.dot\b.*(inputPrecision = |x(bf16|f16)>)")
_PTX_ACCESS = re.compile(
    r"\b(?:(ld|st)\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\s"
    r"|cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (0x\w+))"
)
# What kernels over segments of tokens gather their rows by, 4 bytes a row.
_GATHERS = re.compile(r"%order: !tt.ptr<i32>")
_INDEX = 4
_AMD_ACCESS = re.compile(r"\b(?:buffer|global)_(load|store)_(dword(?:x\d)?|[us]?short|[us]?byte)")
_AMD_BYTES = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


def accesses(build: Build) -> Iterator[tuple[str, int]]:
    """ "ld" or "st" and the bytes of every access to global memory in a kernel's assembly."""
    if build.target.backend == "hip":
        for direction, width in _AMD_ACCESS.findall(build.assembly()):
            yield direction[0:2].replace("lo", "ld"), _AMD_BYTES.get(width, 2)
        return
    for direction, count, bits, copied in _PTX_ACCESS.findall(build.assembly()):
        if copied:
            yield "ld", int(copied, 16)
        else:
            yield direction, int(count or 1) * int(bits) // 8


def wide_share(build: Build, direction: str) -> float:
    """Of the bytes that a kernel's loads or stores name, those in accesses of 16; 1 without any.

    Without the indices of rows that it gathers.  AMD's 64 lanes have 8 bytes each of the few
    columns of an expert's own rank.
    """
    widths = Counter(width for d, width in accesses(build) if d == direction)
    wide = widths[16]
    if _GATHERS.search(build.intermediate()):
        del widths[_INDEX]
        wide += widths[8] / 2 if build.target.backend == "hip" else 0
    total = sum(width * count for width, count in widths.items())
    return 16 * wide / total if total else 1.0


def has_products(build: Build) -> bool:
    """Whether tensor cores can compute any of the kernel's products."""
    return bool(_DOT.search(build.intermediate()))


def problems(build: Build, aligned: bool = True, blocks: int = 1) -> list[str]:
    """What a kernel misses, in words; empty if nothing.

    Args:
        blocks: how many are to fit a multiprocessor.
        aligned: 8 divides all sizes, and so a product of 16-bit numbers accesses memory 16 bytes at
            a time.  AMD's store the 8 that their matrix cores leave with a thread.
    """
    arch, found = build.target.arch, []
    used = build.resources
    if used.stack > STACK or used.local > STACK or used.scalar_spills:
        found.append(
            f"spills: {used.stack} bytes of stack, {used.local} local, {used.scalar_spills}"
            " scalar registers"
        )
    registers = used.registers * build.warps * build.target.warp_size
    if blocks * registers > REGISTERS[arch]:
        found.append(f"{used.registers} registers in each of {build.warps} warps")
    if blocks * build.shared > SHARED[arch]:
        found.append(f"{build.shared} bytes of shared memory")
    if not has_products(build):
        return found
    if not re.search(_TENSOR_CORES[arch], build.assembly()):
        found.append("a product without tensor cores")
    # What a block mixes by itself, few tokens' narrow numbers, outweighs the columns of its expand.
    wide = aligned and build.name != "mix_and_expand" and _NARROW_DOT.search(build.intermediate())
    for direction, name in (("ld", "loads"), ("st", "stores")):
        share = wide_share(build, direction)
        if wide and share < WIDE and (direction == "ld" or build.target.backend == "cuda"):
            found.append(f"{share:.0%} of the bytes of {name} are in accesses of 16")
    return found


def builds(call: Call, backend: str, arch: int | str) -> list[Build]:
    """The distinct kernels that `call` launches."""
    launches = [
        launch for o in record_triton(call, backend, arch).operators for launch in o.launches
    ]
    return list({id(launch.build): launch.build for launch in launches}.values())


_HALF, _FLOAT, _BRAIN = torch.float16, torch.float32, torch.bfloat16
# Shapes, dtypes and options that users have.
SWEEP = (
    *(usual(m, 8192, dtype=d) for m in METHODS for d in (_BRAIN, _HALF, _FLOAT)),
    *(usual("topk", T, dtype=d) for T in (512, 32768) for d in (_BRAIN, _FLOAT)),
    *(usual(m, T, dtype=d) for m in METHODS for T in (1, 32) for d in (_BRAIN, _FLOAT)),
    *(
        usual("topk", 8192, E=E, r=r, k=k, strategy="stacked")
        for E, r, k in ((128, 1, 4), (32, 4, 2), (8, 64, 2))
    ),
    *(
        usual("topk", 8192, E=E, r=r, k=k, dtype=d, strategy="grouped")
        for E, r, k in ((64, 16, 4), (128, 8, 2), (16, 64, 2), (1024, 1, 2))
        for d in (_BRAIN, _FLOAT)
    ),
    *(usual("gated", 8192, E=E, r=r) for E, r in ((1, 8), (1, 64), (6, 64), (128, 4))),
    *(usual("output_gate", 8192, E=E, r=r) for E, r in ((2, 4), (4, 64), (128, 4))),
    *(usual("grid", 8192, E=E, r=r) for E, r in ((8, 8), (16, 16))),
)


def sweep(
    calls: Iterable[Call] = SWEEP, archs: Iterable[tuple[str, int | str]] = ARCHS
) -> Iterator[tuple[str, Call, Build | None, list[str]]]:
    """Architecture, call, kernel and what it misses; no kernel if it cannot be launched at all."""
    for backend, arch in archs:
        for call in calls:
            try:
                found = builds(call, backend, arch)
            except Exception as error:
                yield str(arch), call, None, [f"{type(error).__name__}: {error}"]
            else:
                for build in found:
                    yield str(arch), call, build, problems(build)
