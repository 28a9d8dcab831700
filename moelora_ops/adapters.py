"""Adapters on disk: safetensors for the values, json for what they are and which model they fit.

    directory/adapter.json                       the commit point: names the weights file, its size
    and hash directory/adapter-<first 16 of sha256>.safetensors

Both are written beside their final name, synchronised and renamed, the json last.  Whenever a save
is interrupted, the directory holds either the old adapter or the new one, whole.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._version import __version__
from .models import METHODS, adapted_layers, check_dtype, install, is_linear

FORMAT = "moelora_ops.adapter"
FORMAT_VERSION = 1
INDEX_NAME = "adapter.json"
_WEIGHTS_NAME = re.compile(r"adapter-[0-9a-f]{16}\.safetensors")
_TEMPORARY_NAME = re.compile(r"\.adapter.*\.tmp")
# May differ between a file and the adapters that are already in a model: they do not change what it
# computes.
_TRAINING_ONLY = {"dropout", "dropout_mode"}
_SHOWN_DIFFERENCES = 5


def save_adapter(model: nn.Module, dir: str | os.PathLike) -> None:
    """Write the adapters of `model` (experts, routers, their settings, no bases) into `dir`.

    An adapter that `dir` already holds is replaced in one step and survives any failure before it.
    Fused and reference layers write the same files.  One process at a time may save into a
    directory.

    Args:
        model: adapted by :func:`moelora_ops.apply`, or holding such layers.
        dir: is created if needed.

    Raises:
        ValueError: `model` has no adapters, or their parameters are on the meta device.
        ImportError: safetensors is not installed.
    """
    safetensors = _safetensors()
    modules: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    for name, layer, method in _layers(model):
        modules[name] = {
            "method": method,
            "arguments": {field: getattr(layer, field) for field in METHODS[method].arguments},
            "tensors": _shapes(layer),
        }
        for key, parameter in layer.named_parameters(recurse=False):
            if parameter.is_meta:
                raise ValueError(
                    f"model: {name}.{key} is on the meta device and has no values to save"
                )
            # A copy, as safetensors refuses tensors that share memory (tied parameters).
            tensors[f"{name}.{key}"] = parameter.detach().to("cpu", copy=True).contiguous()
    if not modules:
        raise ValueError("model: has no adapters to save")

    weights = safetensors.save(tensors, {"format": "pt"})
    digest = hashlib.sha256(weights).hexdigest()
    weights_name = f"adapter-{digest[:16]}.safetensors"
    index = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "package_version": __version__,
        "weights": {"file": weights_name, "bytes": len(weights), "sha256": digest},
        "modules": modules,
    }
    directory = Path(dir)
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory / weights_name, weights)
    _write(directory / INDEX_NAME, json.dumps(index, indent=1, allow_nan=False).encode())
    for path in directory.iterdir():
        stale = _WEIGHTS_NAME.fullmatch(path.name) and path.name != weights_name
        if stale or _TEMPORARY_NAME.fullmatch(path.name):
            path.unlink()


def load_adapter(
    model: nn.Module,
    dir: str | os.PathLike,
    *,
    implementation: str = "fused",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Read the adapter in `dir` into `model`, in place.

    A model without adapters gets them as by :func:`moelora_ops.apply`: its linears are wrapped and
    everything else is frozen.  In a model that has adapters they must be those of the file, fused
    or reference; their values are overwritten.  Everything is checked first; a call that raises
    leaves the model as it was.

    Values are cast to the dtype of the parameter they go into, which for new adapters is `dtype`,
    by default each base layer's, and not the file's: layers compute in one dtype.  Equal dtypes
    give the saved bits.

    Args:
        model: the model that the adapter was saved from, or one with linears of the same names and
            shapes.
        dir: what :func:`save_adapter` wrote.
        implementation: ``"fused"`` or ``"reference"``, for a model without adapters.
        dtype: of new parameters, see above.

    Returns:
        `model`.

    Raises:
        FileNotFoundError: `dir`, or a file in it, is missing.
        ValueError: a file is truncated, corrupted or of another format version, or the adapter does
            not fit.
        ImportError: safetensors is not installed.
    """
    safetensors = _safetensors()
    check_dtype("dtype", dtype)
    directory = Path(dir)
    modules, weights = _read(directory)
    tensors = safetensors.load(weights)
    wanted = {
        f"{name}.{key}": shape for name, m in modules.items() for key, shape in m["tensors"].items()
    }
    _fail_on(
        _differences(wanted, {key: list(t.shape) for key, t in tensors.items()}),
        f"{directory / INDEX_NAME}: does not describe its weights file",
    )

    @torch.no_grad()
    def fill(name: str, layer: nn.Module) -> None:
        for key, parameter in layer.named_parameters(recurse=False):
            parameter.copy_(tensors[f"{name}.{key}"])

    mismatch = f"model: the adapter in {directory} is of another model"
    present = list(_layers(model))
    if present:
        theirs = {
            name: _fingerprint(m["method"], m["arguments"], m["tensors"])
            for name, m in modules.items()
        }
        ours = {
            name: _fingerprint(
                method, {a: getattr(layer, a) for a in METHODS[method].arguments}, _shapes(layer)
            )
            for name, layer, method in present
        }
        _fail_on(_differences(theirs, ours), mismatch)
        for name, layer, _ in present:
            _check_materialized(name, layer)
        for name, layer, _ in present:
            fill(name, layer)
        return model

    bases = {
        _plain(name): (name, m)
        for name, m in model.named_modules(remove_duplicate=False)
        if is_linear(m)
    }
    theirs = {name: m["tensors"] for name, m in modules.items()}
    ours = {}
    for name, m in modules.items():
        if name in bases:
            base = bases[name][1]
            method, arguments = METHODS[m["method"]], m["arguments"]
            _check_materialized(name, base)
            with torch.device("meta"):
                twin = nn.Linear(base.in_features, base.out_features)
                ours[name] = _shapes(method.reference(twin, **arguments))
    _fail_on(_differences(theirs, ours), mismatch)
    layers = {bases[name][0]: (METHODS[m["method"]], m["arguments"]) for name, m in modules.items()}
    return install(
        model, layers, implementation, dtype, lambda name, layer: fill(_plain(name), layer)
    )


