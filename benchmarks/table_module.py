"""Modules of the package that hold a table of measurements and nothing else."""

from collections.abc import Mapping
from pathlib import Path

import torch


def write(path: Path, title: str, comment: str, type_: str, table: Mapping, source: str) -> None:
    """A module with `table` as TABLE, in one step.

    Args:
        title: a line on what is in it.
        comment: a line on keys and values.
        type_: annotation of TABLE.
        source: who writes this, and from what.
    """
    entries = [f"    {key!r}: {value!r},".replace("'", '"') for key, value in sorted(table.items())]
    lines = [
        f'"""{title}',
        "",
        source,
        "",
        f"Last with torch {torch.__version__}.",
        '"""',
        "",
        f"# {comment}",
        f"TABLE: {type_} = {{",
        *entries,
        "}",
    ]
    new = path.with_suffix(".new")
    new.write_text("\n".join(lines) + "\n")
    new.replace(path)
