"""All that a CUDA machine is wanted for, in one command: build, test, check, measure.

    python benchmarks/on_gpu.py                      # everything, for nine minutes at most
    python benchmarks/on_gpu.py --resume FOLDER      # what an earlier run left to do
    python benchmarks/on_gpu.py --parts build tests  # some of it
    python benchmarks/on_gpu.py --dry-run            # without a GPU: is everything in place?

Uses what is installed and no network: torch, triton, pytest, peft, transformers; nvcc for the CUDA
kernels and compute-sanitizer for its part.  Results go to one folder: results.json, from which a
later run resumes, tables.md, a plot for each benchmark, log.txt.  The last lines are a summary.
"""

import argparse
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # these sources, whatever is installed

from benchmarks.jobs import CUT, FAILED, PASSED, Job, Result, batches, run  # noqa: E402

BACKENDS = ("cuda", "triton")
# What a result depends on.
SOURCES = ("csrc", "moelora_ops", "tests", "tools", "benchmarks", "setup.py")
TESTS = {
    "device": ["tests/test_gpu.py"],
    "both": [
        "tests/test_gpu_products.py",
        "tests/test_gpu_mixes.py",
        "tests/test_gpu_grouped.py",
        "tests/test_gpu_cosines.py",
    ],
    "triton": ["tests/test_triton.py"],
    "cuda": ["tests/test_cuda.py", "tests/test_cuda_wgmma.py"],
}
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
EMULATOR, ONCE = "the_emulator", "every_operator_once"  # in names of tests
COMPILED = 2  # of a method's cases the first so many compete with compiled code too
FEW_TOKENS = 512  # up to here launches weigh as much as what they launch: graphs are measured
LEAST_SECONDS = 20  # with less left no job is started
SHOWN = ("qkvo-t8192", "qkvo-t32")  # in the summary


class Pass:
    """One run of this program: what it has and what it leaves.

    Attributes:
        folder: of what is kept.
        scratch: of what is not.
        results: json: of which sources and GPU, jobs and benchmarks' documents by job.
        left: names of jobs that were not finished.
    """

    def __init__(self, folder: Path, scratch: Path, resume: Path | None = None):
        self.folder, self.scratch, self.left = folder, scratch, []
        self.results = {"sources": fingerprint(), "gpu": gpu(), "jobs": {}, "documents": {}}
        earlier = (resume or folder) / "results.json"
        if earlier.exists():
            found = json.loads(earlier.read_text())
            if all(found[key] == self.results[key] for key in ("sources", "gpu")):
                self.results = found
            else:
                print(f"{earlier} is of other sources or another GPU: starting anew")

    def job(self, name: str) -> dict[str, Any]:
        """What is known of a job; nothing if it has not run."""
        return self.results["jobs"].get(name, {})

    def wants(self, job: Job) -> bool:
        """Whether a job is still to be run."""
        if job.instead_of and self.job(job.instead_of).get("status") != FAILED:
            return False
        return job.always or self.job(job.name).get("status", CUT) == CUT

    def keep(self, job: Job, result: Result) -> None:
        """Note what became of a job."""
        found = {"status": result.status, "seconds": round(result.seconds, 1)}
        found |= job.read(result)
        if result.status == FAILED:
            found["output"] = result.output[-4000:]
        self.results["jobs"][job.name] = found
        if found["status"] == CUT:
            self.left.append(job.name)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.txt").open("a") as log:
            log.write(f"==== {job.name}: {' '.join(job.command)}\n{result.output[-100_000:]}\n")
        (self.folder / "results.json").write_text(json.dumps(self.results, indent=1) + "\n")
        print(f"{job.name:<28} {line(found)}", flush=True)

    def documents(self, part: str) -> list[dict]:
        """What a part has measured, a document per method."""
        found = self.results["documents"]
        return [document for name, document in found.items() if name.startswith(f"{part}/")]

    def backends(self) -> list[str]:
        """GPU back ends that run here; all while nothing is built."""
        info = self.job("build/info").get("info")
        return [name for name in BACKENDS if info is None or not info["backends"][name]]


