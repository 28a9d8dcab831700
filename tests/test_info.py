"""``python -m moelora_ops.info``: right facts, readable, no failure whatever is missing."""

import json
import subprocess
import sys

import pytest
import torch

import moelora_ops
from moelora_ops import backends, info
from moelora_ops.backends import extension


def test_facts():
    facts = info.collect()
    assert facts["moelora_ops"] == moelora_ops.__version__ and facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["machine"]["cores"] >= 1 and facts["machine"]["cpu"]
    assert facts["backends"] == dict(backends.available())
    assert facts["small_linear"]["enabled"] == extension.small_linear_enabled()
    assert facts["runs"].keys() == {"float32", "bfloat16", "float16", "float64"}
    expected = "reference" if extension.why_missing() else "cpu"
    assert set(facts["runs"].values()) == {expected}


@pytest.mark.skipif(bool(extension.why_missing()), reason="the compiled extension is not built")
def test_extension_facts():
    built = info.collect()["extension"]
    assert built["path"].endswith(".so") and built["missing"] == ""
    assert built["isa"] in built["isa_levels"]


def test_missing_extension_says_why(monkeypatch):
    monkeypatch.setattr(extension, "why_missing", lambda: "no compiler was found")
    monkeypatch.setattr(extension, "isa_level", lambda: "none")
    facts = info.collect()
    assert facts["extension"] == {
        "path": None, "missing": "no compiler was found", "isa_levels": [], "isa": "none",
    }  # fmt: skip
    assert "missing: no compiler was found" in info.format_info(facts)


def test_forced_back_end_is_shown():
    with moelora_ops.use_backend("reference"):
        assert set(info.collect()["runs"].values()) == {"reference"}


def test_bad_default_back_end_is_an_answer(monkeypatch):
    monkeypatch.setattr(backends, "_default", "gpu9")
    answer = info.collect()["runs"]["float32"]
    assert answer.startswith("error: backend") and "gpu9" in answer


def test_text_names_every_fact(monkeypatch):
    monkeypatch.setenv("MOELORA_CPU_ISA", "avx2")
    monkeypatch.delenv("MOELORA_SMALL_LINEAR", raising=False)
    lines = info.format_info(info.collect()).splitlines()
    rows = {line[:22].strip(): line[23:] for line in lines}
    assert rows["moelora_ops"].startswith(moelora_ops.__version__)
    assert rows["MOELORA_CPU_ISA"].startswith("'avx2'")
    assert rows["MOELORA_SMALL_LINEAR"].startswith("not set")
    assert rows["reference"] == "available" and rows["bfloat16"] in ("cpu", "reference")
    assert "float32 up to" in rows["own frozen product"]


def test_json_round_trips(capsys):
    assert info.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out) == info.collect()


def test_module_runs():
    argv = [sys.executable, "-m", "moelora_ops.info"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("moelora_ops") and done.stderr == ""


def test_machine_without_proc(monkeypatch):
    def absent(*_, **__):
        raise OSError

    monkeypatch.setattr(info.Path, "read_text", absent)
    assert info.machine()["cpu"]
