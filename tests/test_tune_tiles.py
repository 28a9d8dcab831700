"""benchmarks/tune_tiles.py with a clock of our own on the emulator."""

import importlib.util

import pytest
import torch
from triton_gpu import gpu, needs_triton

from moelora_ops.backends import triton

pytestmark = needs_triton

if not triton.why_missing():
    from benchmarks import tune_tiles
    from benchmarks.tune_tiles import Size
    from moelora_ops.backends.triton import tiles

BF16 = torch.bfloat16


@pytest.fixture
def few_values(monkeypatch):
    monkeypatch.setattr(tune_tiles, "ROUNDS", 1)
    values = {"shrink": {"BT": (64,)}, "expand": {"warps": (4, 8)}, "outer": {"BT": (32, 64)}}
    monkeypatch.setattr(tune_tiles, "VALUES", values)


def test_what_is_faster_is_found_and_used(few_values, tmp_path, monkeypatch):
    """A clock that likes small blocks; the table is written, read again, and keeps the bits."""
    size = Size("expand", 200, 136, 16, BF16)
    with gpu(90) as device:

        def clock(call):
            call()
            return device.launches[-1].build.warps

        assert size.rule() == {"warps": 8}
        values = tune_tiles.tune(size, clock, "cpu")
        assert values == {"warps": 4}
        call = tune_tiles.call_of(size, "cpu")
        want = call().clone()

        path = tmp_path / "tuned.py"
        kept = {("sm_80", "outer", 2, 512, 4096, 64): {"BT": 32}}
        tune_tiles.write(path, kept | {size.key(): values}, "a GPU")
        spec = importlib.util.spec_from_file_location("tuned", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert kept.items() < module.TABLE.items()
        for key, value in module.TABLE.items():
            monkeypatch.setitem(tiles.TABLE, key, value)
        # Sizes up to the next powers of two; no other architecture, no few tokens.
        arch = tiles.Arch("cuda", "sm_90", 132)
        assert tiles.expand(129, 256, 9, 2, arch).warps == 4
        assert tiles.expand(257, 256, 9, 2, arch).warps == 8
        assert tiles.expand(200, 256, 9, 2, arch._replace(name="sm_100")).warps == 8
        device.launches.clear()
        assert torch.equal(call(), want)
        assert device.launches[-1].build.warps == 4


def test_the_rule_stays_where_nothing_is_faster(few_values):
    with gpu(90, execute=False):
        assert tune_tiles.tune(Size("outer", 100, 24, 8, BF16), lambda call: 1.0, "cpu") == {}


@pytest.mark.parametrize("wrong", ("bits", "resources"))
def test_wrong_tiles_are_passed_over(few_values, monkeypatch, wrong):
    """However fast."""
    size, tile = Size("expand", 200, 136, 16, BF16), {"warps": 4}

    def call():
        if tiles.TABLE.get(size.key()) != tile:
            return torch.ones(3)
        if wrong == "resources":
            raise tune_tiles.OutOfResources(300_000, 200_000, "shared memory")
        return torch.tensor([1.0, 1.0, 1.0 + 1e-6])

    monkeypatch.setattr(tune_tiles, "call_of", lambda size, device: call)
    with gpu(90, execute=False):
        times = {8: 1.0, 4: 0.1}
        clock = lambda call: times[tiles.TABLE[size.key()]["warps"]]  # noqa: E731
        assert tune_tiles.tune(size, clock, "cpu") == {}
        monkeypatch.setattr(tune_tiles, "is_right", lambda *_: True)
        if wrong == "bits":
            assert tune_tiles.tune(size, clock, "cpu") == tile


def test_errors_of_weight_gradients_are_bounded():
    size = Size("outer", 8, 8, 8, BF16)
    want = torch.ones(8, 8, dtype=BF16)
    assert tune_tiles.is_right(size, want * (1 + 2**-7), want)
    assert not tune_tiles.is_right(size, want * 1.1, want)


def test_every_size_has_a_rule(capsys):
    """And a name of its own in the list."""
    assert tune_tiles.main(["--list", "--product", "shrink", "outer"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(set(lines)) == 2 * (2 + 2) * 9
    with gpu(90, execute=False):
        for size in tune_tiles.sizes():
            assert set(size.rule()) == set(tune_tiles.VALUES[size.product])
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            tune_tiles.main([])
        assert "no CUDA device" in capsys.readouterr().err


def test_tables_leave_few_tokens_alone(monkeypatch):
    """Whose kernels count on the rule's tiles."""
    arch = tiles.ARCHS[1]
    for product in ("shrink", "expand"):
        monkeypatch.setitem(tiles.TABLE, tiles.key(arch, product, 2, 32, 4096, 64), {"warps": 2})
    assert tiles.shrink(32, 4096, 64, 8, 2, arch).warps > 2
    assert tiles.expand(32, 4096, 64, 2, arch).warps > 2
