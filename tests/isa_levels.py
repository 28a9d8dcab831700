"""The instruction set levels of the CPU kernels, each in a process of its own."""

import os
import subprocess
import sys

import pytest
import torch

ISA_LEVELS = ("avx512_bf16", "avx512", "avx2", "portable")


def run_at(level: str, program: str) -> None:
    """Run Python statements, which find the tests' modules, at a level, or skip this test."""
    if level not in torch.ops.moelora_ops.cpu_isa_levels():
        pytest.skip(f"{level} is not built")
    start = (
        "import sys\n"
        "from moelora_ops.backends import extension\n"
        f"if extension.isa_level() != {level!r}: sys.exit(77)\n"
    )
    paths = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", start + program],
        env=os.environ | {"MOELORA_CPU_ISA": level, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    if done.returncode == 77:
        pytest.skip(f"this processor lacks {level}")
    assert done.returncode == 0, done.stderr[-3000:]
