"""The grouped path of the GPU back ends: compiled for a GPU, run by the emulator.

What it computes is what test_triton.py and test_cuda.py hold the stacked path to; here are other
kernels, and what sorting promises.
"""

from typing import NamedTuple

import pytest
import torch
from cases import (
    Shape,
    assert_prob_sums_within_budget,
    assert_within_budget,
    make_inputs,
    reference_run,
    run,
)
from gpus import names, opcheck

from moelora_ops import functional, ops
from moelora_ops.backends import extension
from moelora_ops.bench import numerics

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
SEED = torch.tensor([0x1234567890ABCDE])
TOKEN = {"dropout": 0.3, "dropout_mode": "token", "seed": SEED}
EXPERT = {"dropout": 0.3, "dropout_mode": "expert", "seed": SEED}
BALANCE, SWITCH = {"balance": True}, {"renormalize": False}


# Shapes of the shared list, but for ranks that take several blocks and products.
BOTH = [
    (Shape(0, 32, 48, 4, 2, 2), 90, BF16, None, {}),
    (Shape(9, 40, 24, 128, 2, 3), 90, BF16, None, TOKEN | BALANCE),
    (Shape(40, 128, 130, 3, 4, 3), 90, F16, None, EXPERT),
]
CASES = {
    "cuda": [
        *BOTH,
        (Shape(5, 33, 47, 4, 35, 2), 80, F64, None, EXPERT | SWITCH | BALANCE),
        (Shape(20, 24, 40, 2, 130, 2), 80, BF16, None, {}),
        (Shape(513, 17, 19, 4, 2, 2), 80, F32, 1, SWITCH | BALANCE),
    ],
    "triton": [*BOTH, (Shape(513, 17, 19, 4, 72, 2), 80, F32, None, SWITCH | BALANCE)],
}


@pytest.mark.parametrize(
    ("gpu_backend", "shape", "arch", "dtype", "multiprocessors", "options"),
    [(backend, *case) for backend, cases in CASES.items() for case in cases],
    ids=str,
)
def test_matches_reference(gpu, shape, arch, dtype, multiprocessors, options):
    """Output, statistics and all gradients; 513 tokens are sorted and summed by several blocks."""
    draws = 2 if shape.T * shape.E < 1000 else 1
    on = lambda: gpu(arch, multiprocessors)  # noqa: E731
    assert_within_budget(shape, dtype, on, draws, strategy="grouped", **options)


# What the tests below share, so that its kernels are compiled once.
STANDARD = Shape(70, 200, 136, 8, 8, 2)
# In float32, where products are slow to compile and to emulate: as many segments of features.
SMALL = Shape(70, 136, 136, 4, 4, 2)


def skewed(dtype=BF16):
    """Inputs of which every token chooses expert 5 and none expert 2."""
    inputs = make_inputs(STANDARD, dtype)
    inputs.x[:, 0] = 4
    inputs.router.div_(4)[:, 0] = 0
    inputs.router[5, 0], inputs.router[2, 0] = 1, -1
    return inputs


class Saved(NamedTuple):
    """Views of `saved`, see ``moelora_ops.backends.triton.grouped``."""

    hidden: torch.Tensor
    logits: torch.Tensor
    weights: torch.Tensor
    selected: torch.Tensor
    order: torch.Tensor
    starts: torch.Tensor


def views(saved, shape=STANDARD) -> Saved:
    T, _, _, E, r, k = shape
    *floats, selected, order, starts = saved.split(
        (T * k * r, T * E, T * k, T * k, T * k, E * k + 1)
    )
    return Saved(*floats, *(t.view(torch.int32) for t in (selected, order, starts)))


def test_all_tokens_on_one_expert_and_none_on_another(gpu):
    inputs = skewed()
    with gpu(90):
        got = run(functional.mola, inputs, 2, strategy="grouped")
    want = reference_run(inputs, 2, torch.float64)
    plain = reference_run(inputs, 2, BF16)
    counts = [runs.pop("counts") for runs in (got, plain, want)]
    assert torch.equal(counts[0], counts[2])
    assert counts[0][5] == 70 and counts[0][2] == 0
    assert not got["dlora_down"][2].any() and not got["dlora_up"][2].any()
    numerics.check_numerics("skewed", got, plain, want)


