"""The CPU's operators for PEMT's cosines: schemas, bits, levels, and what they refuse."""

import os
import subprocess
import sys

import pytest
import torch

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


FORWARD_NAMES = ("f", "seen", "hidden", "rotations", "scales")
BACKWARD_NAMES = (
    "dcosines", "df_given", "f", "seen", "hidden", "grams", "scales", "cosines", "norms", "f_norm",
    "df", "dhidden",
)  # fmt: skip


@pytest.mark.parametrize("change", ("shorter", "dtype", "strides"))
def test_operators_refuse_what_does_not_fit(change):
    """Nothing is read or written beyond a tensor's end."""
    for operator, names, arguments in (
        (CPU.cosines, FORWARD_NAMES, list(forward_arguments())),
        (CPU.cosines_backward, BACKWARD_NAMES, backward_arguments()),
    ):
        for position, (name, t) in enumerate(zip(names, arguments, strict=True)):
            if change == "shorter":
                wrong = t[..., :-1].contiguous()
            elif change == "dtype":
                wrong = t.double()
            elif t.dim() > 1 and name not in ("f", "df_given"):  # rows of any stride
                wrong = t.transpose(0, 1).contiguous().transpose(0, 1)
            else:
                continue
            if name == "f" and change == "shorter":
                continue  # of any width, in forward
            with pytest.raises(RuntimeError):
                operator(*arguments[:position], wrong, *arguments[position + 1 :])


def test_no_tokens():
    cosines, norms, f_norm = CPU.cosines(*forward_arguments(tokens=0))
    assert cosines.shape == norms.shape == (0, 2) and f_norm.shape == (0,)
    assert CPU.cosines_backward(*backward_arguments(tokens=0)).shape == (0, 6)


@pytest.mark.parametrize("level", ("avx512_bf16", "avx512", "avx2", "portable"))
def test_every_isa_level(level):
    if level not in torch.ops.moelora_ops.cpu_isa_levels():
        pytest.skip(f"{level} is not built")
    program = (
        "import sys, test_pemt_cosines as tests\n"
        "from moelora_ops.backends import extension\n"
        f"if extension.isa_level() != {level!r}: sys.exit(77)\n"
        "for dtype in tests.LOW_DTYPES:\n"
        "    tests.assert_within_budget(dtype, 200, 19, 64)\n"
    )
    paths = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"MOELORA_CPU_ISA": level, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    if done.returncode == 77:
        pytest.skip(f"this processor lacks {level}")
    assert done.returncode == 0, done.stderr[-3000:]
