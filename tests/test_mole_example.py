"""The example that composes LoRAs with MoLE: it runs, and its compositions are what they say."""

import json

import pytest
import torch
from moles import make_input, make_loras

from moelora_ops.nn import LoRA


def test_the_example_on_a_tiny_model(monkeypatch, tmp_path, capsys):
    helpers = pytest.importorskip("test_examples")  # puts the examples on the path
    pytest.importorskip("safetensors")
    import mole_compose as example

    monkeypatch.setattr(example, "load_model", lambda dtype: helpers.tiny_llama().to(dtype))
    monkeypatch.setattr(example, "load_tokenizer", helpers.CharTokenizer)
    output = tmp_path / "new" / "out"
    options = {
        "steps": 3, "lora-steps": 2, "batch": 4, "few": 3, "train-per-task": 4,
        "held-out-per-task": 2, "length": 400, "rank": 2, "output": output, "gates": "layer",
    }  # fmt: skip
    argv = ["example", *(word for k, v in options.items() for word in (f"--{k}", str(v)))]
    monkeypatch.setattr("sys.argv", argv)
    example.main()
    results = json.loads((output / "report.json").read_text())
    names = list(results["scores"])
    assert names[0] == "frozen model" and names[-1] == "MoLE" and len(names) == 8
    assert all(sum(weights) == pytest.approx(1) for weights in results["expert_use"].values())
    assert len(results["gate_losses"]) == 3
    assert (output / "compose.png").read_bytes().startswith(helpers.PNG)
    assert "| average |" in (output / "report.md").read_text()
    assert "MoLE" in capsys.readouterr().out


def test_the_examples_compositions_are_what_they_say():
    pytest.importorskip("test_examples")
    import mole_compose as example

    loras = [{"q": LoRA(*make_loras((2,), seed=i)[0][:2], 0.5 + i)} for i in range(3)]
    x = make_input(4)
    each = [l["q"].scale * x @ l["q"].A.T @ l["q"].B.T for l in loras]
    made = example.compositions(loras, ["a", "b", "c"])
    got = {}
    for name, [adapter] in made.items():
        lora = adapter["q"]
        got[name] = lora.scale * x @ lora.A.T @ lora.B.T
    torch.testing.assert_close(got["LoRA b"], each[1])
    torch.testing.assert_close(got["average"], sum(each) / 3)
    torch.testing.assert_close(got["sum"], sum(each))
    same = example.compositions([loras[1]] * 3, ["a", "b", "c"])["merged factors"][0]["q"]
    torch.testing.assert_close(same.scale * x @ same.A.T @ same.B.T, each[1])
