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
from . import devices
from .runner import BASE, TOUCH, Settings

EXPLANATION = (
    "overhead = layer / frozen base - 1: median of the ratios inside each round, and of the"
    " fastest calls; tax = layer / base; x floor = overhead over the least arithmetic (on a GPU:"
    " over copying what an adapter reads and writes); saved = what autograd keeps for backward"
    " beyond x and the parameters, by saved_tensors_hooks, distinct storages; peak = most tensor"
    " memory in use during a step, beyond what was before; host = what the host needs to queue a"
    " call; touch = the frozen base, then x read and y rewritten (backward dy and dx) and no"
    " adapter: what moving the memory alone costs; 16bit = router logits rounded to x's dtype; † ="
    " a baseline that keeps to its error budget in fp32 but not in this dtype"
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


def header(name: str, settings: Settings, command: list[str]) -> dict:
    """The facts about a run of what is called `name`: when, where, and how to repeat it."""
    return {
        "method": name,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *command]),
        "commit": _commit(),
        "settings": settings._asdict(),
        "device": devices.device(settings.device).facts(),
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
    graphs = " in CUDA graphs" if record["graphs"] else ""
    return f"{record['case']} {record['dtype']} {record['direction']}{graphs}: {record['shape']}"


def _note(record: dict) -> str:
    """The line under a table."""
    floors = ", ".join(f"{floor:.2%} {name}" for name, floor in record["floors"].items())
    notes = [f"floor {floors}"] if floors else []
    notes.append(f"ours on the {record['backend']} back end")
    notes.append(f"{record['rounds']} rounds of {record['calls_per_sample']} calls")
    if record["memory_target"] is not None:
        notes.append(f"memory target {record['memory_target'] / 1024:.0f} KiB")
    notes += [f"{name} skipped: {why}" for name, why in record["skipped"].items()]
    notes += [f"{_COARSE} {why}" for why in record["coarse"].values()]
    return "; ".join(notes)


def _is_ours(name: str) -> bool:
    return name.partition("-")[0] == "ours"


def _label(record: dict, name: str) -> str:
    """The variant's name, marked if it is coarse."""
    return f"{name} {_COARSE}" if name in record["coarse"] else name


def _headers(record: dict) -> tuple[str, ...]:
    return (*_HEADERS, "host ms") if "host_ms" in record["variants"][BASE] else _HEADERS


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
            row += [f"{v['tax']:.3f}", f"{v['times_floor']:.1f}" if record["floors"] else "-"]
        host = [f"{v['host_ms']:.3f}"] if "host_ms" in v else []
        rows.append([*row, *memory, *host])
    return rows


