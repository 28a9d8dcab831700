"""What benchmarks/on_gpu.py does with its jobs, by jobs that need no GPU."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import on_gpu
from benchmarks.jobs import CUT, FAILED, PASSED, Job, batches, run

ROOT = Path(__file__).resolve().parents[1]


def python(name, program, seconds=30.0, **options):
    return Job(name, [sys.executable, "-c", program], seconds, **options)


def soon(seconds=60.0):
    return time.monotonic() + seconds


# ---------------------------------------------------------------- jobs


def test_what_becomes_of_a_job(tmp_path):
    jobs = [
        python("a/good", "import os; print(os.environ['GIVEN'])", environment={"GIVEN": "words"}),
        python("a/bad", "raise SystemExit('why')"),
        Job("a/missing", ["./no-such-program"], 30.0),
    ]
    good, bad, missing = run(jobs, tmp_path, tmp_path, soon())
    assert (good.status, good.output) == (PASSED, "words\n")
    assert (bad.status, bad.output) == (FAILED, "why\n")
    assert missing.status == FAILED and "no-such-program" in missing.output


@pytest.mark.parametrize(("seconds", "deadline"), [(4.0, 60.0), (60.0, 4.0)])
def test_a_job_is_cut_with_its_children(tmp_path, seconds, deadline):
    """It may still write what it has."""
    program = """