def operator_arguments(inputs, y=None):
    y = torch.zeros_like(inputs.dy) if y is None else y
    return (
        inputs.x, inputs.lora_down, inputs.lora_up, inputs.router, None, None, y, STANDARD.k, 0.5,
        True, 0.0, False, False, True,
    )  # fmt: skip


def assert_sorted(inputs, saved, counts):
    T, (E, r, _), k = len(inputs.x), inputs.lora_down.shape, STANDARD.k
    kept = views(saved, Shape(T, 0, 0, E, r, k))
    pairs = torch.arange(T * k)
    key = (kept.selected.long() * k + pairs % k) * T + pairs // k
    assert torch.equal(kept.order.long(), key.argsort())
    each = torch.bincount(kept.selected.long() * k + pairs % k, minlength=E * k)
    assert kept.starts.tolist() == [0, *each.cumsum(0).tolist()]
    assert torch.equal(each.view(E, k).sum(1), counts)


@pytest.mark.parametrize("inputs", (make_inputs(STANDARD, BF16), skewed()), ids=("even", "skewed"))
@pytest.mark.parametrize(
    ("gpu_backend", "blocks"), [("cuda", 1), ("cuda", 18), ("triton", 1), ("triton", 2)]
)
def test_pairs_are_sorted_by_expert_then_slot_then_token(
    gpu, gpu_backend, inputs, blocks, monkeypatch
):
    """One block of a slot walks all tokens, or every tile has a block of its own."""
    if gpu_backend == "triton":
        from moelora_ops.backends.triton import grouped

        monkeypatch.setattr(grouped, "_SORTING", blocks)
    with gpu(90, 1 if gpu_backend == "cuda" and blocks == 1 else None) as device:
        saved, counts, _ = ops.of(gpu_backend).topk_forward(*operator_arguments(inputs))
    grid = device.launches[names(device).index("sort")].grid
    assert grid == ((STANDARD.k, blocks, 1) if gpu_backend == "triton" else (blocks, STANDARD.k, 1))
    assert_sorted(inputs, saved, counts)


@pytest.mark.parametrize("gpu_backend", ["cuda"])
def test_blocks_that_sort_walk_over_several_tiles(gpu, gpu_backend):
    """75 tiles of four tokens in 25 blocks; and more experts than a block has threads."""
    inputs = make_inputs(Shape(300, 16, 24, 270, 1, 2), BF16)
    with gpu(90) as device:
        saved, counts, _ = ops.of(gpu_backend).topk_forward(*operator_arguments(inputs))
    assert device.launches[2].grid == (25, 2, 1)
    assert_sorted(inputs, saved, counts)


@pytest.mark.skipif(bool(extension.why_missing()), reason=extension.why_missing())
def test_keeps_what_the_cpu_keeps(gpu, gpu_backend):
    """The same choices; hidden, logits, weights and y no further off than PyTorch's would be."""
    T, _, _, E, r, k = SMALL
    inputs = make_inputs(SMALL, F32)
    y = [torch.zeros_like(inputs.dy) for _ in range(2)]
    with gpu(80):
        saved, counts, _ = ops.of(gpu_backend).topk_forward(*operator_arguments(inputs, y=y[0]))
    there, counts_there, _ = ops.of("cpu").topk_forward(*operator_arguments(inputs, y=y[1]))
    got = views(saved, SMALL)
    *parts, selected = there.split((T * k * r, T * E, T * k, T * k))
    assert torch.equal(got.selected, selected.view(torch.int32))
    assert torch.equal(counts, counts_there)
    all_hidden = (inputs.x @ inputs.lora_down.flatten(0, 1).T).view(T, E, r)
    logits = inputs.x @ inputs.router.T
    chosen = got.selected.view(T, k).long()
    plain = [
        all_hidden.gather(1, chosen[:, :, None].expand(T, k, r)), logits,
        logits.gather(1, chosen).softmax(1),
    ]  # fmt: skip
    up = inputs.lora_up[chosen] * (0.5 * plain[2])[:, :, None, None]
    plain.append((plain[0][:, :, None] @ up).sum((1, 2)))
    for have, plainly, want in zip((*got[:3], y[0]), plain, (*parts, y[1]), strict=True):
        error, limit = (
            numerics.error(t.flatten(), want.flatten().double()) for t in (have, plainly)
        )
        limit = numerics.budget(limit, F32)
        assert error.rms <= limit.rms and error.max <= limit.max


