"""DDP, FSDP2 and tensor parallel against a single process: what distributed_checks.py checks.

Starting a process and importing torch takes longer than the checks, so two processes run them all.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("safetensors")
pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch has no gloo",
)

CHECKS = Path(__file__).with_name("distributed_checks.py")
NAMES = [
    node.name.removeprefix("check_")
    for node in ast.parse(CHECKS.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
]
SECONDS = 240


@pytest.fixture(scope="module")
def errors(request, tmp_path_factory):
    """Of each rank, by check; only of the checks that are asked for, in one run."""
    items = (i for i in request.session.items if getattr(i, "module", None) is request.module)
    asked = [item.callspec.params["check"] for item in items]
    folder = tmp_path_factory.mktemp("processes")
    root = CHECKS.parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, CHECKS, str(rank), folder, *asked], env=environment,
            stdout=subprocess.DEVNULL, stderr=(folder / f"{rank}.log").open("w"),
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        for process in processes:
            process.wait(SECONDS)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for rank, process in enumerate(processes):
        assert process.returncode == 0, (folder / f"{rank}.log").read_text()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("check", NAMES)
def test_two_processes(check, errors):
    for rank, of_rank in enumerate(errors):
        if check not in of_rank:
            failed = next(name for name, error in of_rank.items() if error)
            pytest.fail(f"rank {rank} did not come to it: {failed} failed")
        if of_rank[check]:
            pytest.fail(f"rank {rank}: {of_rank[check]}", pytrace=False)
