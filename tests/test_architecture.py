"""The arrows of docs/design.md: what may import what, and what else holds for the whole tree."""

import ast
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import moelora_ops

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "moelora_ops"

# Unit of the package (a file or folder beside __init__.py) -> the units that it may import.
# nn -> functional -> autograd -> ops; a new unit gets its row here, and never an arrow upwards.
ARROWS = {
    "_version": set(),
    "reference": set(),
    "ops": set(),
    "depth": set(),
    "sharded": set(),
    "companions": set(),
    "autograd": {"ops"},
    "backends": {"ops"},
    "functional": {"autograd", "backends", "ops", "reference", "sharded"},
    "balance": {"companions", "depth", "functional", "reference"},
    "intuition": {"companions", "reference"},
    "nn": {"balance", "companions", "depth", "functional", "intuition", "reference"},
    "prompts": {"companions", "reference"},
    "integrations": {"functional", "nn"},
    "configs": {
        "companions",
        "depth",
        "functional",
        "integrations",
        "intuition",
        "nn",
        "prompts",
        "reference",
    },
    "models": {
        "companions",
        "configs",
        "integrations",
        "intuition",
        "nn",
        "prompts",
        "reference",
        "sharded",
    },
    "adapters": {"_version", "companions", "configs", "models", "sharded"},
    "pemt": {
        "adapters",
        "balance",
        "companions",
        "configs",
        "models",
        "nn",
        "reference",
        "sharded",
    },
    "info": {"_version", "backends", "functional"},
    "bench": {"_version", "backends", "functional", "info", "nn", "reference"},
}
# The public surface offers the library, not the programs that are run with `python -m`.
ARROWS["__init__"] = ARROWS.keys() - {"bench", "info"}


def unit_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(source, package):
    """(module, line, at top level) of every import in `source`, a module of `package`."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (
                package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            )
            stem = ".".join([*base, *filter(None, [node.module])])
            # What is named after `from package import` may itself be a module.
            names = [f"{stem}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield name, node.lineno, node in tree.body


def units(name):
    """The unit of the package that a dotted name belongs to, as a set of one or none."""
    top, _, rest = name.partition(".")
    if top != "moelora_ops":
        return set()
    unit = rest.partition(".")[0]
    is_unit = (PACKAGE / unit).is_dir() or (PACKAGE / f"{unit}.py").is_file()
    return {unit if unit and is_unit else "__init__"}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        package = ".".join(path.relative_to(ROOT).parent.parts)
        yield path, list(imported(path.read_text(), package))


@pytest.mark.parametrize(
    "source, package, want",
    [
        ("import moelora_ops", "moelora_ops.nn", {"__init__"}),
        ("import moelora_ops.nn.mola as m", "moelora_ops.bench", {"nn"}),
        ("from moelora_ops.ops import topk_forward", "examples", {"ops"}),
        ("from moelora_ops import nn, use_backend", "examples", {"nn", "__init__"}),
        ("from . import ops, nn", "moelora_ops", {"ops", "nn"}),
        ("from .. import ops", "moelora_ops.nn", {"ops"}),
        ("from ..functional import mola", "moelora_ops.nn", {"functional"}),
        ("from .base import AdapterLinear", "moelora_ops.nn", {"nn"}),
        ("def f():\n    from .. import __version__", "moelora_ops.nn", {"__init__"}),
        ("import torch, json", "moelora_ops", set()),
    ],
)
def test_the_reader_of_imports(source, package, want):
    assert set().union(*(units(name) for name, _, _ in imported(source, package))) == want


def test_imports_follow_the_arrows():
    against = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path, names in modules()
        for name, line, _ in names
        for unit in units(name) - {unit_of(path)}
        if unit not in ARROWS.get(unit_of(path), ())
    ]
    assert against == []


def test_every_unit_has_a_row():
    missing = {unit_of(path) for path, _ in modules()} - ARROWS.keys()
    assert not missing, "state in ARROWS what these may import"


def test_the_arrows_have_no_cycle():
    above = {unit: set(below) for unit, below in ARROWS.items()}
    while bottom := {unit for unit, below in above.items() if not below}:
        above = {unit: below - bottom for unit, below in above.items() if unit not in bottom}
    assert not above


def test_only_torch_is_needed_to_import():
    """The wheel depends on torch alone; what else a module uses, it imports where it uses it."""
    known = sys.stdlib_module_names | {"torch", "moelora_ops"}

    def optional(path):
        # backends/triton/__init__.py imports its kernels when the first of them runs.
        kernels = path.parent.name == "triton" and path.stem != "__init__"
        return {"triton"} if kernels else set()

    needed = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path, names in modules()
        for name, line, at_top in names
        if at_top and name.partition(".")[0] not in known | optional(path)
    ]
    assert needed == []


@pytest.mark.parametrize("unit", ["ops", "reference"])
def test_ops_and_reference_import_torch_only(unit):
    """The contract loads alone, and the truth shares nothing with what it judges."""
    known = sys.stdlib_module_names | {"torch"}
    others = [
        name
        for path, names in modules()
        for name, _, _ in names
        if unit_of(path) == unit and units(name) != {unit} and name.partition(".")[0] not in known
    ]
    assert others == []


# Kernels: folder of csrc -> the folders whose headers it may include.  Only bindings know tensors.
HEADERS = {"mix": {"mix"}, "cpu": {"cpu", "mix"}, "cuda": {"cuda", "mix"}}


def test_kernels_are_torch_free_and_mixes_host_free():
    against = []
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix not in (".h", ".cpp", ".cu", ".cuh") or path.parent == ROOT / "csrc":
            continue
        folder = path.relative_to(ROOT / "csrc").parts[0]
        for header in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.M):
            top, nested, _ = header.partition("/")
            if nested and top not in HEADERS[folder]:
                against.append(f"{path.relative_to(ROOT)} includes {header}")
    assert against == []


def test_the_version_is_stated_once():
    version = moelora_ops.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    sources = [ROOT / "pyproject.toml", ROOT / "setup.py"]
    sources += [*PACKAGE.rglob("*.py"), *(ROOT / "csrc").rglob("*.[ch]*")]
    exactly = re.compile(rf"(?<![\d.]){re.escape(version)}(?![\d.])")
    stated = [
        path.relative_to(ROOT).as_posix() for path in sources if exactly.search(path.read_text())
    ]
    assert stated == ["moelora_ops/_version.py"]
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="no checkout")
def test_a_source_distribution_has_every_file(tmp_path):
    """All that the repository has, so that it builds and tests everything; hidden files aside."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path]
    subprocess.run([*command, "sdist", "--dist-dir", tmp_path], cwd=ROOT, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        packed = {name.partition("/")[2] for name in files.getnames()}
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    kept = {name for name in listed.stdout.splitlines() if not name.startswith(".")}
    assert kept <= packed
    assert not any(name.endswith((".so", ".pyc")) for name in packed)


def anchors(text):
    """The anchors that a Markdown page's headings make, as on the usual hosts."""
    for heading in re.findall(r"^#+ +(.*)$", text, re.M):
        words = re.sub(r"[^\w\- ]", "", heading.lower())
        yield words.strip().replace(" ", "-")


DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/math.md",
    "docs/adding_a_method.md",
)


@pytest.mark.parametrize(
    "document",
    sorted({*DOCUMENTS, *(p.relative_to(ROOT).as_posix() for p in ROOT.glob("docs/*.md"))}),
)
def test_links_resolve(document):
    page = ROOT / document
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
    assert broken == []
