"""The CUDA back end's kernels from their source, under sanitizers and in random order.

Everything runs in processes of cuda_source_runs.py: one for each sanitizer.
"""

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools.gpu_emulator import source
from tools.gpu_emulator.source import Edit

RUNS = Path(__file__).with_name("cuda_source_runs.py")
CASES = (
    "fused", "split", "grouped", "walk", "double", "gated", "grid", "averaged", "merged",
    "output gate", "wgmma",
)  # fmt: skip
SEEDS = (1, 2, 3)

in_outer = functools.partial(Edit, "outer.cu")
in_wgmma = functools.partial(Edit, "shrink_wgmma.cuh", source="shrink.cu")
in_expand = functools.partial(Edit, "expand.cuh", source="grouped.cu")  # alone over segments
in_routing = functools.partial(Edit, "topk.cuh", source="topk.cu")
BARRIER = "    __syncthreads();  // this step has arrived for all, and nobody reads the previous"
REST = " one any more"
COPY = "\n    if (step + S::kStages - 1 < steps) copy(step + S::kStages - 1);"
# Planted bugs: name -> where it is, the case that shows it, what is reported.
PLANTED = {
    None: {
        "lax wait": (
            in_outer("copy_async_wait<S::kStages - 2>", "copy_async_wait<S::kStages - 1>"),
            "walk", "AssertionError",
        ),
        "copy into what is read": (
            in_outer(BARRIER + REST + COPY, COPY + "\n" + BARRIER + REST),
            "walk", "AssertionError",
        ),
        "product that is read too early": (
            in_wgmma("wgmma_wait<1>", "wgmma_wait<2>"),
            "wgmma segments", "AssertionError",
        ),
        "no fence between proxies": (
            in_wgmma("ptx::fence_async_proxy();", ""),
            "wgmma", "shrink: block .*: read through the async proxy without a fence",
        ),
        "barrier that some skip": (
            in_outer(BARRIER, BARRIER.replace("__", "if (warp_id()) __", 1)),
            "walk", "outer: block .* waits for ever: __syncthreads",
        ),
    },
    "address": {
        "store beyond the last column": (
            in_outer("column + c < product.columns", "column + c <= product.columns"),
            "walk", r"heap-buffer-overflow.*WRITE.*csrc/cuda/outer\.cu",
        ),
        "too little shared memory": (
            in_outer("* stage_size()", "* (stage_size() - h_pitch())"),
            "walk", r"heap-buffer-overflow.*csrc/cuda/outer\.cu",
        ),
        "index beyond an array": (
            in_expand("for (int i = 0; i < 8; ++i)", "for (int i = 0; i < 9; ++i)"),
            "grouped", r"csrc/cuda/expand\.cuh:\d+:\d+: runtime error: index",
        ),
    },
    "thread": {
        "no __syncthreads": (
            in_outer(BARRIER, BARRIER.replace("__syncthreads();", "")),
            "walk", r"data race.*csrc/cuda/outer\.cu",
        ),
        "no __syncthreads before wgmma": (
            in_wgmma("ptx::fence_async_proxy();\n      __syncthreads();", ""),
            "wgmma", r"data race.*csrc/cuda/shrink_wgmma\.cuh",
        ),
        "no __syncwarp": (
            in_expand("sum; });\n  __syncwarp();", "sum; });\n"),
            "grouped", r"data race.*csrc/cuda/expand\.cuh",
        ),
        "blocks that share a place": (
            in_routing("p.prob_partials)[block * E + e]", "p.prob_partials)[e]"),
            "walk", r"data race.*csrc/cuda/topk\.cuh",
        ),
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(request):
    """Of what was built for the sources as they are."""
    if why := source.why_missing():
        pytest.skip(why)
    version = subprocess.run([*source.compiler(), "--version"], check=True, capture_output=True)
    key = [version.stdout, torch.__version__.encode(), repr(PLANTED).encode()]
    key += [path.read_bytes() for path in source.inputs()]
    digest = hashlib.sha256(b"\0".join(key)).hexdigest()[:16]
    directory = request.config.cache.mkdir("cuda_source")
    for old in directory.iterdir():
        if old.name != digest:
            shutil.rmtree(old)
    (directory / digest).mkdir(exist_ok=True)
    return directory / digest


@pytest.fixture(scope="module", params=list(source.SANITIZERS), ids=lambda s: s or "plain")
def outcomes(request, folder):
    """The sanitizer, and job -> exit status, stderr: all cases, and the planted bugs by name."""
    sanitizer = request.param
    if why := source.why_missing(sanitizer):
        pytest.skip(why)
    planted = PLANTED[sanitizer]
    libraries = dict.fromkeys(CASES, source.build(folder, sanitizer))
    for name, (edit, *_) in planted.items():
        libraries[name] = source.build(folder, sanitizer, edit, name.replace(" ", "_"))
    shows = {case: case for case in CASES} | {name: case for name, (_, case, _) in planted.items()}
    # ThreadSanitizer judges by what is ordered, not by what came first: one order will do where
    # there is nothing to find.  It remembers few accesses of an address, so a race can escape it.
    thread = sanitizer == "thread"
    jobs = [
        {
            "library": str(library),
            "case": shows[name],
            "seeds": SEEDS[i % len(SEEDS) :][:1] if thread and name in CASES else SEEDS,
            "bits": not thread,
            "budget": not sanitizer,
        }
        for i, (name, library) in enumerate(libraries.items())
    ]
    paths = [str(RUNS.parent.parent), str(RUNS.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, RUNS, json.dumps(jobs)],
        env=os.environ | source.environment(sanitizer) | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return sanitizer, dict(zip(libraries, json.loads(done.stdout), strict=True))


def test_kernels(outcomes):
    """Right, the same bits in every order, and nothing to report."""
    _, results = outcomes
    for case in CASES:
        assert results[case] == [0, ""], f"{case}: {results[case][1]}"


def test_planted_bugs_are_found(outcomes):
    sanitizer, results = outcomes
    for name, (*_, report) in PLANTED[sanitizer].items():
        status, said = results[name]
        assert status != 0, name
        assert re.search(report, said, re.S), f"{name}: {said}"