@pytest.mark.parametrize(
    ("gpu_backend", "T", "options", "route", "mix", "outer"),
    [
        ("cuda", 70, {}, ["shrink", "mix"], "mix", ["outer", "add_parts"]),
        ("cuda", 70, {"multiprocessors": 1}, ["shrink"], "mix", ["outer"]),
        (
            "triton", 600, {"execute": False}, ["shrink_parts", "route"], "mix_backward",
            ["outer_parts", "add_gradients"],
        ),
    ],
)  # fmt: skip
def test_launches(gpu, T, options, route, mix, outer):
    """Beside the base GEMM: one for each choice; 4 forward, 2 backward; outers in one or two."""
    inputs = make_inputs(STANDARD._replace(T=T), BF16)
    leaves = [t.requires_grad_() for t in (inputs.x, *inputs[3:6])]
    expands = ["expand_segments"] * 2
    with gpu(90, **options) as device:
        y = functional.mola(leaves[0], inputs.weight, None, *leaves[1:], 2, 1.0, strategy="grouped")
        assert names(device) == [*route, "sort", "shrink_segments", *expands]
        device.launches.clear()
        torch.autograd.grad(y, leaves, inputs.dy)
        assert names(device) == ["shrink_segments", mix, *expands, *outer, *outer]
    with gpu(90, **options) as device:
        x = leaves[0].detach().requires_grad_()
        frozen = [t.detach() for t in leaves[1:]]
        y = functional.mola(x, inputs.weight, None, *frozen, 2, 1.0, strategy="grouped")
        device.launches.clear()
        torch.autograd.grad(y, x, inputs.dy)
        assert names(device) == ["shrink_segments", mix, *expands]


def adapter(inputs, rows=slice(None), trained=True, **options):
    """Output and dx of the adapter alone for some tokens; if trained, also its own gradients."""
    leaves = [inputs.x[rows].detach().requires_grad_()]
    leaves += [t.detach().requires_grad_(trained) for t in inputs[3:6]]
    y = functional.mola(
        leaves[0], None, None, *leaves[1:], 2, 2.0, base_output=torch.zeros_like(inputs.dy[rows]),
        strategy="grouped", **options,
    )  # fmt: skip
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return y.detach(), *torch.autograd.grad(y, wanted, inputs.dy[rows])


@pytest.mark.parametrize(("arch", "dtype"), [(90, BF16), (80, F32)], ids=str)
def test_a_token_does_not_depend_on_its_neighbours(gpu, arch, dtype):
    """The same bits alone and among others.

    In float32 no rounding hides a sum in another order, and without renormalisation all logits are
    summed.
    """
    inputs = make_inputs(SMALL if dtype == F32 else STANDARD, dtype)
    options = {"renormalize": dtype != F32, "trained": False}
    with gpu(arch, 1):
        whole = adapter(inputs, **options)
    with gpu(arch):
        for rows in ([7], [66, 3], list(range(70))):
            for got, want in zip(adapter(inputs, rows, **options), whole, strict=True):
                assert torch.equal(got, want[rows])


