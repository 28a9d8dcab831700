"""Adapters on disk: safetensors for the values, json for what they are and which model they fit.

    directory/adapter.json      the commit point: names the weights file, its size and hash
    directory/adapter-<first 16 of sha256>.safetensors

Both are written beside their final name, synchronised and renamed, the json last.  Whenever a save
is interrupted, the directory holds either the old adapter or the new one, whole.
"""

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import sharded
from ._version import __version__
from .companions import COMPANIONS, Companion, check_model, companions_of, plain_name, root_of
from .configs.base import check_dtype, is_linear
from .models import METHODS, Method, adapted_layers, adapter_tensors, install

FORMAT = "moelora_ops.adapter"
FORMAT_VERSION = 2  # 1 had no companions
INDEX_NAME = "adapter.json"
_WEIGHTS_NAME = re.compile(r"adapter-[0-9a-f]{16}\.safetensors")
_TEMPORARY_NAME = re.compile(r"\.adapter.*\.tmp")
_SHOWN_DIFFERENCES = 5


class _Part(NamedTuple):
    """A layer or a companion of a model, as a file has it."""

    module: nn.Module
    entry: dict[str, Any]  # method, kind (companions only), arguments, shapes of the tensors


def save_adapter(model: nn.Module, dir: str | os.PathLike) -> None:
    """Write the adapters of `model` into `dir`: layers without their bases, and companions.

    An adapter that `dir` already holds is replaced in one step and survives any failure before it.
    Fused and reference layers write the same files.  One process at a time may save into a
    directory: under DistributedDataParallel, one calls.  If parameters are sharded (``fully_shard``
    or other ``DTensor``), every process that has parts calls, since they are gathered, and the
    first one writes.

    Args:
        model: adapted by :func:`moelora_ops.apply`, or holding such layers.
        dir: is created if needed.

    Raises:
        ValueError: `model` has no adapters, or their tensors are on the meta device, or it is under
            FullyShardedDataParallel.
        ImportError: safetensors is not installed.
    """
    check_model(model)
    safetensors = _safetensors()
    model = root_of(model)
    sharded.check_not_flat(model)
    layers, companions = _layers(model), _companions(model)
    if not layers:
        raise ValueError("model: has no adapters to save")
    tensors: dict[str, Tensor] = {}
    writes = True
    for name, part in _qualified(layers, companions).items():
        for key, tensor in _tensors(part.module).items():
            if tensor.is_meta:
                raise ValueError(
                    f"model: {name}.{key} is on the meta device and has no values to save"
                )
            # A copy, as safetensors refuses tensors that share memory (tied parameters).
            whole = sharded.gathered(tensor.detach()).to("cpu", copy=True).contiguous()
            writes &= sharded.is_first(tensor)
            if writes:
                tensors[f"{name}.{key}"] = whole
    if not writes:
        return

    weights = safetensors.save(tensors, {"format": "pt"})
    digest = hashlib.sha256(weights).hexdigest()
    weights_name = f"adapter-{digest[:16]}.safetensors"
    index = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "package_version": __version__,
        "weights": {"file": weights_name, "bytes": len(weights), "sha256": digest},
        "modules": {name: part.entry for name, part in layers.items()},
        "companions": {name: part.entry for name, part in companions.items()},
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

    A model without adapters gets them as by :func:`moelora_ops.apply`: its linears are wrapped,
    companions are added and everything else is frozen.  In a model that has adapters they must be
    those of the file, fused or reference; their values are overwritten.  Everything is checked
    first; a call that raises leaves the model as it was.

    Values are cast to the dtype of the tensor they go into, which for new adapters is `dtype`, by
    default each base layer's, and not the file's: layers compute in one dtype.  Equal dtypes give
    the saved bits.

    In training by several processes each reads the file; parameters that are sharded take their
    part.  A model without adapters gets them before it is wrapped or sharded.

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
            not fit, or `model` is wrapped or sharded and has no adapters yet.
        ImportError: safetensors is not installed.
    """
    check_model(model)
    check_dtype("dtype", dtype)
    given, model = model, root_of(model)
    sharded.check_not_flat(model)
    directory = Path(dir)
    modules, companions, tensors = read_adapter(directory)
    entries = _qualified(modules, companions)
    mismatch = f"model: the adapter in {directory} is of another model"

    def check_kinds(name: str, module: nn.Module) -> None:
        """Floating values go into any floating dtype, others (masks, indices) into their own."""
        for key, tensor in _tensors(module).items():
            value = tensors[f"{name}.{key}"]
            if value.dtype != tensor.dtype and not (
                value.is_floating_point() and tensor.is_floating_point()
            ):
                raise ValueError(
                    f"{mismatch}: {name}.{key}: wanted dtype {value.dtype}, got {tensor.dtype}"
                )

    @torch.no_grad()
    def fill(name: str, module: nn.Module) -> None:
        for key, tensor in _tensors(module).items():
            sharded.fill(tensor, tensors[f"{name}.{key}"])

    present = _layers(model)
    if present:
        parts = _qualified(present, _companions(model))
        _fail_on(
            _differences(
                {name: _fingerprint(entry) for name, entry in entries.items()},
                {name: _fingerprint(part.entry) for name, part in parts.items()},
            ),
            mismatch,
        )
        for name, part in parts.items():
            _check_materialized(name, part.module)
            check_kinds(name, part.module)
        for name, part in parts.items():
            fill(name, part.module)
        return given

    sharded.check_not_managed(given, "load its adapter")
    bases = {
        plain_name(name): (name, m)
        for name, m in model.named_modules(remove_duplicate=False)
        if is_linear(m)
    }
    layers = {}
    for name, m in modules.items():
        if name in bases:
            base = bases[name][1]
            _check_materialized(name, base)
            with torch.device("meta"):
                twin = nn.Linear(base.in_features, base.out_features)
                layers[name] = METHODS[m["method"]].reference(twin, **_arguments(m, twin))
    twins = _qualified(
        layers, {name: _empty_companion(entry, "meta") for name, entry in companions.items()}
    )
    _fail_on(
        _differences(
            {name: e["tensors"] for name, e in entries.items()},
            {name: _shapes(twin) for name, twin in twins.items()},
        ),
        mismatch,
    )
    for name, twin in twins.items():
        check_kinds(name, twin)
    install(
        model,
        {
            bases[name][0]: (METHODS[m["method"]], _arguments(m, bases[name][1]))
            for name, m in modules.items()
        },
        implementation,
        dtype,
        lambda device, dtype: {
            name: _empty_companion(entry, device, dtype) for name, entry in companions.items()
        },
        lambda name, module: fill(plain_name(name), module),
    )
    return given


def read_adapter(
    dir: str | os.PathLike,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """What is in a file of :func:`save_adapter`, validated, without a model.

    Args:
        dir: what :func:`save_adapter` wrote.

    Returns:
        The descriptions (method, arguments, shapes of the tensors) of the layers and of the
        companions, by name, and all tensors, by the qualified names that they have in a model.

    Raises:
        FileNotFoundError, ValueError, ImportError: see :func:`load_adapter`.
    """
    safetensors = _safetensors()
    directory = Path(dir)
    modules, companions, weights = _read(directory)
    tensors = safetensors.load(weights)
    wanted = {
        f"{name}.{key}": shape
        for name, entry in _qualified(modules, companions).items()
        for key, shape in entry["tensors"].items()
    }
    _fail_on(
        _differences(wanted, {key: list(t.shape) for key, t in tensors.items()}),
        f"{directory / INDEX_NAME}: does not describe its weights file",
    )
    return modules, companions, tensors


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """The index's validated ``modules`` and ``companions``, and the bytes of the weights file."""
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
    version = index.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"{path}: wanted format version 1 to {FORMAT_VERSION}, got {version!r}, "
            f"written by moelora_ops {index.get('package_version')}; this is {__version__}"
        )
    modules = _entry(index, "modules", dict, path)
    if not modules:
        raise ValueError(f"{path}: modules is empty")
    for name in modules:
        entry = _entry(modules, name, dict, path)
        method = _method(name, entry, path)
        with _checking(name, entry, method.arguments, path):
            method.config.check_layer(name, entry["arguments"])
    companions = _entry(index, "companions", dict, path) if version > 1 else {}
    for name in companions:
        entry, name = _entry(companions, name, dict, path), f"{COMPANIONS}.{name}"
        kinds, kind = _method(name, entry, path).companions, _entry(entry, "kind", str, path)
        if kind not in kinds:
            raise ValueError(f"{path}: {name}: wanted a kind of {sorted(kinds)}, got {kind!r}")
        with _checking(name, entry, kinds[kind].arguments, path):
            _empty_companion(entry, "meta")

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
    return modules, companions, data


