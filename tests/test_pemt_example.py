"""The example that transfers with PEMT: its tasks' answers, and that it runs."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def example(monkeypatch):
    for package in ("matplotlib", "rich", "safetensors"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples")
    import pemt_t5

    return pemt_t5


def test_the_examples_answers_are_right(example):
    for task in ("text", *example.PROPERTIES, "target"):
        words = {i: word for word, i in example.VOCABULARY.items()}
        for text, answer in example.make_examples(task, 50, seed=1):
            assert words[text[-1]] == words[answer[-1]] == "</s>"
            assert len(text) == example.LENGTH + 1 and len(answer) == 2
            said = words[answer[0]]
            if task == "text":
                assert [words[i] for i in text].count("<mask>") == 1
                known = [int(words[i][1:]) for i in text[:-1] if words[i] != "<mask>"]
                everyone = [*known, int(said[1:])]
                shared = [
                    len({example.value_of(w, name) for w in everyone}) for name in example.IN_TEXT
                ]
                assert 1 in shared
                continue
            name = "colour" if task == "target" else task
            values = [example.value_of(int(words[i][1:]), name) for i in text[:-1]]
            commonest = max(set(values), key=values.count)
            assert sum(values.count(v) == values.count(commonest) for v in set(values)) == 1
            want = ("yes" if commonest in example.WARM else "no") if task == "target" else commonest
            assert said == want


def test_the_whole_example_with_a_few_steps(example, monkeypatch, tmp_path, capsys):
    output = tmp_path / "new" / "folder"
    small = {
        "--width": 32, "--layers": 1, "--pretrain-steps": 3, "--source-steps": 2, "--steps": 2,
        "--seeds": 2, "--held-out": 20, "--rank": 2, "--batch": 4,
    }  # fmt: skip
    options = [str(word) for pair in small.items() for word in pair]
    monkeypatch.setattr(
        "sys.argv", ["pemt_t5", *options, "--shots", "2", "4", "--output", str(output)]
    )
    example.main()
    facts = json.loads((output / "report.json").read_text())
    rivals = [example.PEMT, example.ORACLE, example.LORA, example.FULL]
    assert list(facts["target"]) == list(facts["trained"]) == rivals
    assert all(len(seeds) == 2 for r in facts["target"].values() for seeds in r.values())
    assert list(facts["sources"]) == list(example.PROPERTIES)
    assert len(facts["weights"]) == 2
    assert all(sum(row) == pytest.approx(1, rel=1e-5) for row in facts["weights"].values())
    assert facts["trained"][example.PEMT] < facts["trained"][example.FULL]
    assert (output / "pemt.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    printed = capsys.readouterr().out
    for name in rivals:
        assert f"| {name} |" in (output / "report.md").read_text() and name in printed


def test_the_example_refuses_no_steps(example, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["pemt_t5", "--steps", "0"])
    with pytest.raises(SystemExit):
        example.parse_arguments()
    assert "--steps: wanted at least 1, got 0" in capsys.readouterr().err
