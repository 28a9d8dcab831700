"""Microbenchmarks: our layers against plain PyTorch, numerics checked, in interleaved rounds."""

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import torch

from .. import backends
from . import METHODS, devices, report
from .method import DTYPES, Method
from .numerics import DX, FORWARD, TRAIN
from .runner import Settings, run_case

_DIRECTIONS = {
    FORWARD: (FORWARD,),
    DX: (DX,),
    TRAIN: (TRAIN,),
    "both": (FORWARD, TRAIN),
    "all": (FORWARD, DX, TRAIN),
}
_QUICK = {"rounds": 3, "seconds": 1.0, "compile": False}


def _shape_options(method: Method) -> list[str]:
    return [field.name for field in fields(method.case_type) if field.type is int]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m moelora_ops.bench", description=__doc__)
    methods = parser.add_subparsers(dest="method", required=True, metavar="method")
    for method in METHODS.values():
        sub = methods.add_parser(method.name, help=method.title, description=method.title)
        sub.add_argument("--list", action="store_true", help="print the named cases and stop")
        cases = sub.add_argument_group("cases (default: all that are named)")
        names = list(dict.fromkeys(case.name for case in (*method.cases, *method.gpu_cases)))
        cases.add_argument("--case", nargs="+", choices=names, help="named cases")
        cases.add_argument("--dtype", nargs="+", choices=list(DTYPES))
        cases.add_argument(
            "--direction", choices=list(_DIRECTIONS), help="default: what the case lists"
        )
        for name in _shape_options(method):
            cases.add_argument(
                f"--{name.replace('_', '-')}", type=int, metavar="N", help="instead of the case's"
            )
        run = sub.add_argument_group("run")
        variants = [variant.name for variant in method.variants]
        run.add_argument("--variants", nargs="+", choices=variants, help="default: all")
        run.add_argument("--rounds", type=int, help=f"most rounds (default {Settings().rounds})")
        run.add_argument(
            "--seconds", type=float, help=f"of measuring a case (default {Settings().seconds:g})"
        )
        run.add_argument("--no-compile", action="store_true", help="skip the compiled variants")
        run.add_argument("--threads", type=int, default=torch.get_num_threads())
        run.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        run.add_argument(
            "--backend",
            nargs="+",
            choices=[name for name, _ in backends.available()],
            help="of ours; with several, ours competes on each",
        )
        run.add_argument("--graphs", action="store_true", help="replay every call as a CUDA graph")
        run.add_argument("--seed", type=int, default=0)
        run.add_argument(
            "--quick", action="store_true", help="few rounds, no compiling: does it run at all?"
        )
        output = sub.add_argument_group("output")
        output.add_argument("--json", type=Path, metavar="FILE")
        output.add_argument("--markdown", type=Path, metavar="FILE")
        output.add_argument("--plot", type=Path, metavar="FILE", help="a PNG file")
    return parser


def _select(method: Method, arguments: argparse.Namespace) -> list:
    """The cases that the options ask for.

    Raises:
        ValueError: an option is out of range, or a case is none of the device's.
    """
    shape = {name: getattr(arguments, name) for name in _shape_options(method)}
    shape = {name: value for name, value in shape.items() if value is not None}
    cases = method.cases if arguments.device == "cpu" else method.gpu_cases
    if arguments.case or shape:
        names = arguments.case or [cases[0].name]  # a shape alone changes the first case
        if unknown := set(names) - {case.name for case in cases}:
            raise ValueError(f"--case: not for {arguments.device}: {', '.join(sorted(unknown))}")
        cases = [case for name in names for case in cases if case.name == name]
    if arguments.dtype:
        cases = [replace(case, dtype=dtype) for case in cases for dtype in arguments.dtype]
    if arguments.direction:
        cases = [replace(case, directions=_DIRECTIONS[arguments.direction]) for case in cases]
    if shape:
        cases = [replace(case, name="custom", **shape) for case in cases]
    return list(dict.fromkeys(cases))


def _settings(arguments: argparse.Namespace) -> Settings:
    """Raises ValueError if an option is out of range."""
    for name in ("rounds", "seconds", "threads"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name}: wanted more than 0, got {value}")
    if arguments.graphs and arguments.device != "cuda":
        raise ValueError(f"--graphs: wanted --device cuda, got {arguments.device}")
    chosen = {"rounds": arguments.rounds, "seconds": arguments.seconds}
    if arguments.no_compile:
        chosen["compile"] = False
    defaults = _QUICK if arguments.quick else {}
    return Settings(
        seed=arguments.seed,
        variants=tuple(arguments.variants) if arguments.variants else None,
        device=arguments.device,
        backends=tuple(arguments.backend) if len(arguments.backend or ()) > 1 else (),
        graphs=arguments.graphs,
        **defaults | {name: value for name, value in chosen.items() if value is not None},
    )


def _check(arguments: argparse.Namespace, cases: list, outputs: list[Path]) -> None:
    """Raises ValueError or RuntimeError if these cases cannot run here, or not be written."""
    for path in outputs:
        if not path.resolve().parent.is_dir():
            raise ValueError(f"{path}: its folder does not exist")
    report.require("rich", *(["matplotlib"] if arguments.plot else []))
    devices.device(arguments.device)
    for name, dtype in itertools.product(arguments.backend or [None], {c.dtype for c in cases}):
        with backends.use_backend(name):
            backends.choose(torch.device(arguments.device), DTYPES[dtype])


def _measure(method: Method, cases: list, settings: Settings) -> Iterator[dict]:
    """The records of all cases, each printed as it is done."""
    todo = [(case, direction) for case in cases for direction in case.directions]
    with report.progress_bar(len(todo)) as show:
        for step, (case, direction) in enumerate(todo):
            text = f"{case.name} {case.dtype} {direction}"
            show(step, 0, f"{text}: checking")
            record = run_case(
                method,
                case,
                direction,
                settings,
                lambda share, step=step, text=text: show(step, share, text),
            )
            report.print_record(record)
            yield record


def main(argv: list[str] | None = None) -> int:
    """0: measured; 1: a case was refused for its numerics; 2: it could not run."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    arguments = parser.parse_args(argv)
    method = METHODS[arguments.method]
    outputs = [
        (path, write)
        for path, write in (
            (arguments.json, report.write_json),
            (arguments.markdown, report.write_markdown),
            (arguments.plot, report.write_plot),
        )
        if path is not None
    ]
    several = len(arguments.backend or ()) > 1
    with backends.use_backend(None if several else (arguments.backend or [None])[0]):
        # All that can be known to fail fails now, not after minutes of measuring.
        try:
            cases, settings = _select(method, arguments), _settings(arguments)
            if not arguments.list:
                _check(arguments, cases, [path for path, _ in outputs])
        except (ValueError, RuntimeError) as error:
            parser.error(str(error))
        if arguments.list:
            for case in cases:
                print(f"{case.name:<8} {case.dtype}  {case}  {', '.join(case.directions)}")
            return 0

        threads = torch.get_num_threads()
        torch.set_num_threads(arguments.threads)
        try:
            command = ["-m", "moelora_ops.bench", *argv]
            document = report.header(method.name, settings, command) | {"cases": []}
            for record in _measure(method, cases, settings):
                document["cases"].append(record)
                if arguments.json:  # what is done is kept, whatever happens to the rest
                    report.write_json(arguments.json, document)
        finally:
            torch.set_num_threads(threads)
    print(report.EXPLANATION)
    for path, write in outputs:
        write(path, document)
        print(f"wrote {path}")
    return 1 if any("refused" in record for record in document["cases"]) else 0


if __name__ == "__main__":
    sys.exit(main())
