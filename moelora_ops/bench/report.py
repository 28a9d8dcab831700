"""What the benchmark hands back: tables, json, markdown, a plot, and the facts about the run.

Tables need rich and the plot matplotlib, both optional: see :func:`require`.
"""

import contextlib
import importlib
import json
import shlex
import subprocess
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

from .. import info
from .method import Method
from .runner import BASE, TOUCH, Settings

EXPLANATION = (
    "overhead = layer / frozen base - 1: median of the ratios inside each round, and of the fastest"
    " calls; tax = layer / base; x floor = overhead over the least arithmetic; saved = what"
    " autograd keeps for backward beyond x and the parameters, by saved_tensors_hooks, distinct"
    " storages; peak = most tensor memory in use during a step, beyond what was before; touch = the"
    " frozen base, then x read and y rewritten (backward dy and dx) and no adapter: what moving the"
    " memory alone costs; 16bit ="
    " router logits rounded to x's dtype; † = a baseline that keeps to its error budget in fp32 but"
    " not in this dtype"
)
_COARSE = "†"
_COLORS = {"ours": "tab:orange", TOUCH: "tab:blue"}
_HEADERS = (
    "variant",
    "median ms",
    "min ms",
    "overhead",
    "of minima",
    "tax",
    "x floor",
    "saved KiB",
    "peak KiB",
)


class MissingPackage(RuntimeError):
    """An optional package is not installed; the message says how to install it."""


def require(*packages: str) -> None:
    """Raises MissingPackage unless all of them can be imported."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            message = f"needs {package}, which is not installed: pip install 'moelora_ops[bench]'"
            raise MissingPackage(message) from error


def header(method: Method, settings: Settings, argv: list[str]) -> dict:
    """The facts about a run: when, where, with what, and how to repeat it."""
    return {
        "method": method.name,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "moelora_ops.bench", *argv]),
        "commit": _commit(),
        "settings": settings._asdict(),
        "info": _without_paths(info.collect()),
    }


def _without_paths(facts: dict) -> dict:
    """`facts` as they may be published: where something lies on this machine is nobody's matter."""
    return {
        key: _without_paths(value) if isinstance(value, dict) else value
        for key, value in facts.items()
        if key != "path"
    }


def _commit() -> str | None:
    """Of the checkout that runs, "-dirty" if it has changes; None for an installed package."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # else another project's checkout
        commit = git("rev-parse", "HEAD")
        return commit + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _title(record: dict) -> str:
    return f"{record['case']} {record['dtype']} {record['direction']}: {record['shape']}"


def _note(record: dict) -> str:
    """The line under a table."""
    floors = record["floors"]
    note = (
        f"floor {floors['sparse']:.2%} sparse, {floors['dense']:.2%} dense;"
        f" ours on the {record['backend']} back end;"
        f" {record['rounds']} rounds of {record['calls_per_sample']} calls"
    )
    if record["memory_target"] is not None:
        note += f"; memory target {record['memory_target'] / 1024:.0f} KiB"
    notes = [note, *(f"{name} skipped: {why}" for name, why in record["skipped"].items())]
    notes += [f"{_COARSE} {why}" for why in record["coarse"].values()]
    return "; ".join(notes)


def _label(record: dict, name: str) -> str:
    """The variant's name, marked if it is coarse."""
    return f"{name} {_COARSE}" if name in record["coarse"] else name


def _rows(record: dict) -> list[list[str]]:
    rows = []
    for name, v in record["variants"].items():
        memory = [
            f"{v[key] / 1024:.0f}" if key in v else "-" for key in ("saved_bytes", "peak_bytes")
        ]
        row = [_label(record, name), f"{v['median_ms']:.3f}", f"{v['min_ms']:.3f}"]
        if name == BASE:
            row += ["-"] * 4
        else:
            row += [f"{v['overhead']:+.1%}", f"{v['overhead_of_minima']:+.1%}"]
            row += [f"{v['tax']:.3f}", f"{v['times_floor']:.1f}"]
        rows.append([*row, *memory])
    return rows


