"""Which path a top-k mixture takes: the measured rule of the CPU, the model of the GPU."""

import pytest
import torch

from moelora_ops.backends import strategy
from moelora_ops.backends.strategy import choose, is_stacked, seconds

BRAIN, HALF, FLOAT = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize("backend", ["cpu", "cuda", "triton"])
def test_an_explicit_strategy_is_taken(backend):
    for dtype in (BRAIN, FLOAT):
        assert is_stacked(backend, "stacked", 128, 64, 1, dtype)
        assert not is_stacked(backend, "grouped", 2, 1, 2, dtype)


def test_on_a_cpu_the_share_of_chosen_experts_decides():
    chosen = [is_stacked("cpu", "auto", 8, 8, k, BRAIN) for k in range(1, 9)]
    assert chosen == [False] * 7 + [True]
    assert choose("cpu", 8, 8, 2, 1, BRAIN) == "grouped"


def test_what_a_back_end_does_not_have_is_not_chosen():
    for backend in ("cuda", "triton"):
        assert {
            choose(backend, E, 8, k, T, dtype)
            for E in (1, 8, 128, 1024)
            for k in (1, 2)
            for T in (1, 32, 8192)
            for dtype in (BRAIN, FLOAT)
        } <= set(strategy.PATHS[backend])
        assert not is_stacked(backend, "auto", 1024, 64, 1, BRAIN)


# By hand, many tokens, per feature, token and byte of a number: stacked products take 2 + R / 32
# (R / 64 up to 128) at 5.5e12 a second, grouped ones 3 k at 4.3e12.
BREAK_EVEN = [(1, BRAIN, 117), (2, BRAIN, 181), (2, HALF, 181), (4, BRAIN, 427), (2, FLOAT, 181)]


@pytest.mark.parametrize("top_k, dtype, rows", BREAK_EVEN)
def test_many_experts_are_grouped(top_k, dtype, rows):
    """Beyond by what a grouped path has in launches more."""
    assert is_stacked("triton", "auto", rows, 1, top_k, dtype)
    assert not is_stacked("triton", "auto", rows + rows // 2, 1, top_k, dtype)
    assert choose("triton", 2 * rows, 1, top_k, 8192, dtype) == "grouped"


def test_rows_count_and_not_what_they_belong_to():
    for E, r in ((1024, 1), (128, 8), (16, 64)):
        assert not is_stacked("triton", "auto", E, r, 2, BRAIN)
    for E, r in ((64, 1), (8, 8), (1, 64)):
        assert is_stacked("triton", "auto", E, r, 1, BRAIN)


def test_each_choice_of_a_grouped_path_is_a_launch():
    """That one costs what moving x and twice y does: gathered, read and written; and 3 µs."""
    few, more = (seconds("grouped", 1024, k, 8192, BRAIN) for k in (3, 4))
    assert more - few == pytest.approx(3 * 2 * 4096 * 8192 / 4.3e12 + 3e-6)


def test_few_tokens_take_the_fewest_launches():
    for T in (1, 8, 32):
        assert choose("triton", 8, 8, 2, T, BRAIN) == "decode"
    assert choose("triton", 8, 8, 2, 33, BRAIN) == "stacked"


def test_the_model_by_hand():
    moved = 2 * 4096 * (2 * 8192 + 2 * 8)
    assert seconds("stacked", 8, 2, 8192, BRAIN) == moved / 4.3e12 + 3 * 3e-6
    for rows, again in ((64, 1), (128, 2), (1024, 32)):
        moved = 2 * 4096 * (2 + again) * 8192
        assert seconds("stacked", rows, 2, 8192, BRAIN) == moved / 5.5e12 + 3 * 3e-6
    flops = 6 * 4 * 8192 * 1024 * 4096
    assert seconds("stacked", 1024, 2, 8192, FLOAT) == flops / 790e12 + 3 * 3e-6
    moved = 2 * 4096 * (6 * 8192 + 2 * 1024)
    assert seconds("grouped", 1024, 2, 8192, BRAIN) == moved / 4.3e12 + 6 * 3e-6
