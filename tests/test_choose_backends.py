"""benchmarks/choose_backends.py on results that were made up."""

import importlib.util
import json

import pytest

from benchmarks import choose_backends
from moelora_ops.backends import measured


def record(mix, **milliseconds):
    """A case in which our layer took so long on each back end."""
    ours = {f"ours-{name}": {"median_ms": value} for name, value in milliseconds.items()}
    return {"mix": mix, "variants": {"base": {"median_ms": 1.0}, **ours}}


def document(architecture, *cases):
    return {"device": {"architecture": architecture}, "cases": list(cases)}


SLOWER = record("gated", cuda=1.0, triton=1.1)
FASTER = record("topk", cuda=2.0, triton=1.0), record("topk", cuda=1.0, triton=1.5)


def table(path):
    spec = importlib.util.spec_from_file_location("written", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TABLE


@pytest.fixture
def run(tmp_path):
    def run(*documents):
        """The table that is written."""
        paths = []
        for i, found in enumerate(documents):
            paths.append(tmp_path / f"{i}.json")
            paths[-1].write_text(json.dumps(found))
        out = tmp_path / "measured.py"
        assert choose_backends.main([*map(str, paths), "--out", str(out)]) == 0
        return table(out)

    return run


def test_what_takes_less_time_is_chosen(run, capsys):
    """By the geometric mean: twice as fast weighs more than half as slow again."""
    assert run(document("sm_90", SLOWER, *FASTER)) == {("topk", "sm_90"): "triton"}
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "gated on sm_90: cuda, 1.00 of the first one's time, 1 cases",
        "topk on sm_90: triton, 0.87 of the first one's time, 2 cases",
    ]


def test_noise_chooses_nothing(run):
    assert run(document("sm_90", record("topk", cuda=1.0, triton=0.98))) == {}


def test_documents_of_a_whole_pass(run):
    whole = {"documents": {"a": document("sm_80", FASTER[0]), "b": document("sm_80", FASTER[1])}}
    one = document("sm_90", record("topk", cuda=1.0, triton=1.2))
    assert run(whole, one) == {("topk", "sm_80"): "triton"}


def test_entries_that_were_not_measured_again_stay(run, monkeypatch):
    kept = {("grid", "sm_90"): "triton", ("topk", "sm_100"): "triton"}
    monkeypatch.setattr(measured, "TABLE", kept | {("gated", "sm_90"): "triton"})
    assert run(document("sm_90", SLOWER)) == kept


def test_what_does_not_count(run):
    """Refused cases, cases of one back end, layers without a mix."""
    refused = {"mix": "topk", "refused": "out of memory"}
    alone, none = record("topk", triton=0.1), record("", cuda=1.0, triton=0.1)
    found = document("sm_90", SLOWER, refused, alone, none)
    assert run(found) == {}


NAMELESS = {name: value for name, value in SLOWER.items() if name != "mix"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "wanted results"),
        ("{", "wanted results"),
        ("[]", "wanted results"),
        ("{}", "wanted results"),
        (json.dumps({"cases": []}), "wanted results"),
        (json.dumps({"documents": {"a": document("sm_90", NAMELESS)}}), "KeyError('mix')"),
        (json.dumps({"device": {"name": "H200"}, "cases": [SLOWER]}), "KeyError('architecture')"),
        (json.dumps({"device": None, "cases": [SLOWER]}), "KeyError('architecture')"),
        (json.dumps(document("sm_90")), "competed in none"),
    ],
)
def test_bad_results(content, message, tmp_path, capsys):
    path, out = tmp_path / "bad.json", tmp_path / "measured.py"
    path.write_text(content)
    with pytest.raises(SystemExit):
        choose_backends.main([str(path), "--out", str(out)])
    assert not out.exists()
    error = capsys.readouterr().err
    assert message in error
    assert "bad.json" in error or message == "competed in none"