def _read(directory: Path) -> tuple[dict[str, dict[str, Any]], bytes]:
    """The validated ``modules`` of the index and the bytes of the weights file."""
    if not directory.is_dir():
        raise FileNotFoundError(
            f"dir: wanted a directory with an adapter, got {directory}, which is none"
        )
    path = directory / INDEX_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"dir: wanted a directory with an adapter, but {directory} has no {INDEX_NAME}"
        )
    try:
        index = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{path}: is no json ({error}); the file is truncated or corrupted"
        ) from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"{path}: is no index of an adapter; wanted format {FORMAT!r}")
    if index.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: wanted format version {FORMAT_VERSION}, got {index.get('format_version')!r}, "
            f"written by moelora_ops {index.get('package_version')}; this is {__version__}"
        )
    modules = _entry(index, "modules", dict, path)
    if not modules:
        raise ValueError(f"{path}: modules is empty")
    for name in modules:
        _check_module(name, _entry(modules, name, dict, path), path)

    weights = _entry(index, "weights", dict, path)
    name = _entry(weights, "file", str, path)
    if not _WEIGHTS_NAME.fullmatch(name):
        raise ValueError(f"{path}: wanted a weights file of this directory, got {name!r}")
    weights_path = directory / name
    if not weights_path.is_file():
        raise FileNotFoundError(f"{weights_path}: the weights file that {path} names is missing")
    data = weights_path.read_bytes()
    size = _entry(weights, "bytes", int, path)
    if len(data) != size:
        raise ValueError(
            f"{weights_path}: wanted {size} bytes, got {len(data)}; it is truncated or foreign"
        )
    if hashlib.sha256(data).hexdigest() != _entry(weights, "sha256", str, path):
        raise ValueError(
            f"{weights_path}: the content does not match its sha256; the file is corrupted"
        )
    return modules, data


