"""The cosines of PEMT's task sparsity loss, in rank space, against materialised outputs."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moelora_ops.bench import numerics
from moelora_ops.functional import expert_cosines, expert_rotations

N = 8
pytestmark = pytest.mark.usefixtures("backend")


def cosine_inputs(n_out=N, rank=3, experts=2, tokens=5):
    f = torch.randn(tokens, n_out, dtype=torch.float64)
    hidden = torch.randn(tokens, experts, rank, dtype=torch.float64)
    up = torch.randn(experts, rank, n_out, dtype=torch.float64)
    return f, hidden, up, torch.tensor([0.5, -2.0], dtype=torch.float64)[:experts]


@pytest.mark.parametrize("rank", [1, 3, N, 2 * N])
def test_cosines_are_those_of_the_materialised_outputs(rank):
    f, hidden, up, scales = cosine_inputs(rank=rank)
    _, got = expert_cosines(f, hidden, up, expert_rotations(up), scales)
    for t in range(5):
        for e in range(2):
            o = scales[e] * hidden[t, e] @ up[e]
            want = (f[t] @ o) / (f[t].norm() * o.norm())
            assert got[t, e].item() == pytest.approx(want.item(), rel=1e-11)


def test_gradients_of_the_cosines_by_finite_differences():
    f, hidden, up, scales = cosine_inputs()
    rotations = expert_rotations(up)
    assert torch.autograd.gradcheck(
        lambda f, h: expert_cosines(f, h, up, rotations, scales),
        (f.requires_grad_(), hidden.requires_grad_()),
    )


@pytest.mark.parametrize("used", ["f", "cosines", "both"])
def test_gradients_of_f_meet(used):
    """f's user and the cosines may each be in the loss or not."""
    f, hidden, up, scales = cosine_inputs()
    rotations = expert_rotations(up)

    def loss(f, hidden):
        passed, cosines = expert_cosines(f, hidden, up, rotations, scales)
        terms = {"f": passed.square().sum(), "cosines": cosines.square().sum()}
        return sum(terms.values()) if used == "both" else terms[used]

    def plain(f, hidden):
        outputs = scales[:, None] * torch.einsum("ter,ern->ten", hidden, up)
        cosines = F.cosine_similarity(f[:, None], outputs, dim=-1)
        terms = {"f": f.square().sum(), "cosines": cosines.square().sum()}
        return sum(terms.values()) if used == "both" else terms[used]

    leaves = f.requires_grad_(), hidden.requires_grad_()
    unused = {"allow_unused": used == "f"}
    got = torch.autograd.grad(loss(*leaves), leaves, **unused)
    want = torch.autograd.grad(plain(*leaves), leaves, **unused)
    torch.testing.assert_close(got, want)


LOW_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def assert_within_budget(dtype, n_out, rank, tokens):
    """Values and gradients beside the materialised form's, in f's dtype."""
    torch.manual_seed(0)
    f, hidden, up, scales = cosine_inputs(n_out=n_out, rank=rank, tokens=tokens)
    f, up, hidden, scales = f.to(dtype), up.to(dtype), hidden.float(), scales.float()
    df, dcosines = torch.randn_like(f), torch.randn(tokens, 2)

    def run(function, wide):
        leaves = [t.detach().to(wide or t.dtype).requires_grad_() for t in (f, hidden)]
        others = [t.to(wide or t.dtype) for t in (up, scales)]
        passed, cosines = function(*leaves, *others)
        grads = [df.to(passed.dtype), dcosines.to(cosines.dtype)]
        torch.autograd.backward([passed * 1, cosines], grads)
        return [cosines, *(leaf.grad for leaf in leaves)]

    def ours(f, hidden, up, scales):
        return expert_cosines(f, hidden, up, expert_rotations(up), scales)

    def plain(f, hidden, up, scales):
        outputs = scales[:, None] * torch.einsum("ter,ern->ten", hidden, up.to(hidden.dtype))
        return f, F.cosine_similarity(f[:, None].to(hidden.dtype), outputs, dim=-1)

    exact = run(plain, torch.float64)
    for name, got, same, want in zip(
        ("cosines", "df", "dhidden"), run(ours, None), run(plain, None), exact, strict=True
    ):
        error = numerics.error(got, want)
        limit = numerics.budget(numerics.error(same, want), dtype)
        assert error.rms <= limit.rms and error.max <= limit.max, name