def print_record(record: dict) -> None:
    """One case as a table on standard output, or why it is refused."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120  # into a file or a pipe, where nothing wraps
    if "refused" in record:
        console.print(
            f"[bold red]refused[/]  {escape(_title(record))}: {escape(record['refused'])}\n"
        )
        return
    table = Table(title=escape(_title(record)), caption=escape(_note(record)), title_justify="left")
    for column in _headers(record):
        table.add_column(column, justify="left" if column == "variant" else "right", no_wrap=True)
    for row in _rows(record):
        table.add_row(*row, style="bold" if _is_ours(row[0]) else "")
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


def markdown(report: dict) -> str:
    """The tables, under the facts about the run."""
    lines = [
        f"# {report['method']}, {report['date'][:10]}, {_machine_name(report)}",
        "",
        f"`{report['command']}` at commit {report['commit']}; {_machine(report)}.",
        "",
        f"{EXPLANATION}.",
    ]
    for record in report["cases"]:
        lines += ["", f"## {_title(record)}", ""]
        if "refused" in record:
            lines.append(f"Refused: {record['refused']}")
            continue
        headers = _headers(record)
        lines.append(f"| {' | '.join(headers)} |")
        lines.append("| --- |" + " ---: |" * (len(headers) - 1))
        lines += [f"| {' | '.join(row)} |" for row in _rows(record)]
        lines += ["", _note(record)]
    return "\n".join(lines) + "\n"


def write_markdown(path: Path, report: dict) -> None:
    path.write_text(markdown(report))


def _machine_name(report: dict) -> str:
    return (report["device"] or {}).get("name") or report["info"]["machine"]["cpu"]


def _machine(report: dict) -> str:
    """What it ran on, in a line."""
    facts, device = report["info"], report["device"]
    versions = f"torch {facts['torch']}"
    if device is None:
        machine = facts["machine"]
        return (
            f"{facts['threads']} threads of {machine['cores']} cores, kernels at"
            f" {facts['extension']['isa']}, {versions} at {machine['torch_isa']}, Python"
            f" {facts['python']}"
        )
    clocks = ", ".join(f"{name} {value}" for name, value in device["clocks"].items())
    return (
        f"driver {device['driver']}, CUDA {device['cuda']}, {versions}, triton {device['triton']},"
        f" Python {facts['python']}; a copy moves"
        f" {device['copy_bytes_per_second'] / 1e12:.2f} TB/s; at the start {clocks or 'no clocks'}"
    )


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
    threads = "" if report["device"] else f"{facts['threads']} threads, "
    figure.suptitle(
        f"{report['method']}: overhead over the frozen linear, lower is better\n"
        f"{_machine_name(report)}, {threads}torch {facts['torch']}",
        fontsize=10,
    )
    return figure


def draw_sweep(reports: list[dict]):
    """A figure of the tax over the number of tokens, one panel per method and shape.

    Shapes that were measured for one number of tokens are left out.
    """
    from matplotlib.figure import Figure

    panels: dict[str, dict[str, dict[int, float]]] = {}
    for report in reports:
        for record in report["cases"]:
            if "refused" in record or "tokens" not in record:
                continue
            tokens = record["tokens"]
            title = f"{report['method']} {record['case'].replace(f'-t{tokens}', '')}"
            lines = panels.setdefault(title, {})
            for name, variant in record["variants"].items():
                if name != BASE:
                    lines.setdefault(name, {})[tokens] = variant["tax"]
    panels = {t: lines for t, lines in panels.items() if max(map(len, lines.values())) > 1}
    rows = max(1, -(-len(panels) // 2))
    figure = Figure(figsize=(14, 3.2 * rows + 0.6), layout="constrained")
    axes = list(figure.subplots(rows, 2, squeeze=False).flat)
    for axis, (title, lines) in zip(axes, panels.items(), strict=False):
        for name, points in lines.items():
            axis.plot(
                *zip(*sorted(points.items()), strict=True), label=name, marker="o", markersize=3,
                linewidth=2 if _is_ours(name) else 1,
            )  # fmt: skip
        axis.axhline(1, color="black", linewidth=0.5)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("tokens", fontsize=8)
        axis.legend(fontsize=7)
    for axis in axes[len(panels) :]:
        axis.remove()
    if reports:
        torch = reports[0]["info"]["torch"]
        title = (
            f"layer / frozen linear, lower is better\n{_machine_name(reports[0])}, torch {torch}"
        )
        figure.suptitle(title, fontsize=10)
    return figure


def _draw(axis, record: dict) -> None:
    overheads = {n: 100 * v["overhead"] for n, v in record["variants"].items() if n != BASE}
    floors = {name: 100 * floor for name, floor in record["floors"].items()}
    # The slowest may be off by an order of magnitude: cut its bar, not the others' resolution.
    slowest, *others = sorted(overheads.values(), reverse=True)
    second = max(others, default=slowest)
    limit = 1.25 * max([*floors.values(), slowest if slowest <= 3 * second else second])
    lowest = min(0.0, *overheads.values()) * 1.25
    for i, (name, percent) in enumerate(overheads.items()):
        color = _COLORS.get("ours" if _is_ours(name) else name, "tab:gray")
        axis.barh(i, min(percent, limit), color=color)
        text = f" {percent:+.1f} %" + (" (cut)" if percent > limit else "")
        axis.text(max(min(percent, limit), 0), i, text, va="center", fontsize=8)
    for (name, floor), style in zip(floors.items(), ("--", "-"), strict=False):
        axis.axvline(floor, color="tab:blue", linestyle=style, linewidth=1, label=f"{name} floor")
    labels = [_label(record, name) for name in overheads]
    axis.set_yticks(range(len(overheads)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(lowest, limit * 1.2)
    axis.set_xlabel("overhead, %", fontsize=8)
    axis.set_title(_title(record), fontsize=9)
