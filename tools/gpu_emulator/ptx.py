"""PTX text to kernels: parameters, variables, registers and a flat list of instructions.

Nothing is interpreted here.  An instruction keeps its dotted name and its operands as text, with
registers that are declared in an inner scope renamed so that names are unique within a kernel.
"""

import contextlib
import functools
import gc
import re
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

# Registers and memory hold bits; bf16, tf32 and the packed types have no type of their own in
# numpy.
DTYPES = {
    "pred": np.dtype(np.bool_),
    "b8": np.dtype(np.uint8), "u8": np.dtype(np.uint8), "s8": np.dtype(np.int8),
    "b16": np.dtype(np.uint16), "u16": np.dtype(np.uint16), "s16": np.dtype(np.int16),
    "f16": np.dtype(np.float16), "bf16": np.dtype(np.uint16),
    "b32": np.dtype(np.uint32), "u32": np.dtype(np.uint32), "s32": np.dtype(np.int32),
    "f32": np.dtype(np.float32), "tf32": np.dtype(np.uint32),
    "f16x2": np.dtype(np.uint32), "bf16x2": np.dtype(np.uint32),
    "u16x2": np.dtype(np.uint32), "s16x2": np.dtype(np.uint32),
    "b64": np.dtype(np.uint64), "u64": np.dtype(np.uint64), "s64": np.dtype(np.int64),
    "f64": np.dtype(np.float64),
}  # fmt: skip


class Instruction(NamedTuple):
    name: str  # "ld.global.v4.b32"
    operands: tuple[str, ...]
    guard: str | None  # predicate register
    negated: bool  # runs where the guard is false
    target: int | None  # of a branch: an index into the kernel's instructions
    line: int  # in the PTX text
    source: str  # "kernels.py:60:18" where the compiler left that information, else ""

    def __str__(self):
        guard = f"@{'!' * self.negated}{self.guard} " if self.guard else ""
        return f"{guard}{self.name} {', '.join(self.operands)}".rstrip()


class Parameter(NamedTuple):
    offset: int
    size: int


@dataclass(frozen=True, eq=False)
class Kernel:
    """One `.entry` of a module."""

    name: str
    parameters: dict[str, Parameter]
    instructions: list[Instruction]
    registers: dict[str, np.dtype]
    shared: dict[str, int]  # variable: offset
    static_shared: int  # bytes; dynamic shared memory begins after them
    local: dict[str, int]  # variable: offset within a thread's local memory
    local_bytes: int
    constants: dict[str, np.ndarray]  # module variables (.global, .const) by name
    max_threads: int | None  # .reqntid or .maxntid

    @property
    def parameter_bytes(self) -> int:
        return max((p.offset + p.size for p in self.parameters.values()), default=0)


