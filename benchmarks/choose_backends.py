"""Which GPU back end each mix runs on, from what was measured.

    python benchmarks/choose_backends.py benchmarks/results/FOLDER/results.json ...

Reads what benchmarks/on_gpu.py or ``python -m moelora_ops.bench --json`` has written, and writes
moelora_ops/backends/measured.py.  Another back end than the first of the dispatch table is chosen
for a mix where it takes less time: the geometric mean of the ratios over all cases on which both
ran, directions and CUDA graphs included.  Entries of other architectures stay in the table.
"""

import argparse
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # these sources, whatever is installed

from benchmarks import table_module  # noqa: E402
from moelora_ops import backends  # noqa: E402
from moelora_ops.backends import measured  # noqa: E402

WORTH = 0.97  # of the other one's time; less is noise
Key = tuple[str, str]  # mix, architecture


def times(path: Path) -> Iterator[tuple[Key, dict[str, float]]]:
    """Of our layer per back end, in milliseconds, for every case on which several competed.

    Raises:
        ValueError: the file has no results of a benchmark, or some that do not say what was
            measured where.
    """
    try:
        content = json.loads(path.read_text())
        for document in content["documents"].values() if "documents" in content else [content]:
            yield from _times(document)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: wanted results of a benchmark, with mix and architecture ({error!r})"
        ) from error


def _times(document: dict[str, Any]) -> Iterator[tuple[Key, dict[str, float]]]:
    device = document["device"] or {}
    for record in document["cases"]:
        taken = {
            name.removeprefix("ours-"): variant["median_ms"]
            for name, variant in record.get("variants", {}).items()
            if name.startswith("ours-")
        }
        if len(taken) > 1 and record["mix"]:
            yield (record["mix"], device["architecture"]), taken


def choose(found: list[tuple[Key, dict[str, float]]]) -> dict[Key, tuple[str, float, int]]:
    """Back end, its time over that of the first one, and in how many cases, for each mix."""
    ratios: dict[Key, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    order = [row.name for row in backends.BACKENDS]
    for key, taken in found:
        first, *others = sorted(taken, key=order.index)
        for name in others:
            ratios[key][name].append(math.log(taken[name] / taken[first]))
        ratios[key][first].append(0.0)
    chosen = {}
    for key, logs in ratios.items():
        means = {name: math.exp(statistics.fmean(values)) for name, values in logs.items()}
        best = min(means, key=means.__getitem__)
        if means[best] >= WORTH:
            best = min(means, key=order.index)
        chosen[key] = best, means[best], len(logs[best])
    return chosen


def main(argv: list[str] | None = None) -> int:
    """0: written."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS")
    parser.add_argument("--out", type=Path, metavar="FILE", default=Path(measured.__file__))
    arguments = parser.parse_args(argv)
    try:
        chosen = choose([found for path in arguments.results for found in times(path)])
    except ValueError as error:
        parser.error(str(error))
    if not chosen:
        parser.error("RESULTS: several back ends competed in none of the cases")
    table = dict(measured.TABLE)
    for key, (backend, ratio, cases) in sorted(chosen.items()):
        table.pop(key, None)
        if ratio < 1:  # not the first one
            table[key] = backend
        print(f"{' on '.join(key)}: {backend}, {ratio:.2f} of the first one's time, {cases} cases")
    sources = ", ".join(path.parent.name + "/" + path.name for path in arguments.results)
    table_module.write(
        arguments.out, "Back ends that were measured to be the fastest.",
        "(mix, architecture) -> back end.", "dict[tuple[str, str], str]", table,
        f"``benchmarks/choose_backends.py`` writes this; last from {sources}.",
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