def fingerprint() -> str:
    """Of the sources' contents: the copy of a tree may come without its git."""
    digest = hashlib.sha256()
    for top in SOURCES:
        path = ROOT / top
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            place = file.relative_to(ROOT)
            built = {"__pycache__", "results"} & set(place.parts) or file.suffix == ".so"
            if file.is_file() and not built:
                digest.update(f"{place}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def nvidia_smi(field: str) -> str:
    """What it says of the first GPU; nothing where there is none."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.partition("\n")[0].strip()


def gpu() -> str:
    """The GPU as a part of a file's name: "h200"."""
    words = re.sub(r"[^a-z0-9]+", "-", nvidia_smi("name").lower()).strip("-")
    return words.removeprefix("nvidia-") or "no-gpu"


# ---------------------------------------------------------------- build


def build(p: Pass) -> Iterator[Job]:
    """The package from source, in place; without CUDA kernels if these do not build."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    capability = nvidia_smi("compute_cap") or "9.0"
    environment = {
        "MOELORA_CPP": "1",
        "MOELORA_CUDA": "1",
        "MAX_JOBS": str(os.cpu_count()),
        "TORCH_CUDA_ARCH_LIST": capability + ("a" if float(capability) >= 9 else ""),
    }
    scratch = ["--build-temp", str(p.scratch / "temp"), "--build-lib", str(p.scratch / "lib")]
    with_cuda = Job(
        "build/package", command, 300, rehearsal=[*command[:3], *scratch], always=True,
        environment=environment,
    )  # fmt: skip
    yield with_cuda
    yield with_cuda._replace(
        name="build/package-without-cuda",
        rehearsal=None,
        environment=environment | {"MOELORA_CUDA": "0"},
        instead_of=with_cuda.name,
    )


def info(p: Pass) -> Iterator[Job]:
    """What is built and would run."""

    def read(result: Result) -> dict:
        found = result.output
        return {"info": json.loads(found[found.index("{") :])} if result.status == PASSED else {}

    command = [sys.executable, "-m", "moelora_ops.info", "--json"]
    yield Job("build/info", command, 60, read, rehearsal=command, always=True)


# ---------------------------------------------------------------- tests


def pytest_job(p: Pass, name: str, seconds: float, *arguments: str) -> Job:
    report = p.scratch / f"{name.replace('/', '-')}.xml"
    command = [sys.executable, "-m", "pytest", "--gpu", "-q", *arguments]
    return Job(
        name, [*command, f"--junitxml={report}"], seconds, lambda result: read_junit(report),
        rehearsal=[*command, "--collect-only"],
    )  # fmt: skip


def read_junit(report: Path) -> dict[str, Any]:
    """Counts, names of failed tests, reasons of skipped ones, and recorded properties."""
    if not report.exists():
        return {}
    passed, failed, skipped, properties = 0, [], {}, {}
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}"
        if (skip := case.find("skipped")) is not None:
            skipped[skip.get("message")] = skipped.get(skip.get("message"), 0) + 1
        elif case.find("failure") is not None or case.find("error") is not None:
            failed.append(name)
        else:
            passed += 1
        if found := {each.get("name"): each.get("value") for each in case.iter("property")}:
            properties[name] = found
    return {"passed": passed, "failed": failed, "skipped": skipped, "properties": properties}


def side_by_side() -> list[str]:
    """pytest's options for several processes, if it has them: compiling takes most of the time."""
    workers = min(8, os.cpu_count() or 1)
    return ["-n", str(workers)] if importlib.util.find_spec("xdist") else []


def tests(p: Pass) -> Iterator[Job]:
    """Everything that knows a GPU, on this one."""
    for name, files in TESTS.items():
        if name not in BACKENDS or name in p.backends():
            yield pytest_job(
                p, f"tests/{name}", 240, *side_by_side(), "-k", f"not {EMULATOR}", *files
            )


def compare(p: Pass) -> Iterator[Job]:
    """The emulator's results beside the device's."""
    for backend in p.backends():
        chosen = f"{EMULATOR} and {backend}"
        yield pytest_job(p, f"compare/{backend}", 150, "-k", chosen, *TESTS["device"])


def sanitize(p: Pass) -> Iterator[Job]:
    """compute-sanitizer on one step of every method; at once, as nothing is timed."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    for backend in p.backends():
        for check in SANITIZERS:
            chosen = f"{ONCE} and {backend}"
            job = pytest_job(
                p, f"sanitize/{check}-{backend}", 150, "-k", chosen, "-p", "no:cacheprovider",
                *TESTS["device"],
            )  # fmt: skip
            # Of a cached allocator's blocks the tool would not know where tensors end.
            yield job._replace(
                command=[tool, "--tool", check, "--error-exitcode", "86", *job.command],
                read=functools.partial(read_sanitizer, job.read),
                environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                together=True,
            )


def read_sanitizer(read: Callable[[Result], dict], result: Result) -> dict[str, Any]:
    summaries = re.findall(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (.*)$", result.output, re.MULTILINE)
    return read(result) | {"summary": summaries}


# ---------------------------------------------------------------- benchmarks


def measured(p: Pass, name: str, report: Path, wanted: int, result: Result) -> dict[str, Any]:
    """Join what a benchmark has written with what earlier runs of its job did."""
    earlier = p.results["documents"].get(name, {"cases": []})["cases"]
    if report.exists():
        document = json.loads(report.read_text())
        document["cases"] = earlier + document["cases"]
        p.results["documents"][name] = document
    cases = p.results["documents"].get(name, {"cases": []})["cases"]
    refused = {record["case"]: record["refused"] for record in cases if "refused" in record}
    return {"cases": len(cases), "of": wanted, "refused": refused}


def bench_job(
    p: Pass, name: str, program: list[str], cases: list[str], seconds: float
) -> Iterator[Job]:
    """A benchmark of those of `cases` that are not in its document yet."""
    report = p.scratch / f"{name.replace('/', '-')}.json"
    done = p.results["documents"].get(name, {"cases": []})["cases"]
    left = [case for case in cases if case not in {record["case"] for record in done}]
    if not left:
        return
    program = [sys.executable, *program]
    command = [
        *program, "--device", "cuda", "--backend", *p.backends(), "--case", *left, "--json",
        str(report),
    ]  # fmt: skip
    yield Job(
        name, command, seconds, functools.partial(measured, p, name, report, len(cases)),
        rehearsal=[*program[:4], "--device", "cuda", "--list"],
    )  # fmt: skip


def bench(part: str, direction: str, graphs: bool = False) -> Callable[[Pass], Iterator[Job]]:
    """A part that measures one direction of all methods."""

    def jobs(p: Pass) -> Iterator[Job]:
        from moelora_ops.bench import METHODS  # once the package is built

        if not p.backends():
            return
        for name, method in METHODS.items():
            cases = [
                case.name
                for case in method.gpu_cases
                if direction in case.directions and not (graphs and case.tokens > FEW_TOKENS)
            ]
            program = ["-m", "moelora_ops.bench", name, "--direction", direction]
            program += ["--rounds", "40", "--seconds", "1.5", *(["--graphs"] if graphs else [])]
            first, rest = cases[:COMPILED], cases[COMPILED:]
            yield from bench_job(p, f"{part}/{name}", program, first, 40 + 45 * len(first))
            if rest:
                # Compiling for every shape would take most of the time.
                program = [*program, "--no-compile"]
                yield from bench_job(p, f"{part}/{name}-more", program, rest, 30 + 10 * len(rest))

    return jobs


def bench_models(p: Pass) -> Iterator[Job]:
    """A decoder layer, and whole models, against PEFT."""
    from benchmarks.whole_model import CASES

    if p.backends():
        program = ["benchmarks/whole_model.py", "--rounds", "20", "--seconds", "6"]
        cases = [case.name for case in CASES]
        yield from bench_job(p, "bench-models/llama", program, cases, 40 + 30 * len(cases))


# ---------------------------------------------------------------- the pass

PARTS: dict[str, Callable[[Pass], Iterator[Job]]] = {
    "build": build,
    "info": info,
    "tests": tests,
    "compare": compare,
    "sanitize": sanitize,
    "bench-train": bench("bench-train", "train"),
    "bench-forward": bench("bench-forward", "forward"),
    "bench-graphs": bench("bench-graphs", "forward", graphs=True),
    "bench-dx": bench("bench-dx", "dx"),
    "bench-models": bench_models,
}
FIRST = ("build", "info")  # every pass


def run_parts(p: Pass, parts: list[str], deadline: float) -> None:
    """Run what is still to be run of some parts, as far as the time goes."""
    for part in parts:
        for jobs in batches(PARTS[part](p)):
            todo = [job for job in jobs if p.wants(job)]
            if todo and deadline - time.monotonic() < LEAST_SECONDS:
                p.left += [job.name for job in todo]
            elif todo:
                for job, result in zip(todo, run(todo, p.scratch, ROOT, deadline), strict=True):
                    p.keep(job, result)


def rehearse(p: Pass, parts: list[str]) -> bool:
    """Whether all commands have what they need but a GPU; says so of each."""
    ready = True
    for part in parts:
        for job in PARTS[part](p):
            if job.rehearsal is None:
                continue
            rehearsal = job._replace(command=job.rehearsal, together=False)
            (result,) = run([rehearsal], p.scratch, ROOT, time.monotonic() + 1800)
            ready &= result.status == PASSED
            told = "ready" if result.status == PASSED else f"NOT ready\n{result.output[-2000:]}"
            print(f"{job.name:<28} {told}", flush=True)
    return ready


# ---------------------------------------------------------------- what is handed back


def line(found: dict[str, Any]) -> str:
    """What is known of a job."""
    told = [found["status"], f"{found['seconds']:.0f} s"]
    if "passed" in found:
        told.append(f"{found['passed']} passed, {len(found['failed'])} failed")
        told += [f"{count} skipped: {why}" for why, count in found["skipped"].items()]
        told += [f"FAILED {name}" for name in found["failed"][:5]]
    told += found.get("summary", [])
    if "cases" in found:
        told.append(f"{found['cases']} of {found['of']} cases")
        told += [f"REFUSED {case}: {why}" for case, why in found["refused"].items()]
    return "; ".join(told)


def summary(p: Pass) -> str:
    """The jobs, and what ours cost in the cases that count."""
    lines = [f"{name:<28} {line(found)}" for name, found in p.results["jobs"].items()]
    for name, document in p.results["documents"].items():
        for record in document["cases"]:
            if record["case"] in SHOWN and "refused" not in record:
                taxes = ", ".join(
                    f"{variant} {found['tax']:.3f}"
                    for variant, found in record["variants"].items()
                    if variant != "base"
                )
                lines.append(f"{name} {record['case']} {record['dtype']}: {taxes}")
    lines.append(f"left to do: {', '.join(p.left) or 'nothing'}")
    return "\n".join(lines)


def write_results(p: Pass) -> None:
    """tables.md and the plots, from what results.json holds."""
    from moelora_ops.bench import report

    documents = p.results["documents"]
    parts = [f"# On {p.results['gpu']}\n\n```\n{summary(p)}\n```\n"]
    parts += [f"<!-- {name} -->\n{report.markdown(found)}" for name, found in documents.items()]
    (p.folder / "tables.md").write_text("\n".join(parts))
    for part in {name.partition("/")[0] for name in documents}:
        figure = report.draw_sweep(p.documents(part))
        figure.savefig(p.folder / f"{part}.png", dpi=120)


def main(argv: list[str] | None = None) -> int:
    """0: all that was wanted has run and passed; 1: something has not."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=8.5, help="in which all is to be done")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER",
        help="default: benchmarks/results/<date>-<gpu>, or in the folder that $OUT names",
    )  # fmt: skip
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="of an earlier pass")
    parser.add_argument(
        "--dry-run", action="store_true", help="show that all is in place, without a GPU"
    )
    arguments = parser.parse_args(argv)
    deadline = time.monotonic() + 60 * arguments.minutes
    above = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    folder = arguments.out or above / f"{date.today()}-{gpu()}"
    if arguments.resume and not (arguments.resume / "results.json").exists():
        parser.error(f"--resume: {arguments.resume} has no results.json")
    parts = [part for part in PARTS if part in FIRST or part in arguments.parts]
    with tempfile.TemporaryDirectory() as scratch:
        p = Pass(folder, Path(scratch), arguments.resume)
        if arguments.dry_run:
            return 0 if rehearse(p, [part for part in PARTS if part in arguments.parts]) else 1
        if not nvidia_smi("name"):
            parser.error("there is no GPU here: --dry-run shows what would run")
        run_parts(p, parts, deadline)
        write_results(p)
    print(f"\n{folder}\n{summary(p)}")
    wrong = [name for name, found in p.results["jobs"].items() if found["status"] == FAILED]
    return 1 if wrong or p.left else 0


if __name__ == "__main__":
    sys.exit(main())