def test_repeated_calls_have_the_same_bits(gpu):
    """Whatever the order in which blocks and warps run."""
    inputs = make_inputs(STANDARD, BF16)
    with gpu(90):
        want = adapter(inputs)
    with gpu(90, seed=1):
        got = adapter(inputs)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_a_token_that_is_not_finite_spoils_no_other(gpu, gpu_backend):
    """Its experts' gradients are NaN, as are its own rows; all else keeps its bits."""
    inputs = make_inputs(STANDARD, BF16)
    inputs.router[:, 5] = -1
    with gpu(90):
        want = adapter(inputs)
    spoiled = inputs._replace(x=inputs.x.clone())
    spoiled.x[3] = float("nan")
    spoiled.x[66, 5] = float("inf")  # all logits are -inf
    others = [t for t in range(70) if t not in (3, 66)]
    with gpu(90):
        got = adapter(spoiled)
        saved, counts, _ = ops.of(gpu_backend).topk_forward(*operator_arguments(spoiled))
    assert all(torch.equal(g[others], w[others]) for g, w in zip(got[:2], want, strict=False))
    assert all(g[[3, 66]].isnan().all() for g in got[:2])
    assert counts.sum() == 140
    selected = views(saved).selected.view(70, 2)
    chosen = selected[[3, 66]].unique().tolist()
    assert chosen == [0, 1]  # equal keys: the lowest
    for g in got[2:4]:
        assert g[chosen].isnan().any((1, 2)).all() and g[2:].isfinite().all()


def test_strided_rows(gpu, gpu_backend):
    """Rows that are apart; what lies between those of y is left alone."""
    inputs = make_inputs(STANDARD, BF16)
    memory = torch.randn(70, 208).to(BF16)
    memory[:, :200] = inputs.x
    outputs = torch.randn(70, 144).to(BF16)
    before, y = outputs.clone(), outputs[:, :136]
    want = y.contiguous()
    with gpu(90):
        forward = ops.of(gpu_backend).topk_forward
        forward(*operator_arguments(inputs, y=want))
        forward(*operator_arguments(inputs._replace(x=memory[:, :200]), y=y))
    assert torch.equal(y, want) and torch.equal(outputs[:, 136:], before[:, 136:])
    assert not torch.equal(y, before[:, :136])


def backward_arguments(inputs, saved, prob_sums):
    return (
        inputs.dy, *operator_arguments(inputs)[:4], None, saved, torch.ones_like(prob_sums),
        torch.zeros_like(inputs.x), 2, 0.5, True, 0.0, False, False, True, True, True,
    )  # fmt: skip


def test_opcheck(gpu, gpu_backend):
    inputs = make_inputs(STANDARD, BF16)
    with gpu(90) as device:
        arguments = operator_arguments(inputs)
        opcheck(device, gpu_backend, "topk_forward", arguments)
        saved, _, prob_sums = ops.of(gpu_backend).topk_forward(*arguments)
        opcheck(device, gpu_backend, "topk_backward", backward_arguments(inputs, saved, prob_sums))


def test_backward_called_directly_does_not_leave_its_memory(gpu, gpu_backend):
    """`saved` without the order, as other kernels leave it; dx and dy of fewer tokens."""
    inputs, operators = make_inputs(STANDARD, BF16), ops.of(gpu_backend)
    with gpu(90) as device:
        saved, _, prob_sums = operators.topk_forward(*operator_arguments(inputs))
        device.launches.clear()
        good = backward_arguments(inputs, saved, prob_sums)
        for position, bad, name in (
            (0, inputs.dy[:69], "dy"), (6, saved[: views(saved).order.storage_offset()], "saved"),
            (8, torch.zeros(69, 200, dtype=BF16), "dx"),
        ):  # fmt: skip
            with pytest.raises(RuntimeError, match=name):
                operators.topk_backward(*good[:position], bad, *good[position + 1 :])
        assert not device.launches


def test_more_pairs_than_an_int32_counts_are_refused(gpu, gpu_backend):
    inputs = make_inputs(STANDARD, BF16)
    x, y = (t[:1].expand(2**30, -1) for t in (inputs.x, inputs.dy))
    with gpu(90) as device, pytest.raises(RuntimeError, match="x: wanted at most 1073741823"):
        ops.of(gpu_backend).topk_forward(*operator_arguments(inputs._replace(x=x), y=y))
    assert not device.launches


def test_prob_sums_of_many_tokens(gpu):
    assert_prob_sums_within_budget(gpu, 4000, 0, strategy="grouped")
