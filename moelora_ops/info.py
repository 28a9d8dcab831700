"""What is built and what would run here: ``python -m moelora_ops.info [--json]``."""

import argparse
import json
import os
import platform
import sys
import warnings
from pathlib import Path

import torch

from . import _version, backends
from .backends import extension

ENVIRONMENT = {
    "MOELORA_BACKEND": "forces one back end",
    "MOELORA_CPU_ISA": "caps the instruction set of the CPU kernels",
    "MOELORA_SMALL_LINEAR": "0 leaves the frozen product of a few tokens to the library",
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def collect() -> dict:
    """Everything that the command prints, ready for json."""
    missing = extension.why_missing()
    return {
        "moelora_ops": _version.__version__,
        "path": str(Path(__file__).parent),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "extension": {
            "path": None if missing else sys.modules["moelora_ops._C"].__file__,
            "missing": missing,
            "isa_levels": [] if missing else torch.ops.moelora_ops.cpu_isa_levels().split(","),
            "isa": extension.isa_level(),
        },
        "backends": dict(backends.available()),
        "runs": {_short(dtype): _would_run(dtype) for dtype in DTYPES},
        "small_linear": {
            "enabled": extension.small_linear_enabled(),
            "up_to_tokens": {_short(d): extension.small_linear_tokens(d) for d in DTYPES},
        },
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
    }


def machine() -> dict:
    """CPU model, cores that this process may use, instruction set that torch itself runs at."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        cores = os.cpu_count()
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "platform": platform.platform(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    fields = dict(map(str.strip, line.split(":", 1)) for line in reversed(lines) if ":" in line)
    model = fields.get("model name") or platform.processor() or platform.machine()
    if {"cpu family", "model"} <= fields.keys():
        # Virtual machines often hide the model name but not these.
        model += f" (family {fields['cpu family']}, model {fields['model']})"
    return model


def _would_run(dtype: torch.dtype) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the plain path runs is in the answer
        try:
            return backends.choose(torch.device("cpu"), dtype)
        except (RuntimeError, ValueError) as error:
            return f"error: {error}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def format_info(info: dict) -> str:
    """The report, a fact a line."""
    box, built, small = info["machine"], info["extension"], info["small_linear"]
    limits = ", ".join(f"{dtype} up to {tokens}" for dtype, tokens in small["up_to_tokens"].items())
    rows = [
        ("moelora_ops", f"{info['moelora_ops']}  ({info['path']})"),
        ("python, torch", f"{info['python']}, {info['torch']}"),
        ("machine", f"{box['cpu']}, {box['cores']} cores, {box['platform']}"),
        ("threads", f"{info['threads']}  (torch.set_num_threads)"),
        ("torch runs at", box["torch_isa"]),
        ("extension", built["path"] or f"missing: {built['missing']}"),
        ("  compiled for", ", ".join(built["isa_levels"]) or "-"),
        ("  runs at", built["isa"]),
        ("back ends", ""),
        *((f"  {name}", why or "available") for name, why in info["backends"].items()),
        ("CPU tensors run on", ""),
        *((f"  {dtype}", name) for dtype, name in info["runs"].items()),
        ("own frozen product", f"{'on' if small['enabled'] else 'off'}: tokens in {limits}"),
        ("environment", ""),
        *(
            (f"  {name}", f"{'not set' if value is None else repr(value)}  ({ENVIRONMENT[name]})")
            for name, value in info["environment"].items()
        ),
    ]
    return "\n".join(f"{name:<22} {value}".rstrip() for name, value in rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m moelora_ops.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print json instead of text")
    arguments = parser.parse_args(argv)
    info = collect()
    print(json.dumps(info, indent=2) if arguments.json else format_info(info))
    return 0


if __name__ == "__main__":
    sys.exit(main())
