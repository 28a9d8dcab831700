"""What is built and what would run here: ``python -m moelora_ops.info [--json | --tiles]``."""

import argparse
import json
import os
import platform
import sys
import warnings
from pathlib import Path

import torch

from . import _version, backends
from .backends import extension, strategy, triton
from .backends.triton import tiles

ENVIRONMENT = {
    "MOELORA_BACKEND": "forces one back end",
    "MOELORA_CPU_ISA": "caps the instruction set of the CPU kernels",
    "MOELORA_LINEAR": "library, own or auto: whose product a frozen linear of the CPU is",
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Typical mixtures, and numbers of tokens: decoding, a short prompt, training.
MIXTURES = ({"num_experts": 8, "rank": 8, "top_k": 2}, {"num_experts": 64, "rank": 16, "top_k": 2})
TOKENS = (1, 32, 512, 8192)


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
        "measured": [[*key, name] for key, name in sorted(backends.measured.TABLE.items())],
        "triton": {
            "version": triton.version() or None,
            "missing": dict(backends.available())["triton"],
            "archs": [arch.name for arch in tiles.ARCHS],
        },
        "paths": {row.name: _paths(row.name) for row in backends.BACKENDS if _has_kernels(row)},
        "runs": {_short(dtype): _would_run(dtype) for dtype in DTYPES},
        "linear": {
            "choice": extension.linear_choice(),
            "up_to_tokens": {_short(d): extension.own_linear_tokens(d) for d in DTYPES},
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


def _has_kernels(row: backends.Backend) -> bool:
    """Whether a back end has kernels of its own here, be there a device for them or not."""
    return row.name in strategy.PATHS and not row.missing()


def _paths(backend: str) -> dict:
    """The paths of top-k that a back end has, and what it takes by itself, in bfloat16."""
    return {
        "has": list(strategy.PATHS[backend]),
        "takes": [
            {**mixture, "tokens": tokens,
             "path": strategy.choose(backend, **mixture, tokens=tokens, dtype=torch.bfloat16)}
            for mixture in MIXTURES
            for tokens in TOKENS
        ],
    }  # fmt: skip


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def format_info(info: dict) -> str:
    """The report, a fact a line."""
    box, built, linear = info["machine"], info["extension"], info["linear"]
    gpu = info["triton"]
    fastest = ", ".join(f"{mix} on {arch}: {name}" for mix, arch, name in info["measured"])
    limits = ", ".join(f"{dtype} {_tokens(n)}" for dtype, n in linear["up_to_tokens"].items())
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
        ("  measured fastest", fastest or "none: the first that is available"),
        ("triton", gpu["version"] or "-"),
        ("  runs here", f"no: {gpu['missing']}" if gpu["missing"] else "yes"),
        ("  compiled in tests for", ", ".join(gpu["archs"])),
        ("top-k paths, bfloat16", ""),
        *(
            (f"  {name} {mixture}", taken)
            for name, paths in info["paths"].items()
            for mixture, taken in _taken(paths["takes"])
        ),
        ("CPU tensors run on", ""),
        *((f"  {dtype}", name) for dtype, name in info["runs"].items()),
        ("own frozen product", f"{linear['choice']}: tokens in {limits}"),
        ("environment", ""),
        *(
            (f"  {name}", f"{'not set' if value is None else repr(value)}  ({ENVIRONMENT[name]})")
            for name, value in info["environment"].items()
        ),
    ]
    return "\n".join(f"{name:<22} {value}".rstrip() for name, value in rows)


def _tokens(most: int) -> str:
    return {0: "none", extension.ANY_NUMBER: "any number"}.get(most, f"up to {most}")


def _taken(takes: list[dict]) -> list[tuple[str, str]]:
    """What is taken for each mixture, in a line."""
    mixtures: dict[str, dict[str, list[str]]] = {}
    for t in takes:
        paths = mixtures.setdefault(f"E={t['num_experts']} r={t['rank']} k={t['top_k']}", {})
        paths.setdefault(t["path"], []).append(str(t["tokens"]))
    return [
        (mixture, "; ".join(f"{path} for T = {', '.join(T)}" for path, T in paths.items()))
        for mixture, paths in mixtures.items()
    ]


def format_tiles(features: int = 4096, num_experts: int = 8, rank: int = 8) -> str:
    """The tiles of the Triton products for typical sizes, a kernel a line."""
    lines = [f"K = N = {features}, E = {num_experts}, r = {rank}"]
    R = num_experts * rank
    for arch in tiles.ARCHS:
        for dtype in (torch.bfloat16, torch.float32):
            for tokens in TOKENS:
                rest = (dtype.itemsize, arch)
                chosen = {
                    "shrink": tiles.shrink(tokens, features, R, num_experts, *rest),
                    "expand": tiles.expand(tokens, features, R, *rest),
                    "outer": tiles.outer(tokens, 2 * features, R, *rest),
                }
                for name, tile in chosen.items():
                    fields = " ".join(f"{n}={v}" for n, v in tile._asdict().items())
                    lines.append(
                        f"{arch.name:<7} {_short(dtype):<9} T={tokens:<6} {name}  {fields}"
                    )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m moelora_ops.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print json instead of text")
    parser.add_argument("--tiles", action="store_true", help="print the tiles of the GPU kernels")
    arguments = parser.parse_args(argv)
    if arguments.tiles:
        print(format_tiles())
        return 0
    info = collect()
    print(json.dumps(info, indent=2) if arguments.json else format_info(info))
    return 0


if __name__ == "__main__":
    sys.exit(main())