def _check_module(name: str, module: dict[str, Any], path: Path) -> None:
    """One entry of ``modules``: a known method, exactly its arguments, in range, and shapes."""
    method = METHODS.get(_entry(module, "method", str, path))
    if method is None:
        raise ValueError(
            f"{path}: {name}: wanted a method of {sorted(METHODS)}, got {module['method']!r}"
        )
    arguments = _entry(module, "arguments", dict, path)
    _fail_on(
        [f"{field} is missing" for field in method.arguments if field not in arguments]
        + [f"{field} is unknown" for field in arguments if field not in method.arguments],
        f"{path}: arguments of {name}",
    )
    try:
        method.config(**arguments).layer_arguments(name, None)  # one layer's, of no depth
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: arguments of {name}: {error}") from error
    for key in _entry(module, "tensors", dict, path):
        _entry(module["tensors"], key, list, path)


def _entry(mapping: dict[str, Any], key: str, kind: type, path: Path) -> Any:
    value = mapping.get(key)
    if not isinstance(value, kind):
        raise ValueError(f"{path}: wanted {key} to be of type {kind.__name__}, got {value!r:.60}")
    return value


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    for layer in adapted_layers(model):
        yield _plain(layer.name), layer.module, layer.method


def _plain(name: str) -> str:
    """A qualified name as it is without torch.compile, which wraps modules."""
    return name.replace("_orig_mod.", "")


def _shapes(layer: nn.Module) -> dict[str, list[int]]:
    return {key: list(parameter.shape) for key, parameter in layer.named_parameters(recurse=False)}


def _fingerprint(
    method: str, arguments: dict[str, Any], shapes: dict[str, list[int]]
) -> dict[str, Any]:
    same = {key: value for key, value in arguments.items() if key not in _TRAINING_ONLY}
    return {"method": method, **same, **shapes}


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """What keeps two descriptions apart, one line per name."""
    lines = []
    for name in sorted(theirs.keys() | ours.keys()):
        if name not in ours:
            lines.append(f"{name} is missing")
        elif name not in theirs:
            lines.append(f"{name} is not in the file")
        elif theirs[name] != ours[name]:
            theirs_here, ours_here = theirs[name], ours[name]
            if isinstance(theirs_here, dict):
                keys = [
                    k
                    for k in theirs_here.keys() | ours_here.keys()
                    if theirs_here.get(k) != ours_here.get(k)
                ]
                theirs_here = {k: theirs_here.get(k) for k in sorted(keys)}
                ours_here = {k: ours_here.get(k) for k in sorted(keys)}
            lines.append(f"{name}: wanted {theirs_here}, got {ours_here}")
    return lines


def _fail_on(differences: list[str], what: str) -> None:
    if differences:
        shown, more = differences[:_SHOWN_DIFFERENCES], len(differences) - _SHOWN_DIFFERENCES
        raise ValueError(f"{what}: {'; '.join(shown)}" + (f"; and {more} more" if more > 0 else ""))


def _check_materialized(name: str, module: nn.Module) -> None:
    if any(parameter.is_meta for parameter in module.parameters()):
        raise ValueError(
            f"model: {name} is on the meta device; give it storage before loading an adapter"
        )


def _write(path: Path, data: bytes) -> None:
    """Make `path` all of `data` or leave it as it was, even through a power failure."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)  # the new name is safe only once its directory is
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _safetensors():
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "save_adapter and load_adapter need safetensors: pip install 'moelora-ops[adapters]'"
        ) from error
    return safetensors.torch