import subprocess, time
print(subprocess.Popen(["sh", "-c", "trap '' INT; sleep 60; true"]).pid, flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted")
"""
    begin = time.monotonic()
    (result,) = run([python("a/long", program, seconds)], tmp_path, tmp_path, soon(deadline))
    assert result.status == CUT and time.monotonic() - begin < 30
    pid, said = result.output.split("\n", 1)
    assert said == "interrupted\n"
    process = Path(f"/proc/{pid}/cmdline")  # empty of what is dead and not yet waited for
    for _ in range(500):
        if not process.exists() or not process.read_text():
            return
        time.sleep(0.01)
    raise AssertionError("its child lives")


def test_side_by_side(tmp_path):
    """Jobs that wait for each other."""
    program = """
import pathlib, sys, time
pathlib.Path("%s").touch()
while not pathlib.Path("%s").exists():
    time.sleep(0.01)
"""
    jobs = [
        python("a/one", program % ("one", "two"), together=True),
        python("a/two", program % ("two", "one"), together=True),
    ]
    assert list(batches(jobs)) == [jobs]
    assert [result.status for result in run(jobs, tmp_path, tmp_path, soon())] == [PASSED, PASSED]
    alone = [job._replace(together=False) for job in jobs]
    assert list(batches([*alone, *jobs])) == [[alone[0]], [alone[1]], jobs]


# ---------------------------------------------------------------- a pass


def pass_over(monkeypatch, tmp_path, jobs, seconds=60.0, resume=None, folder="results"):
    """One pass whose only part is `jobs`."""
    monkeypatch.setattr(on_gpu, "PARTS", {"a": lambda p: iter(jobs)})
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    p = on_gpu.Pass(tmp_path / folder, scratch, resume)
    on_gpu.run_parts(p, ["a"], soon(seconds))
    return p


def test_a_pass_resumes(monkeypatch, tmp_path, capsys):
    """What was cut or not begun runs again, and what always runs; the rest is kept."""
    monkeypatch.setattr(on_gpu, "LEAST_SECONDS", 0.5)
    count = "open('count', 'a').write('x')"
    monkeypatch.setattr(on_gpu, "ROOT", tmp_path)
    monkeypatch.setattr(on_gpu, "fingerprint", lambda: "these")
    jobs = [
        python("a/done", count),
        python("a/always", count, always=True),
        python("a/cut", "import time; time.sleep(60)", 0.5),
        python("a/instead", count, instead_of="a/done"),
        python("a/wrong", "raise SystemExit('why')"),
        python("a/instead-of-wrong", count, instead_of="a/wrong"),
    ]
    p = pass_over(monkeypatch, tmp_path, jobs)
    kept = json.loads((tmp_path / "results" / "results.json").read_text())["jobs"]
    assert {name: found["status"] for name, found in kept.items()} == {
        "a/done": PASSED, "a/always": PASSED, "a/cut": CUT, "a/wrong": FAILED,
        "a/instead-of-wrong": PASSED,
    }  # fmt: skip
    assert kept["a/wrong"]["output"] == "why\n"
    assert p.left == ["a/cut"] and (tmp_path / "count").read_text() == "xxx"
    assert "a/cut" in on_gpu.summary(p).splitlines()[-1]

    jobs[2] = python("a/cut", "")
    p = pass_over(monkeypatch, tmp_path, jobs, resume=tmp_path / "results", folder="again")
    assert not p.left and p.job("a/cut")["status"] == PASSED
    assert (tmp_path / "count").read_text() == "xxxx"
    assert set(p.results["jobs"]) == set(kept)

    monkeypatch.setattr(on_gpu, "fingerprint", lambda: "others")
    p = pass_over(monkeypatch, tmp_path, jobs, seconds=0.1, resume=tmp_path / "again")
    assert "starting anew" in capsys.readouterr().out
    assert "a/done" in p.left and not p.results["jobs"]


def test_tests_and_sanitizers_are_read(tmp_path):
    test = tmp_path / "test_some.py"
    test.write_text(
        "import pytest\n"
        "def test_good(record_property): record_property('bits', '99 %')\n"
        "def test_bad(): assert False\n"
        "@pytest.mark.skip(reason='not here')\n"
        "def test_skipped(): pass\n"
    )
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", str(test), f"--junitxml={report}"]
    subprocess.run([*command, "-p", "no:cacheprovider"], cwd=tmp_path, capture_output=True)
    found = on_gpu.read_junit(report)
    assert found == {
        "passed": 1, "failed": ["test_some.test_bad"], "skipped": {"not here": 1},
        "properties": {"test_some.test_good": {"bits": "99 %"}},
    }  # fmt: skip
    result = on_gpu.Result(FAILED, 1.0, "words\n========= ERROR SUMMARY: 2 errors\n")
    found = on_gpu.read_sanitizer(lambda result: found, result) | {"status": FAILED, "seconds": 1.0}
    told = on_gpu.line(found)
    for word in ("1 passed, 1 failed", "1 skipped: not here", "FAILED test_some.test_bad", "2 err"):
        assert word in told
    assert on_gpu.read_junit(tmp_path / "none.xml") == {}


def test_a_benchmark_goes_on_where_it_stopped(monkeypatch, tmp_path):
    """Cases that it has measured are neither lost nor measured again, and the tables show all."""
    monkeypatch.setattr(on_gpu, "fingerprint", lambda: "these")
    measured = {}
    for case in ("t8", "t64"):
        report = tmp_path / f"{case}.json"
        command = ["mola", "--case", case, "--dtype", "fp32", "--direction", "forward", "--quick"]
        module = [sys.executable, "-m", "moelora_ops.bench", *command, "--json", str(report)]
        subprocess.run(module, cwd=ROOT, check=True, capture_output=True)
        measured[case] = report.read_text()

    p = on_gpu.Pass(tmp_path / "results", tmp_path)
    for done, case in enumerate(measured):
        (job,) = on_gpu.bench_job(p, "bench/mola", ["bench.py"], ["t8", "t64"], 10.0)
        given = job.command[job.command.index("--case") + 1 : job.command.index("--json")]
        assert given == ["t8", "t64"][done:]
        Path(job.command[-1]).write_text(measured[case])
        p.keep(job, on_gpu.Result(CUT, 1.0, ""))
    assert list(on_gpu.bench_job(p, "bench/mola", ["bench.py"], ["t8", "t64"], 10.0)) == []
    assert p.job("bench/mola")["cases"] == 2
    on_gpu.write_results(p)
    tables = (p.folder / "tables.md").read_text()
    assert "T=8 " in tables and "T=64 " in tables
    assert (p.folder / "bench.png").stat().st_size > 1000


# ---------------------------------------------------------------- the command


def test_bad_arguments(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(on_gpu, "nvidia_smi", lambda field: "")
    for arguments, message in (
        (["--out", str(tmp_path / "out")], "no GPU"),
        (["--resume", str(tmp_path)], "results.json"),
        (["--parts", "everything"], "everything"),
    ):
        with pytest.raises(SystemExit):
            on_gpu.main(arguments)
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_all_tests_that_know_a_gpu_run():
    """Those of the emulator itself, of compiled kernels and of counts need none."""
    without = {
        "test_cuda_traffic.py", "test_devices.py", "test_gpu_traffic.py", "test_triton_compile.py",
        "test_tune_tiles.py",
    }  # fmt: skip
    known = re.compile(
        r"^(?:from|import) (?:triton_gpu|cuda_gpu|gpus)\b|^def test_\w+\([^)]*\bgpu\b", re.MULTILINE
    )
    folder = ROOT / "tests"
    found = {p.name for p in folder.glob("test_*.py") if known.search(p.read_text())} - without
    assert {Path(file).name for files in on_gpu.TESTS.values() for file in files} == found


def test_dry_run(capsys):
    """Every test and every case of the benchmarks is where the commands look for it."""
    parts = ["compare", "bench-models"]
    assert on_gpu.main(["--dry-run", "--parts", *parts]) == 0, capsys.readouterr().out
    told = capsys.readouterr().out
    assert all(f"{part}/" in told for part in parts) and "NOT" not in told
