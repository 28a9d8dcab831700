"""What tests/test_cuda_source.py runs in processes of its own: sanitizers come before Python, and
a process holds one CUDA back end.

    python cuda_source_runs.py '[{"library": "address.so", "case": "fused", "seeds": [1, 2],
        "bits": true, "budget": false}, ...]'

Each job runs in a fork.  Prints a list of their exit statuses and what they wrote to stderr.
"""

import contextlib
import json
import os
import sys
import tempfile
import traceback
from typing import NamedTuple

import cases
import mixes
import torch
from cases import Shape

from moelora_ops import functional, ops
from moelora_ops.bench import numerics
from tools.gpu_emulator import source
from tools.gpu_emulator.on_cpu import on_cpu_tensors


class Case(NamedTuple):
    """A layer with top-k routing."""

    shape: Shape
    dtype: torch.dtype
    multiprocessors: int
    launches: int  # forward and backward
    options: dict

    def run(self) -> dict[str, torch.Tensor]:
        inputs = cases.make_inputs(self.shape, self.dtype)
        return cases.run(functional.mola, inputs, self.shape.k, **self.options)

    def assert_within_budget(self, on) -> None:
        cases.assert_within_budget(self.shape, self.dtype, on, draws=3, **self.options)


class Mix(NamedTuple):
    """A layer with a dense mix."""

    name: str
    variant: str
    size: mixes.Size
    dtype: torch.dtype
    multiprocessors: int
    launches: int

    def run(self) -> dict[str, torch.Tensor]:
        inputs = mixes.make_inputs(self.name, self.variant, self.size, self.dtype)
        return mixes.run(mixes.MIXES[self.name].function, inputs)

    def assert_within_budget(self, on) -> None:
        mixes.assert_within_budget(on, self.name, self.variant, self.size, self.dtype, draws=3)


class Product(NamedTuple):
    """A shrink alone, of T tokens by R rows."""

    T: int
    K: int
    R: int
    dtype: torch.dtype
    multiprocessors: int
    launches: int

    def make_inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        random = torch.Generator().manual_seed(0)
        return tuple(
            torch.randn(rows, self.K, generator=random).to(self.dtype) for rows in (self.T, self.R)
        )

    def run(self) -> dict[str, torch.Tensor]:
        return {"h": ops.of("cuda").shrink(*self.make_inputs())}

    def assert_within_budget(self, on) -> None:
        x, rows = self.make_inputs()
        with on():
            got = self.run()
        plain, want = ({"h": x.to(t) @ rows.to(t).T} for t in (torch.float32, torch.float64))
        numerics.check_numerics(str(self), got, plain, want)


SEED = torch.tensor([0x1234567890ABCDE])
CASES = {
    # The mix in the product's own kernel, whose ring of stages comes round.
    "fused": Case(Shape(20, 264, 24, 3, 4, 2), torch.bfloat16, 1, 5, {"balance": True}),
    # Features over several blocks, the mix in the expand or in a kernel of its own; nothing is
    # aligned.
    "split": Case(
        Shape(9, 70, 25, 3, 3, 2), torch.float32, 8, 6,
        {"dropout": 0.3, "dropout_mode": "expert", "seed": SEED},
    ),
    # Experts that meet their own tokens, in two tiles each; eight blocks of a slot sort, and
    # gradients in parts.
    "grouped": Case(
        Shape(70, 24, 16, 2, 1, 2), torch.bfloat16, 8, 14,
        {"dropout": 0.3, "dropout_mode": "expert", "seed": SEED, "strategy": "grouped"},
    ),
    # Blocks that walk over tokens, and a ring over tokens.
    "walk": Case(
        Shape(130, 24, 16, 2, 1, 2), torch.float16, 1, 6,
        {"dropout": 0.3, "dropout_mode": "token", "seed": SEED, "renormalize": False},
    ),
    "double": Case(Shape(3, 5, 7, 2, 2, 1), torch.float64, 8, 7, {"renormalize": False}),
    "gated": Mix("gated", "map-relu", mixes.Size((9,), 70, 25, 3, 3), torch.float32, 8, 6),
    "grid": Mix("grid", "map", mixes.Size((20,), 40, 24, 3, 4), torch.bfloat16, 1, 5),
    # Features that fall into segments, each a product of its own.
    "averaged": Mix("averaged", "splits", mixes.Size((9,), 70, 26, 3, 3), torch.float32, 8, 6),
    # Factors of each sequence, merged by the blocks that meet them or before, with wide copies.
    "merged": Mix(
        "averaged", "splits-sequence", mixes.Size((2, 9), 48, 32, 3, 4), torch.bfloat16, 8, 7
    ),
    "output gate": Mix(
        "output_gate", "masked-input-layernorm", mixes.Size((20,), 40, 24, 3, 4), torch.bfloat16,
        1, 5,
    ),
    # More rows than a tile of mma.sync has, a ring of stages that comes round.
    "wgmma": Product(70, 328, 136, torch.bfloat16, 1, 1),
    # Segments of three steps, so that products of several are under way.  For planted bugs.
    "wgmma segments": Product(3, 1032, 129, torch.bfloat16, 1, 1),
}  # fmt: skip


def check(library: str, case: str, seeds: list[int], bits: bool, budget: bool) -> None:
    """All gradients of a case; if asked for, the same bits for every seed, and the budget."""
    chosen = CASES[case]

    @contextlib.contextmanager
    def on(seed=seeds[0]):
        emulated = source.scheduled(library, multiprocessors=chosen.multiprocessors, seed=seed)
        with on_cpu_tensors("cuda"), emulated as count:
            yield
            assert count() == chosen.launches

    first = None
    for seed in seeds:
        with on(seed):
            got = chosen.run()
        first = first or got
        for name, value in first.items() if bits else ():
            assert torch.equal(got[name], value), (name, seed)
    if budget:
        chosen.assert_within_budget(on)


def run(job: dict) -> tuple[int, str]:
    with tempfile.TemporaryFile("w+") as stderr:
        child = os.fork()
        if not child:
            status = 1
            try:
                os.dup2(stderr.fileno(), 2)
                check(**job)
                status = 0
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(status)
        _, status = os.waitpid(child, 0)
        stderr.seek(0)
        return os.waitstatus_to_exitcode(status), stderr.read()


if __name__ == "__main__":
    torch.set_num_threads(1)  # a fork has no others
    print(json.dumps([run(job) for job in json.loads(sys.argv[1])]))