def _method(name: str, entry: dict[str, Any], path: Path) -> Method:
    method = METHODS.get(_entry(entry, "method", str, path))
    if method is None:
        raise ValueError(
            f"{path}: {name}: wanted a method of {sorted(METHODS)}, got {entry['method']!r}"
        )
    return method


@contextlib.contextmanager
def _checking(name: str, entry: dict[str, Any], wanted: tuple[str, ...], path: Path):
    """Checks of one entry: it has exactly these arguments, they pass the body, and has shapes."""
    arguments = _entry(entry, "arguments", dict, path)
    _fail_on(
        [f"{field} is missing" for field in wanted if field not in arguments]
        + [f"{field} is unknown" for field in arguments if field not in wanted],
        f"{path}: arguments of {name}",
    )
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: arguments of {name}: {error}") from error
    for key in _entry(entry, "tensors", dict, path):
        _entry(entry["tensors"], key, list, path)


def _entry(mapping: dict[str, Any], key: str, kind: type, path: Path) -> Any:
    value = mapping.get(key)
    if not isinstance(value, kind):
        raise ValueError(f"{path}: wanted {key} to be of type {kind.__name__}, got {value!r:.60}")
    return value


def _layers(model: nn.Module) -> dict[str, _Part]:
    return {
        plain_name(layer.name): _Part(
            layer.module,
            {"method": layer.method, **_described(layer.module, METHODS[layer.method].arguments)},
        )
        for layer in adapted_layers(model)
    }


