"""The CPU's operators for PEMT's cosines: schemas, bits, levels, and what they refuse."""

import pytest
import torch
from cosine_operators import CHANGES, assert_refused
from isa_levels import ISA_LEVELS, run_at

from moelora_ops import ops
from moelora_ops.backends import extension
from moelora_ops.functional import expert_rotations

pytestmark = pytest.mark.skipif(bool(extension.why_missing()), reason="the extension is not built")
CPU = ops.of("cpu")
LOW_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def forward_arguments(tokens=5, dtype=torch.float32):
    rotations = expert_rotations(torch.randn(2, 3, 8))
    f, scales = torch.randn(tokens, 8).to(dtype), torch.tensor([0.5, -2.0])
    return f, torch.randn(tokens, 6), torch.randn(tokens, 6), rotations, scales


def backward_arguments(given=True, **options):
    f, seen, hidden, rotations, scales = forward_arguments(**options)
    cosines, norms, f_norm = CPU.cosines(f, seen, hidden, rotations, scales)
    grams = rotations @ rotations.mT
    df_given = torch.randn_like(f) if given else None
    return [
        torch.randn_like(cosines), df_given, f, seen, hidden, grams, scales, cosines, norms, f_norm,
        torch.empty_like(f), torch.empty_like(hidden),
    ]  # fmt: skip


@pytest.mark.parametrize("given", (True, False))
def test_opcheck(given):
    torch.library.opcheck(CPU.cosines, forward_arguments())
    torch.library.opcheck(CPU.cosines_backward, backward_arguments(given))


@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
def test_bits_do_not_depend_on_threads_or_neighbours(dtype):
    before, results = torch.get_num_threads(), []
    forward = forward_arguments(tokens=150, dtype=dtype)
    backward = backward_arguments(tokens=150, dtype=dtype)

    def run(forward, backward):
        dseen = CPU.cosines_backward(*backward)
        return [*CPU.cosines(*forward), dseen, *(t.clone() for t in backward[-2:])]

    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(forward, backward))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))
    few = slice(17, 40)
    alone = ([t[few].clone() if len(t) == 150 else t for t in ts] for ts in (forward, backward))
    for got, every in zip(run(*alone), results[0], strict=True):
        assert torch.equal(got, every[few])


@pytest.mark.parametrize("change", CHANGES)
def test_operators_refuse_what_does_not_fit(change):
    assert_refused(CPU, "cosines", forward_arguments(), change)
    assert_refused(CPU, "cosines_backward", backward_arguments(), change)


def test_no_tokens():
    cosines, norms, f_norm = CPU.cosines(*forward_arguments(tokens=0))
    assert cosines.shape == norms.shape == (0, 2) and f_norm.shape == (0,)
    assert CPU.cosines_backward(*backward_arguments(tokens=0)).shape == (0, 6)


@pytest.mark.parametrize("level", ISA_LEVELS)
def test_every_isa_level(level):
    run_at(
        level,
        "import test_pemt_cosines as tests\n"
        "for dtype in tests.LOW_DTYPES:\n"
        "    tests.assert_within_budget(dtype, 200, 19, 64)\n",
    )
