"""Writes docs/gpu_traffic.md; ``--compile`` compiles every kernel for every GPU and reports."""

import argparse
import sys
from pathlib import Path

from . import report

PAGE = Path(__file__).parents[2] / "docs" / "gpu_traffic.md"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_traffic", description=__doc__)
    parser.add_argument("--output", type=Path, default=PAGE, help="where the page goes")
    arguments = parser.parse_args(argv)
    recordings = {
        call: {name: backend.record(call) for name, backend in report.BACKENDS.items()}
        for call in report.CALLS
    }
    arguments.output.write_text(report.write(recordings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