def _companions(model: nn.Module) -> dict[str, _Part]:
    parts = {}
    for name, companion in companions_of(model).items():
        ((method, kind, cls),) = (
            (method, kind, of_kind)
            for method, row in METHODS.items()
            for kind, of_kind in row.companions.items()
            if isinstance(companion, of_kind)
        )
        entry = {"method": method, "kind": kind, **_described(companion, cls.arguments)}
        parts[name] = _Part(companion, entry)
    return parts


def _described(module: nn.Module, arguments: tuple[str, ...]) -> dict[str, Any]:
    values = {name: getattr(module, name) for name in arguments}
    # As json gives them back: tuples become lists.
    return {
        "arguments": json.loads(json.dumps(values, allow_nan=False)),
        "tensors": _shapes(module),
    }


def _qualified(layers: dict[str, Any], companions: dict[str, Any]) -> dict[str, Any]:
    """Both by the qualified names that they have in a model."""
    return layers | {f"{COMPANIONS}.{name}": value for name, value in companions.items()}


def _arguments(entry: dict[str, Any], base: nn.Module) -> dict[str, Any]:
    """The constructor's arguments beside `base` of the layer that `entry` describes."""
    return METHODS[entry["method"]].config.constructor_arguments(base, entry["arguments"])


def _empty_companion(
    entry: dict[str, Any], device: torch.device | str, dtype: torch.dtype = torch.float32
) -> Companion:
    cls = METHODS[entry["method"]].companions[entry["kind"]]
    return cls(**entry["arguments"], device=device, dtype=dtype)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {plain_name(key): tensor for key, tensor in adapter_tensors(module).items()}


def _shapes(module: nn.Module) -> dict[str, list[int]]:
    return {key: list(tensor.shape) for key, tensor in _tensors(module).items()}


def _fingerprint(entry: dict[str, Any]) -> dict[str, Any]:
    """What must agree between a file and the adapters that are already in a model."""
    free = METHODS[entry["method"]].training_only
    arguments = {key: value for key, value in entry["arguments"].items() if key not in free}
    return {"method": entry["method"], "kind": entry.get("kind"), **arguments, **entry["tensors"]}


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
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
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