@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
@pytest.mark.parametrize(("n_out", "rank", "tokens"), ((96, 6, 700), (37, 3, 90), (200, 19, 64)))
def test_within_their_budget(dtype, n_out, rank, tokens):
    assert_within_budget(dtype, n_out, rank, tokens)


def test_gradients_of_the_cosines_are_the_closed_forms():
    f, hidden, up, scales = cosine_inputs()
    f.requires_grad_(), hidden.requires_grad_()
    _, cosines = expert_cosines(f, hidden, up, expert_rotations(up), scales)
    dcosines = torch.randn_like(cosines)
    cosines.backward(dcosines)
    v, h, b, dc = (t.detach().numpy() for t in (f, hidden, up, dcosines))
    df, dh = np.zeros_like(v), np.zeros_like(h)
    for t in range(5):
        for e in range(2):
            o = h[t, e] @ b[e]
            norm, length = np.linalg.norm(o), np.linalg.norm(v[t])
            c = np.sign(scales[e].item()) * (v[t] @ o) / (norm * length)
            along = np.sign(scales[e].item()) / (norm * length)
            df[t] += dc[t, e] * (along * o - c * v[t] / length**2)
            dh[t, e] += dc[t, e] * (along * (b[e] @ v[t]) - c * (b[e] @ o) / norm**2)
    np.testing.assert_allclose(f.grad.numpy(), df, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(hidden.grad.numpy(), dh, rtol=1e-10, atol=1e-12)


def test_norms_do_not_square_the_condition_number():
    """cond(B) = 1e4 in its worst direction, float32: a Gram matrix would be 9 % off."""
    q, _ = torch.linalg.qr(torch.randn(64, 4, dtype=torch.float64))
    mixer, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    b = q @ torch.diag(torch.tensor([1.0, 0.1, 0.01, 1e-4]).double()) @ mixer.T
    hidden = mixer[:, 3]
    f = torch.randn(64, dtype=torch.float64)
    up = b.T[None]
    want = F.cosine_similarity(f, b @ hidden, dim=0)
    _, got = expert_cosines(
        f[None].float(), hidden[None, None].float(), up.float(), expert_rotations(up.float()),
        torch.ones(1),
    )  # fmt: skip
    # The rounding of B itself moves the direction by 1e-7 / 1e-4.
    assert abs(got.item() - want.item()) < 5e-3


def test_zero_outputs_have_cosine_zero_and_no_gradient():
    f, hidden, up, scales = cosine_inputs()
    with torch.no_grad():
        hidden[0], f[1], scales[0] = 0, 0, 0
    f.requires_grad_(), hidden.requires_grad_()
    _, cosines = expert_cosines(f, hidden, up, expert_rotations(up), scales)
    outputs = scales[:, None] * torch.einsum("ter,ern->ten", hidden, up)
    want = F.cosine_similarity(f[:, None], outputs, dim=-1)
    torch.testing.assert_close(cosines, want)
    assert not cosines[0].any() and not cosines[1].any() and not cosines[:, 0].any()
    cosines.sum().backward()
    assert f.grad.isfinite().all() and hidden.grad.isfinite().all()


def test_many_tokens_go_block_by_block():
    f, hidden, up, scales = cosine_inputs(tokens=1100)
    outputs = scales[:, None] * torch.einsum("ter,ern->ten", hidden, up)
    want = F.cosine_similarity(f[:, None], outputs, dim=-1)
    _, got = expert_cosines(f, hidden, up, expert_rotations(up), scales)
    torch.testing.assert_close(got, want)
