"""The MoR1E example: all of it on a tiny random model, and its claim of equal sizes."""
# ruff: noqa: E402  (imports after importorskip and the path of the examples)

import json

import pytest
import torch
from torch import nn

for package in ("sklearn", "safetensors"):
    pytest.importorskip(package)
helpers = pytest.importorskip("test_examples")  # skips without the packages of the examples
import mor1e_smollm2 as example


def test_the_example_on_a_tiny_model(monkeypatch, tmp_path, capsys):
    class Letters:
        """Embeds a sentence by how often each letter occurs."""

        def __call__(self, sentences):
            letters = [torch.tensor([ord(letter) % 128 for letter in s]) for s in sentences]
            return torch.stack([torch.bincount(ids, minlength=128).float() for ids in letters])

    monkeypatch.setattr(example, "load_model", lambda dtype: helpers.tiny_llama().to(dtype))
    monkeypatch.setattr(example, "load_tokenizer", helpers.CharTokenizer)
    monkeypatch.setattr(example, "SentenceEncoder", Letters)
    sizes = ["--steps", "3", "--batch", "2", "--length", "400", "--train-per-task", "8"]
    argv = ["demo", *sizes, "--held-out-per-task", "2", "--output", str(tmp_path / "new" / "out")]
    monkeypatch.setattr("sys.argv", argv)
    example.main()

    results = json.loads((tmp_path / "new" / "out" / "report.json").read_text())
    variants = [example.INTUITION, example.SAME, example.NONE, example.LORA]
    assert list(results["losses"]) == variants
    assert list(results["scores"]) == [example.BEFORE, *variants]
    first = [values[0] for values in results["losses"].values()]
    assert first == pytest.approx([first[0]] * 4, rel=1e-5)  # every variant starts as the model
    last = {round(values[-1], 6) for values in results["losses"].values()}
    assert len(last) == 4  # and then they differ
    sizes = list(results["trained_parameters"].values())
    assert sizes[0] == sizes[1] == sizes[2] and sizes[3] == pytest.approx(sizes[0], rel=0.05)
    for counts in results["clusters_of_tasks"].values():
        assert sum(counts) == 2 and len(counts) == 32
    assert (tmp_path / "new" / "out" / "mor1e.png").read_bytes().startswith(helpers.PNG)
    written = (tmp_path / "new" / "out" / "report.md").read_text()
    assert all(name in written for name in (*variants, *example.tasks.TASKS))
    assert "All of it took" in capsys.readouterr().out


def test_the_example_finds_a_lora_of_equal_size():
    model = helpers.tiny_llama()
    shapes = [(m.in_features, m.out_features) for m in model.model.layers.modules()
              if isinstance(m, nn.Linear)]  # fmt: skip
    wanted = sum(36 * i + 8 * o + 2 for i, o in shapes) / sum(i + o for i, o in shapes)
    assert example.equal_rank(model) == round(wanted)
    assert not any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("option", ["--steps", "--batch", "--train-per-task"])
def test_the_example_refuses_nothing_to_do(monkeypatch, capsys, option):
    monkeypatch.setattr("sys.argv", ["demo", option, "0"])
    with pytest.raises(SystemExit):
        example.parse_arguments()
    assert f"{option}: wanted at least 1" in capsys.readouterr().err
