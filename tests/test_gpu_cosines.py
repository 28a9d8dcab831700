"""The cosines of PEMT's task sparsity loss on the GPU back ends, run on CPU tensors."""

import pytest
import torch
from cosine_operators import CHANGES, assert_refused

from moelora_ops import ops
from moelora_ops.bench import numerics
from moelora_ops.functional import cosines as functional
from moelora_ops.functional import expert_rotations

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
SCALES = (0.5, -2.0, 1.0, 0.25, 1.5, 1.0, 1.0)


@pytest.fixture
def operators(gpu_backend):
    return ops.of(gpu_backend)


def make(T, N, E, r, dtype, seed=0):
    """The arguments of ``ops.cosines``."""
    random = torch.Generator().manual_seed(seed)
    wide = ops.accumulator_dtype(dtype)

    def normal(*shape, dtype=wide):
        return torch.randn(shape, generator=random, dtype=F64).to(dtype)

    f, hidden, up = normal(T, N, dtype=dtype), normal(T, E * r), normal(E, r, N)
    seen = f.to(wide) @ up.flatten(0, 1).T
    return [f, seen, hidden, expert_rotations(up), torch.tensor(SCALES[:E]).to(wide)]


def make_backward(forward, saved, given=True, seed=1):
    f, seen, hidden, rotations, scales = forward
    random = torch.Generator().manual_seed(seed)
    cosines, norms, f_norm = saved
    dcosines = torch.randn(cosines.shape, generator=random, dtype=F64).to(cosines.dtype)
    df = torch.randn(f.shape, generator=random, dtype=F64).to(f.dtype) if given else None
    empty = torch.full_like(f, float("nan")), torch.full_like(hidden, float("nan"))
    grams = rotations @ rotations.mT
    return [dcosines, df, f, seen, hidden, grams, scales, cosines, norms, f_norm, *empty]


def run(forward, backward, arguments, given=True):
    """All results of both directions by name."""
    saved = forward(*arguments)
    arguments = make_backward(arguments, saved, given)
    dseen = backward(*arguments)
    names = ("cosines", "norms", "f_norm", "dseen", "df", "dhidden")
    return dict(zip(names, (*saved, dseen, *arguments[-2:]), strict=True))


# T, N, E, r: multiples of 8, of nothing; ranks beyond a piece; of one, and beyond N.
@pytest.mark.parametrize(
    ("shape", "arch", "dtype", "given"),
    [
        ((24, 40, 2, 8), 80, F32, True),
        ((37, 200, 3, 20), 90, BF16, True),
        ((20, 33, 2, 64), 80, F16, False),
        ((33, 300, 6, 16), 90, F32, False),
        ((18, 64, 7, 1), 80, BF16, True),
        ((17, 264, 1, 70), 90, BF16, True),
        ((35, 70, 3, 9), 80, F64, True),
    ],
    ids=str,
)
def test_cosines(gpu_backend, gpu, operators, shape, arch, dtype, given):
    """Against float64, no worse than PyTorch on the same inputs."""
    if gpu_backend == "triton" and dtype == F64:
        pytest.skip("Triton's kernels do not compute in float64")
    arguments = make(*shape, dtype)
    with gpu(arch):
        got = run(operators.cosines, operators.cosines_backward, arguments, given)
    composite = functional._cosines, functional._cosines_backward
    plain = run(*composite, arguments, given)
    want = run(*composite, [t.to(F64) for t in arguments], given)
    for name, tensor in got.items():
        error = numerics.error(tensor, want[name])
        limit = numerics.budget(numerics.error(plain[name], want[name]), tensor.dtype)
        assert error.rms <= limit.rms and error.max <= limit.max, (name, error, limit)


def test_norms_of_zero(gpu, operators):
    """Of f, of an expert's hidden, and of all that an expert of scale 0 says."""
    arguments = make(20, 40, 3, 8, F32)
    f, seen, hidden, _, scales = arguments
    f[1] = seen[1] = hidden[2, :8] = scales[2] = 0
    with gpu(90):
        got = run(operators.cosines, operators.cosines_backward, arguments)
    want = run(functional._cosines, functional._cosines_backward, arguments)
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, want[name], msg=name)
    assert not got["cosines"][1].any() and not got["cosines"][2, 0] and got["cosines"][3, 0]
    assert not got["cosines"][:, 2].any()


def test_strided_rows(gpu, operators):
    """f and what reaches it with rows apart; the same bits."""
    arguments = make(20, 40, 3, 8, BF16)
    with gpu(80):
        want = run(operators.cosines, operators.cosines_backward, arguments)
        for distance in (41, 48):
            memory = torch.full((20, distance), float("nan"), dtype=BF16)
            memory[:, :40] = arguments[0]
            strided = [memory[:, :40], *arguments[1:]]
            got = run(operators.cosines, operators.cosines_backward, strided)
            assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_token_does_not_depend_on_its_neighbours(gpu, operators):
    arguments = make(40, 72, 3, 24, BF16)
    with gpu(90):
        whole = operators.cosines(*arguments)
        few = [t[7:30].contiguous() if len(t) == 40 else t for t in arguments]
        for alone, every in zip(operators.cosines(*few), whole, strict=True):
            assert torch.equal(alone, every[7:30])


def test_no_tokens_is_no_launch(gpu, operators):
    arguments = make(0, 40, 2, 8, F32)
    with gpu() as device:
        got = run(operators.cosines, operators.cosines_backward, arguments)
        assert not device.launches
    assert got["cosines"].shape == (0, 2) and got["dseen"].shape == (0, 16)


@pytest.mark.parametrize("change", CHANGES)
def test_operators_called_directly_do_not_leave_their_memory(gpu, operators, change):
    forward = make(9, 40, 2, 8, F32)
    backward = make_backward(forward, functional._cosines(*forward))
    with gpu() as device:
        assert_refused(operators, "cosines", forward, change)
        assert_refused(operators, "cosines_backward", backward, change)
        assert not device.launches
