"""Writes docs/gpu_traffic.md; ``--compile`` compiles a long list of kernels and judges them."""

import argparse
import sys
from pathlib import Path

from tools.gpu_emulator import cuda_runtime

from . import gates, report

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "gpu_traffic.md"
# Where the tests build the CUDA back end too.
LIBRARIES = ROOT / ".pytest_cache" / "d" / "cuda_emulated"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_traffic", description=__doc__)
    parser.add_argument("--output", type=Path, default=PAGE, help="where the page goes")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="print what is wrong with the kernels of a long list of calls instead",
    )
    parser.add_argument(
        "--arch", choices=[str(arch) for _, arch in gates.ARCHS], help="only this one of them"
    )
    arguments = parser.parse_args(argv)
    if arguments.compile:
        return _compile(arguments.arch)
    library = cuda_runtime.cached(LIBRARIES)
    arguments.output.write_text(report.write(report.record_all(library)))
    return 0


def _compile(arch: str | None) -> int:
    failed = 0
    archs = [gpu for gpu in gates.ARCHS if arch in (None, str(gpu[1]))]
    for name, call, build, found in gates.sweep(archs=archs):
        failed += bool(found)
        kernel = f"{build.module}.{build.name}" if build else "does not compile"
        used = build.resources if build else None
        numbers = f"{used.registers:>4} registers {build.shared:>7} B shared" if build else ""
        size = f"{report.call_name(call)} {str(call.dtype).removeprefix('torch.')}"
        print(f"{name:<7} {call.method} {size}  {kernel} {numbers}  {'; '.join(found)}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
