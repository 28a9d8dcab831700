"""``python -m moelora_ops.info``: right facts, readable, no failure whatever is missing."""

import json
import subprocess
import sys

import pytest
import torch

import moelora_ops
from moelora_ops import backends, info
from moelora_ops.backends import extension, strategy, triton
from moelora_ops.backends.triton import tiles


def test_facts():
    facts = info.collect()
    assert facts["moelora_ops"] == moelora_ops.__version__ and facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["machine"]["cores"] >= 1 and facts["machine"]["cpu"]
    assert facts["backends"] == dict(backends.available())
    assert facts["linear"]["choice"] == extension.linear_choice()
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


def test_gpu_facts():
    facts = info.collect()
    assert facts["triton"]["version"] == (triton.version() or None)
    assert facts["triton"]["missing"] == dict(backends.available())["triton"]
    assert facts["triton"]["archs"] == ["sm_80", "sm_90", "sm_100", "gfx942"]


def test_paths_are_those_that_exist(monkeypatch):
    """Of back ends with kernels; a path that a back end lacks is nowhere."""
    monkeypatch.setattr(triton, "_missing", "")
    monkeypatch.setitem(strategy.PATHS, "triton", ("stacked",))
    facts = info.collect()
    assert {t["path"] for t in facts["paths"]["triton"]["takes"]} == {"stacked"}
    lines = info.format_info(facts).splitlines()
    assert not any("decode for" in line for line in lines if line.startswith("  triton E="))
    monkeypatch.setitem(strategy.PATHS, "triton", ("stacked", "decode"))
    text = info.format_info(info.collect())
    assert "  triton E=8 r=8 k=2 " in text
    assert "decode for T = 1, 32; stacked for T = 512, 8192" in text
    monkeypatch.setattr(triton, "_missing", "triton is not installed")
    table = tuple(
        row._replace(missing=triton.why_missing) if row.name == "triton" else row
        for row in backends.BACKENDS
    )
    monkeypatch.setattr(backends, "BACKENDS", table)
    facts = info.collect()
    assert "triton" not in facts["paths"]
    assert "no: triton is not installed" in info.format_info(facts)


def test_what_was_measured_to_be_fastest(monkeypatch):
    monkeypatch.setattr(backends.measured, "TABLE", {})
    assert "measured fastest     none" in info.format_info(info.collect())
    table = {("topk", "sm_90"): "triton", ("grid", "sm_90"): "triton"}
    monkeypatch.setattr(backends.measured, "TABLE", table)
    facts = info.collect()
    assert facts["measured"] == [["grid", "sm_90", "triton"], ["topk", "sm_90", "triton"]]
    assert "grid on sm_90: triton, topk on sm_90: triton" in info.format_info(facts)


def test_tiles(capsys):
    """One line for each architecture, dtype, number of tokens and product."""
    assert info.main(["--tiles"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 4 * 2 * len(info.TOKENS) * 3
    tile = tiles.expand(8192, 4096, 64, 2, tiles.ARCHS[1])
    (line,) = (t for t in lines if t.split()[:4] == ["sm_90", "bfloat16", "T=8192", "expand"])
    assert f"BT={tile.BT} BN={tile.BN} BR={tile.BR} walk={tile.walk}" in line


def test_forced_back_end_is_shown():
    with moelora_ops.use_backend("reference"):
        assert set(info.collect()["runs"].values()) == {"reference"}


def test_bad_default_back_end_is_an_answer(monkeypatch):
    monkeypatch.setattr(backends, "_default", "gpu9")
    answer = info.collect()["runs"]["float32"]
    assert answer.startswith("error: backend") and "gpu9" in answer


def test_text_names_every_fact(monkeypatch):
    monkeypatch.setenv("MOELORA_CPU_ISA", "avx2")
    monkeypatch.delenv("MOELORA_LINEAR", raising=False)
    lines = info.format_info(info.collect()).splitlines()
    rows = {line[:22].strip(): line[23:] for line in lines}
    assert rows["moelora_ops"].startswith(moelora_ops.__version__)
    assert rows["MOELORA_CPU_ISA"].startswith("'avx2'")
    assert rows["MOELORA_LINEAR"].startswith("not set")
    assert rows["reference"] == "available" and rows["bfloat16"] in ("cpu", "reference")
    assert rows["own frozen product"].startswith("auto: tokens in float32 ")
    assert rows["own frozen product"].endswith("float64 none")


@pytest.mark.parametrize(("choice", "said"), (("own", "any number"), ("library", "none")))
def test_own_product_by_choice(monkeypatch, choice, said):
    monkeypatch.setattr(extension, "_linear", choice)
    monkeypatch.setattr(extension, "_error", "")
    assert f"own frozen product     {choice}: tokens in float32 {said}" in info.format_info(
        info.collect()
    )


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