def print_record(record: dict) -> None:
    """One case as a table on standard output, or why it is refused."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 110  # into a file or a pipe, where nothing wraps
    if "refused" in record:
        console.print(
            f"[bold red]refused[/]  {escape(_title(record))}: {escape(record['refused'])}\n"
        )
        return
    table = Table(title=escape(_title(record)), caption=escape(_note(record)), title_justify="left")
    for column in _HEADERS:
        table.add_column(column, justify="left" if column == "variant" else "right", no_wrap=True)
    for row in _rows(record):
        table.add_row(*row, style="bold" if row[0] == "ours" else "")
    console.print(table, "")


@contextlib.contextmanager
def progress_bar(steps: int) -> Iterator:
    """A bar on standard error; yields ``show(step, share, text)``."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=steps)
        yield lambda step, share, text: progress.update(
            task, completed=step + share, description=text
        )


def write_json(path: Path, report: dict) -> None:
    path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")


def write_markdown(path: Path, report: dict) -> None:
    """The tables, under the facts about the run."""
    facts = report["info"]
    machine = facts["machine"]
    lines = [
        f"# {report['method']}, {report['date'][:10]}, {machine['cpu']}",
        "",
        f"`{report['command']}` at commit {report['commit']}; {facts['threads']} threads of"
        f" {machine['cores']} cores, kernels at {facts['extension']['isa']}, torch {facts['torch']}"
        f" at {machine['torch_isa']}, Python {facts['python']}.",
        "",
        f"{EXPLANATION}.",
    ]
    for record in report["cases"]:
        lines += ["", f"## {_title(record)}", ""]
        if "refused" in record:
            lines.append(f"Refused: {record['refused']}")
            continue
        lines.append(f"| {' | '.join(_HEADERS)} |")
        lines.append("| --- |" + " ---: |" * (len(_HEADERS) - 1))
        lines += [f"| {' | '.join(row)} |" for row in _rows(record)]
        lines += ["", _note(record)]
    path.write_text("\n".join(lines) + "\n")


def write_plot(path: Path, report: dict) -> None:
    draw_plot(report).savefig(path, dpi=150, format="png")


def draw_plot(report: dict):
    """A figure of the overhead of every variant, one panel per case, with the floors as lines."""
    from matplotlib.figure import Figure

    records = [record for record in report["cases"] if "refused" not in record]
    columns = min(2, max(1, len(records)))
    lines = max(1, -(-len(records) // columns))
    figure = Figure(figsize=(7 * columns, 2.6 * lines + 1), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis, record in zip(axes, records, strict=False):
        _draw(axis, record)
    for axis in axes[len(records) :]:
        axis.remove()
    if records:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    facts = report["info"]
    figure.suptitle(
        f"{report['method']}: overhead over the frozen linear, lower is better\n"
        f"{facts['machine']['cpu']}, {facts['threads']} threads, torch {facts['torch']}",
        fontsize=10,
    )
    return figure


def _draw(axis, record: dict) -> None:
    overheads = {n: 100 * v["overhead"] for n, v in record["variants"].items() if n != BASE}
    floors = {name: 100 * floor for name, floor in record["floors"].items()}
    # The slowest may be off by an order of magnitude: cut its bar, not the others' resolution.
    slowest, *others = sorted(overheads.values(), reverse=True)
    second = max(others, default=slowest)
    limit = 1.25 * max(floors["dense"], slowest if slowest <= 3 * second else second)
    lowest = min(0.0, *overheads.values()) * 1.25
    for i, (name, percent) in enumerate(overheads.items()):
        color = _COLORS.get(name, "tab:gray")
        axis.barh(i, min(percent, limit), color=color)
        text = f" {percent:+.1f} %" + (" (cut)" if percent > limit else "")
        axis.text(max(min(percent, limit), 0), i, text, va="center", fontsize=8)
    for (name, floor), style in zip(floors.items(), ("--", "-"), strict=True):
        axis.axvline(floor, color="tab:blue", linestyle=style, linewidth=1, label=f"{name} floor")
    labels = [_label(record, name) for name in overheads]
    axis.set_yticks(range(len(overheads)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(lowest, limit * 1.2)
    axis.set_xlabel("overhead, %", fontsize=8)
    axis.set_title(_title(record), fontsize=9)