@dataclass
class _Variable:
    space: str
    name: str
    dtype: np.dtype
    count: int
    align: int
    external: bool
    values: list[int] = field(default_factory=list)

    @property
    def size(self) -> int:
        return self.dtype.itemsize * self.count


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_FILE = re.compile(r'\.file\s+(\d+)\s+"(?:[^"]*/)?([^"]+)"')
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+(\d+)")
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*(?:\(([^)]*)\))?([^{;]*)\{")
_FUNCTION = re.compile(r"\.func\b[^{;]*\{")
_STATEMENT = re.compile(
    r"\s*(?:(?P<scope>[{}])"
    r"|(?P<loc>\.loc\b[^\n]*)"
    r"|(?P<label>[\w$.%]+):(?!:)"
    r"|(?P<text>[^;]+);)"
)
_VARIABLE = re.compile(
    r"(?P<extern>\.extern\s+)?(?:\.visible\s+|\.weak\s+)?\.(?P<space>shared|local|global|const)\s+"
    r"(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+(?P<name>[\w$]+)\s*(?P<dims>(?:\[\d*\])*)"
    r"\s*(?:=\s*(?P<init>.*))?",
    re.S,
)
_PARAMETER = re.compile(r"\.param\s+(.*?)([\w$]+)\s*(?:\[(\d+)\])?$", re.S)
_GUARD = re.compile(r"@(!?)\s*([\w$%.]+)\s+(.*)", re.S)
_OPERAND = re.compile(r"\([^)]*\)|\{[^}]*\}|\[[^\]]*\]|[^,\s](?:[^,{\[]*[^,{\[\s])?")
_NAME = re.compile(r"(?<![\w.%$])[%A-Za-z_$][\w$%]*")


@contextlib.contextmanager
def garbage_kept():
    """Thousands of small objects are made, all of them to stay: collecting would take half of the
    time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@functools.lru_cache(maxsize=256)
@garbage_kept()
def load(text: str) -> dict[str, Kernel]:
    """The kernels of a PTX module, by name.  Parsed once per text."""
    files = dict(_FILE.findall(text))
    # Same length, same lines: positions in the clean text are positions in the original.
    clean = _COMMENT.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)
    newlines = [m.start() for m in re.finditer("\n", clean)]

    entries, outside, at = [], [], 0
    for match in sorted(
        [*_ENTRY.finditer(clean), *_FUNCTION.finditer(clean)], key=lambda m: m.start()
    ):
        end = _closing_brace(clean, match.end())
        outside.append(clean[at : match.start()])
        at = end + 1
        if match.re is _ENTRY:
            entries.append((match, end))
    outside.append(clean[at:])
    module = [v for v in map(_variable, _module_statements("\n".join(outside))) if v is not None]

    kernels = {}
    for match, end in entries:
        parser = _BodyParser(clean, match.end(), end, newlines, files)
        kernels[match[1]] = _kernel(match, parser, module, clean[match.end() : end])
    return kernels


def _closing_brace(text: str, start: int) -> int:
    depth = 1
    for brace in re.compile("[{}]").finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    raise ValueError("unbalanced braces in PTX")


def _module_statements(text: str):
    # Debug sections hold braces and no variables.
    text = re.sub(r"\.section\s+\S+\s*\{[^}]*\}", "", text)
    return (s.strip() for s in text.split(";"))


def _variable(statement: str) -> _Variable | None:
    match = _VARIABLE.search(statement)
    if match is None:
        return None
    sizes = [int(n or 0) for n in re.findall(r"\[(\d*)\]", match["dims"])]
    dtype = DTYPES[match["type"]]
    values = [int(v, 0) for v in re.findall(r"-?\b(?:0[xX][\da-fA-F]+|\d+)\b", match["init"] or "")]
    return _Variable(
        space=match["space"],
        name=match["name"],
        dtype=dtype,
        count=int(np.prod(sizes)) if sizes else 1,
        align=int(match["align"] or dtype.itemsize),
        external=bool(match["extern"]),
        values=values,
    )


def _parameters(text: str) -> dict[str, Parameter]:
    parameters, offset = {}, 0
    for declaration in (text or "").split(","):
        match = _PARAMETER.search(declaration.strip())
        if match is None:
            continue
        attributes, name, count = match.groups()
        dtype = DTYPES[next(t for t in re.findall(r"\.(\w+)", attributes) if t in DTYPES)]
        size = dtype.itemsize * int(count or 1)
        # `.ptr .align` describes what a pointer points to, not the parameter.
        align = re.search(r"\.align\s+(\d+)", re.sub(r"\.ptr\b.*", "", attributes))
        align = int(align[1]) if align else dtype.itemsize
        offset = -(-offset // align) * align
        parameters[name] = Parameter(offset, size)
        offset += size
    return parameters


def _layout(variables: list[_Variable], start: int = 0) -> tuple[dict[str, int], int]:
    offsets, at = {}, start
    for v in variables:
        at = -(-at // v.align) * v.align
        offsets[v.name] = at
        at += v.size
    return offsets, at


def _kernel(match, parser: "_BodyParser", module: list[_Variable], body: str) -> Kernel:
    parser.parse()
    used = set(_NAME.findall(body))
    variables = [v for v in module if v.name in used] + parser.variables
    shared, static = _layout([v for v in variables if v.space == "shared" and not v.external])
    dynamic = [v for v in variables if v.space == "shared" and v.external]
    if dynamic and static:
        static = -(-static // 1024) * 1024
    shared |= {v.name: static for v in dynamic}
    local, local_bytes = _layout([v for v in variables if v.space == "local"])
    constants = {}
    for v in variables:
        if v.space in ("global", "const") and not v.external:
            array = np.zeros(v.count, v.dtype)
            array[: len(v.values)] = [x % 256**v.dtype.itemsize for x in v.values]
            constants[v.name] = array
    threads = re.search(r"\.(?:reqntid|maxntid)\s+([\d,\s]+)", match[3])
    return Kernel(
        name=match[1],
        parameters=_parameters(match[2]),
        instructions=parser.instructions,
        registers=parser.registers,
        shared=shared,
        static_shared=static,
        local=local,
        local_bytes=-(-local_bytes // 16) * 16,
        constants=constants,
        max_threads=int(np.prod([int(n) for n in threads[1].split(",")])) if threads else None,
    )


class _BodyParser:
    def __init__(self, text, start, end, newlines, files):
        self.text, self.start, self.end = text, start, end
        self.newlines, self.files = newlines, files
        self.instructions: list[Instruction] = []
        self.registers: dict[str, np.dtype] = {}
        self.variables: list[_Variable] = []
        self.scopes: list[tuple[int, dict[str, str]]] = [(0, {})]
        self.renames = False  # whether an inner scope has registers
        self.labels: dict[tuple[str, int], int] = {}
        self.source = ""

    def parse(self):
        at, scopes_seen, branches = self.start, 0, []
        while at < self.end:
            match = _STATEMENT.match(self.text, at, self.end)
            if match is None:
                break
            at = match.end()
            kind = match.lastgroup
            if kind == "text":
                line = bisect_right(self.newlines, match.start("text"))
                branch = self._statement(match["text"].strip(), line + 1)
                if branch is not None:
                    branches.append((branch, [number for number, _ in self.scopes]))
            elif kind == "loc":
                file, row, column = _LOC.match(match["loc"]).groups()
                self.source = f"{self.files.get(file, file)}:{row}:{column}"
            elif kind == "label":
                self.labels[match["label"], self.scopes[-1][0]] = len(self.instructions)
            elif match["scope"] == "{":
                scopes_seen += 1
                self.scopes.append((scopes_seen, {}))
            else:
                self.scopes.pop()
                self.renames = any(names for _, names in self.scopes[1:])
        for index, scopes in branches:
            self._resolve(index, scopes)

    def _resolve(self, index: int, scopes: list[int]):
        branch = self.instructions[index]
        label = branch.operands[0]
        target = next(
            (self.labels[label, s] for s in reversed(scopes) if (label, s) in self.labels), None
        )
        self.instructions[index] = branch._replace(target=target)

    def _statement(self, text: str, line: int) -> int | None:
        """Returns the instruction's index if it is a branch to a label."""
        if text[0] == ".":
            self._directive(text)
            return None
        guard, negated = None, False
        if text[0] == "@":
            bang, guard, text = _GUARD.match(text).groups()
            negated = bool(bang)
        name, *rest = text.split(None, 1)
        operands = split_operands(rest[0]) if rest else []
        if self.renames:
            guard, operands = guard and self._rename(guard), [self._rename(o) for o in operands]
        index = len(self.instructions)
        self.instructions.append(
            Instruction(name, tuple(operands), guard, negated, None, line, self.source)
        )
        return index if name in ("bra", "bra.uni") else None

    def _directive(self, text: str):
        if text.startswith(".reg"):
            kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S).groups()
            number, scope = self.scopes[-1]
            for name in names.split(","):
                name, _, count = name.strip().rstrip(">").partition("<")
                for full in [f"{name}{i}" for i in range(int(count))] if count else [name]:
                    unique = full if number == 0 else f"{full}@{number}"
                    scope[full] = unique
                    self.renames |= number > 0
                    self.registers[unique] = DTYPES[kind]
        else:
            variable = _variable(text)
            if variable is not None:
                self.variables.append(variable)

    def _rename(self, operand: str) -> str:
        # Registers of the outermost scope keep their names.
        return _NAME.sub(
            lambda m: next((s[m[0]] for _, s in reversed(self.scopes) if m[0] in s), m[0]), operand
        )


def split_operands(text: str) -> list[str]:
    """ "%r1, [%rd2+4], {%r3, %r4}" to its three operands."""
    text = " ".join(text.split())
    if "{" in text or "[" in text or "(" in text:
        return _OPERAND.findall(text)
    return [o.strip() for o in text.split(",")] if text else []
