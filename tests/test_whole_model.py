"""The benchmark of whole models, on tiny ones: what competes, and that it computes the same."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from benchmarks import whole_model
from benchmarks.whole_model import ModelCase
from moelora_ops.bench.runner import Settings

TINY = ModelCase("tiny", "train", 2, 32, 64, 96, 2, 4, 2, 50, experts="24", dtype="fp32")
QUICK = Settings(rounds=3, seconds=0.1)
NAMES = {"base", "peft-lora-r64", "stacked", "expert-loop"}


@pytest.mark.parametrize(
    "case", [TINY, replace(TINY, direction="decode", batch=1, length=1, dtype="bf16")], ids=str
)
def test_a_case(case):
    record = whole_model.run_case(case, QUICK._replace(backends=("reference",)))
    assert "refused" not in record and record["variants"].keys() == {*NAMES, "ours"}
    lora = record["variants"]["peft-lora-r64"]
    for variant in record["variants"].values():
        assert variant["of_lora"] == pytest.approx(variant["median_ms"] / lora["median_ms"])
        assert variant["peak_bytes"] > 0 and variant["times_floor"] is None


def test_everything_but_lora_and_the_base_is_one_function():
    tokens = torch.arange(40).view(1, -1)
    torch.manual_seed(0)
    frozen = whole_model.frozen_model(TINY)
    mola = whole_model.with_mola(frozen, TINY.experts)
    stacked = whole_model.in_place_of(mola, whole_model.StackedMoLALinear.from_reference)
    loop = whole_model.in_place_of(mola, whole_model.literal)
    want = whole_model.outcome(loop, tokens)
    assert want.keys() == {"logits", "dlora_down", "dlora_up", "drouter"}
    for model in (mola, stacked):
        for name, value in whole_model.outcome(model, tokens).items():
            torch.testing.assert_close(value, want[name], rtol=1e-3, atol=1e-5, msg=name)
    assert len(list(whole_model.mola_layers(mola))) == 14
    assert not list(whole_model.mola_layers(loop)) and not list(whole_model.mola_layers(frozen))
    with torch.no_grad():
        assert not torch.allclose(frozen(input_ids=tokens).logits, want["logits"], atol=1e-3)


def test_wrong_numbers_are_refused(monkeypatch):
    forward = whole_model.moelora_ops.nn.MoLALinear.forward
    monkeypatch.setattr(
        whole_model.moelora_ops.nn.MoLALinear, "forward", lambda self, x: 1.001 * forward(self, x)
    )
    record = whole_model.run_case(TINY, QUICK)
    assert record["refused"].startswith("ours on None: logits: rms") and "variants" not in record


def test_a_step_trains_what_is_trained_and_nothing_else():
    tokens = torch.arange(16).view(2, 8)
    frozen = whole_model.frozen_model(TINY)
    model = whole_model.with_lora(frozen)
    before = {name: p.clone() for name, p in model.named_parameters()}
    whole_model.Step(model, tokens, "train")()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert len(changed) == 28 and all("lora_" in name for name in changed)
    base = whole_model.with_gradient_to_the_embeddings(frozen)
    step = whole_model.Step(base, tokens, "train")
    step()
    assert step.optimizer is None and all(p.grad is None for p in base.parameters())


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(whole_model, "CASES", (TINY,))
    path = tmp_path / "models.json"
    assert whole_model.main(["--rounds", "3", "--backend", "reference", "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert document["method"] == "models" and len(document["cases"]) == 1
    assert document["command"].startswith("python benchmarks/whole_model.py --rounds 3")
    assert "tiny fp32 train" in capsys.readouterr().out
    assert whole_model.main(["--list"]) == 0
    assert capsys.readouterr().out.split()[:3] == ["tiny", "fp32", "train"]
