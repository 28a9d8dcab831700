"""What a CUDA launch was given, by name: parameters and structs as csrc declares them."""

import ctypes
import functools
import re
from pathlib import Path
from typing import Any, NamedTuple

CSRC = Path(__file__).parents[3] / "csrc"
HEADERS = [CSRC / "mix" / f"{name}.h" for name in ("gated", "grid", "output_gate", "row_map")]
HEADERS += [CSRC / "cuda" / name for name in ("kernels.h", "routing.cu")]

_SCALARS = {
    "bool": ctypes.c_bool, "double": ctypes.c_double, "int": ctypes.c_int,
    "uint8_t": ctypes.c_uint8, "int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64,
}  # fmt: skip
_CONSTANT = re.compile(r"constexpr int (\w+) = (\d+);")
# Those that are no templates.
_STRUCT = re.compile(r"(?<!>\n)^struct (\w+)(?: : (\w+))? \{", re.M)
_ENUM = re.compile(r"enum class (\w+) : (\w+)")
# A struct, or what ends with a semicolon or begins a function's body.
_ITEM = re.compile(r"\s*(?:struct (\w+)(?: : (\w+))? \{|([^;{]+)([;{]))")
_KERNEL = re.compile(
    r"__global__ void (?:__launch_bounds__\([^)]*\)\s*)?(\w+_kernel)"
    r"\(([^)]*)\)"
)
_FUNCTOR = re.compile(r"struct (\w+)(?: : [^{]+)? \{\s*(?:using A = acc_t<T>;\s*)?(\w+) \w+;")
_TYPES = "13__nv_bfloat16|6__half|f|d"
_HELD = re.compile(r"_[0-9a-f]{8}_\d+_(\w+?)_cu_[0-9a-f]{8}\d+([A-Z]\w*?)I")


class Given(NamedTuple):
    """A launch's arguments.

    Attributes:
        values: by the kernel's names; structs as ctypes, a functor as the struct that it holds, or
            None if it holds nothing.
        element: bytes of the type that the kernel is for; 0 if it is for none.
        flags: the template arguments that are booleans.
    """

    values: dict[str, Any]
    element: int
    flags: tuple[bool, ...]


@functools.cache
def structs() -> dict[str, type]:
    """The plain structs of the kernels' interface."""
    text = "\n".join(re.sub(r"//.*", "", path.read_text()) for path in HEADERS)
    types = _SCALARS | {name: _SCALARS[base] for name, base in _ENUM.findall(text)}
    constants = {name: int(value) for name, value in _CONSTANT.findall(text)}
    found: dict[str, type] = {}
    for match in _STRUCT.finditer(text):
        end = _closing(text, match.end())
        base = found.get(match[2], ctypes.Structure)
        found[match[1]] = _struct(match[1], base, text[match.end() : end], types | found, constants)
    return found


def _closing(text: str, at: int) -> int:
    """Where the brace closes after which `at` is."""
    depth = 1
    while depth:
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        at += 1
    return at - 1


def _struct(name: str, base: type, body: str, types: dict, constants: dict) -> type:
    fields, at = [], 0
    while match := _ITEM.match(body, at):
        at = match.end()
        if match[1]:  # a struct of its own, and perhaps members of that type
            end = _closing(body, at)
            inner = _struct(match[1], ctypes.Structure, body[at:end], types, constants)
            at = body.index(";", end) + 1
            fields += _members(inner, body[end + 1 : at - 1], constants)
        elif match[4] == "{":
            at = _closing(body, at) + 1
        else:
            words = match[3].removeprefix("const ").strip().partition(" ")
            pointer = words[0].endswith("*")
            held = ctypes.c_void_p if pointer or words[0] == "void" else types[words[0]]
            fields += _members(held, words[2], constants)
    return type(base)(name, (base,), {"_fields_": fields})


def _members(held: Any, declarators: str, constants: dict) -> list[tuple[str, Any]]:
    found = []
    for declarator in filter(None, (d.strip() for d in declarators.split(","))):
        stars, member, length = re.match(r"(\*?)(\w+)(?:\[(\w+)\])?", declarator).groups()
        kind = ctypes.c_void_p if stars else held
        found.append((member, kind * constants[length] if length else kind))
    return found


@functools.cache
def _parameters() -> dict[str, list[tuple[str, Any]]]:
    """Of each kernel: names, with ctypes or None for a functor."""
    known, found = _SCALARS | structs(), {}
    for path in sorted((CSRC / "cuda").glob("*.cu*")):
        for kernel, parameters in _KERNEL.findall(path.read_text()):
            found[kernel] = []
            for parameter in parameters.split(","):
                type, _, name = parameter.replace("const ", "").strip().rpartition(" ")
                kind = ctypes.c_void_p if type.endswith("*") else known.get(type)
                found[kernel].append((name, kind))
    return found


@functools.cache
def _functors() -> dict[tuple[str, str], str]:
    """The struct that a functor holds, by source and name."""
    return {
        (path.stem, name): held
        for path in (CSRC / "cuda").glob("*.cu")
        for name, held in _FUNCTOR.findall(path.read_text())
    }


def _held(symbol: str) -> type | None:
    """The struct in the functor that a kernel was made for."""
    for place in _HELD.findall(symbol):
        if held := _functors().get(place):
            return structs()[held]
    return None


def read(kernel: str, symbol: str, arguments: list[bytes]) -> Given:
    """What a launch of `kernel`, whose mangled name is `symbol`, was given.

    Raises:
        TypeError: a parameter is not as long as its declaration; csrc has outgrown this file.
    """
    values: dict[str, Any] = {}
    for (name, type), data in zip(_parameters()[kernel], arguments, strict=True):
        type = type or _held(symbol)
        if type is None and len(data) == 1:
            values[name] = None  # a functor without members
            continue
        if type is None or ctypes.sizeof(type) != len(data):
            raise TypeError(f"{kernel}: {name} has {len(data)} bytes, not those of {type}")
        value = type.from_buffer_copy(data)
        values[name] = getattr(value, "value", value)
    template = re.search(rf"{kernel}I({_TYPES})((?:Lb[01]E)*)", symbol)
    if not template:
        return Given(values, 0, ())
    first, flags = template.groups()
    element = 2 if re.search("__nv_bfloat16|__half", symbol) else {"f": 4, "d": 8}[first]
    return Given(values, element, tuple(flag == "1" for flag in re.findall("[01]", flags)))
