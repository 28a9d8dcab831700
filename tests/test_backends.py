"""Which back end runs, and what is said when it is not the one a user would want."""

import json
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import moelora_ops
from moelora_ops import backends, functional, reference, set_default_backend, use_backend

ROOT = Path(moelora_ops.__file__).parent.parent
CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Each test starts as a new process would, without environment variables."""
    monkeypatch.setattr(backends, "_default", None)
    monkeypatch.setattr(backends, "_said", set())


def pretend(monkeypatch, missing):
    """Make the table say that the compiled extension is there (``""``) or why not."""
    table = tuple(
        row._replace(missing=lambda: missing) if row.name == "cpu" else row
        for row in backends.BACKENDS
    )
    monkeypatch.setattr(backends, "BACKENDS", table)
    monkeypatch.setattr(backends, "_BY_NAME", {row.name: row for row in table})


@pytest.fixture
def built(monkeypatch):
    pretend(monkeypatch, "")


@pytest.fixture
def not_built(monkeypatch):
    pretend(monkeypatch, "the compiled extension is not built")


def chosen(device=CPU, dtype=torch.float32):
    return backends.choose(device, dtype)


def call_mola(device=CPU):
    x, down, up, router = (
        torch.zeros(shape, device=device) for shape in ((3, 6), (4, 2, 6), (4, 2, 5), (4, 6))
    )
    weight = torch.zeros(5, 6, device=device)
    return functional.mola(x, weight, None, down, up, router, 2, 1.0)


def test_blocks_nest(built):
    assert chosen() == "cpu"
    with use_backend("reference"):
        assert chosen() == "reference"
        with use_backend("cpu"):
            assert chosen() == "cpu"
        assert chosen() == "reference"
        with use_backend(None):
            assert chosen() == "cpu"
        assert chosen() == "reference"
    assert chosen() == "cpu"


@pytest.fixture
def fastest(built, monkeypatch):
    """The reference was measured to be the fastest for topk."""
    monkeypatch.setattr(backends, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(backends.measured, "TABLE", {("topk", "sm_90"): "reference"})


def test_what_was_measured_goes_first(fastest, monkeypatch):
    assert backends.choose(CPU, torch.float32, "topk") == "reference"
    assert backends.choose(CPU, torch.float32, "gated") == chosen() == "cpu"
    with use_backend("cpu"):
        assert backends.choose(CPU, torch.float32, "topk") == "cpu"
    monkeypatch.setattr(backends, "architecture", lambda device: "sm_80")
    assert backends.choose(CPU, torch.float32, "topk") == "cpu"


def test_what_was_measured_may_not_run_here(fastest, monkeypatch):
    monkeypatch.setitem(backends.measured.TABLE, ("topk", "sm_90"), "triton")
    assert backends.choose(CPU, torch.float32, "topk") == "cpu"


def test_functions_ask_for_their_mix(fastest, monkeypatch):
    """Compiled ones too: what was measured is a constant to the compiler."""
    monkeypatch.setitem(backends._BY_NAME, "cpu", backends._BY_NAME["cpu"]._replace(dtypes=()))
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="does not compute"), use_backend("cpu"):
        call_mola()
    call_mola()
    torch.compile(call_mola, backend="eager", fullgraph=True)()


def test_architecture(monkeypatch):
    """Of a GPU it is a constant to the compiler, which need not trace how one is asked."""
    gpu = torch.device("cuda", 0)
    assert backends.architecture(gpu) == ""

    def properties(device):
        torch._dynamo.graph_break()
        return SimpleNamespace(major=9, minor=0)

    there = SimpleNamespace(is_available=lambda: True, get_device_properties=properties)
    instead = SimpleNamespace(cuda=there, version=SimpleNamespace(hip=None))
    monkeypatch.setattr(backends, "torch", instead)
    assert backends.architecture(gpu) == "sm_90" and backends.architecture(CPU) == ""
    compiled = torch.compile(
        lambda x: x + len(backends.architecture(gpu)), backend="eager", fullgraph=True
    )
    assert compiled(torch.zeros(())) == 5


def test_an_exception_leaves_the_block(built):
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert chosen() == "cpu"


def test_one_object_serves_many_blocks(built):
    reference = use_backend("reference")
    assert chosen() == "cpu"  # making one does nothing yet
    with reference, use_backend("cpu"), reference:
        assert chosen() == "reference"
    assert chosen() == "cpu"


def test_decorator(built):
    @use_backend("reference")
    def decorated(depth):
        return [chosen()] + (decorated(depth - 1) if depth else [])

    assert decorated(2) == ["reference"] * 3
    assert chosen() == "cpu"


def test_default(built):
    set_default_backend("reference")
    assert chosen() == "reference"
    with use_backend("cpu"):
        assert chosen() == "cpu"
    with use_backend(None):
        assert chosen() == "cpu"
    set_default_backend(None)
    assert chosen() == "cpu"


@pytest.mark.parametrize("choose_name", [use_backend, set_default_backend])
@pytest.mark.parametrize("name", ["fast", "CPU", "", 3])
def test_unknown_names(built, choose_name, name):
    with pytest.raises(
        ValueError, match=rf"^backend: wanted one of .*'cpu'.*'reference'.* None, got {name!r}$"
    ):
        choose_name(name)
    assert chosen() == "cpu"


def test_an_explicit_choice_never_falls_back(not_built):
    why = "'cpu' was asked for, but the compiled extension is not built"
    with use_backend("cpu"), pytest.raises(RuntimeError, match=why):
        call_mola()
    set_default_backend("cpu")
    with pytest.raises(RuntimeError, match="'cpu' was asked for"):
        call_mola()


def test_an_explicit_choice_does_not_take_foreign_tensors(built):
    with use_backend("cpu"):
        with pytest.raises(RuntimeError, match=r"kernels run on cpu tensors and these are on meta"):
            call_mola(META)
        with pytest.raises(RuntimeError, match=r"does not compute in torch.float8_e5m2"):
            chosen(dtype=torch.float8_e5m2)


def test_no_back_end_for_a_dtype(built):
    with pytest.raises(RuntimeError, match=r"no back end computes in torch.float8_e5m2 on cpu"):
        chosen(dtype=torch.float8_e5m2)


def test_the_forced_reference_runs_and_is_silent(monkeypatch):
    calls = []
    monkeypatch.setattr(
        reference, "mola", lambda *args, **kwargs: calls.append(args) or ("y", None)
    )
    with warnings.catch_warnings(), use_backend("reference"):
        warnings.simplefilter("error")
        assert call_mola() == "y"
    assert len(calls) == 1


def test_the_automatic_choice_says_once_that_it_is_slow(not_built):
    with pytest.warns(UserWarning, match=r"plain PyTorch path.*is not built") as said:
        call_mola()
        call_mola()
    assert len(said) == 1
    assert said[0].filename == __file__  # points at the caller, not into the package
    with pytest.warns(UserWarning, match="no kernels for meta tensors") as said:
        call_mola(META)
        call_mola(META)
    assert len(said) == 1


def test_the_automatic_choice_is_silent_about_kernels(built):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen() == "cpu"


def test_a_block_belongs_to_its_thread(built):
    seen = {}

    def look(name):
        seen[name] = chosen()

    with use_backend("reference"):
        thread = threading.Thread(target=look, args=("block of another thread",))
        thread.start()
        thread.join()
    set_default_backend("reference")
    thread = threading.Thread(target=look, args=("default of the process",))
    thread.start()
    thread.join()
    assert seen == {"block of another thread": "cpu", "default of the process": "reference"}


def test_a_compiled_caller_follows_the_choice(built):
    @torch.compile(fullgraph=True, backend="eager")
    def compiled(x):
        return x + (1 if backends.choose(x.device, x.dtype) == "cpu" else 2)

    x = torch.zeros(1)
    assert compiled(x) == 1
    with use_backend("reference"):
        assert compiled(x) == 2
        with use_backend(None):
            assert compiled(x) == 1
    set_default_backend("reference")
    assert compiled(x) == 2


@pytest.mark.parametrize("first", ["cpu", "reference"])
def test_a_compiled_layer_follows_the_choice_of_its_thread(built, first):
    """torch.compile guards on the choice, also when another thread compiled first."""
    ran = []

    def note(graph, inputs):
        kernels = any("autograd_function" in str(node.target) for node in graph.graph.nodes)

        def run(*args):
            ran.append("cpu" if kernels else "reference")
            return graph(*args)

        return run

    layer = moelora_ops.nn.MoLALinear(torch.nn.Linear(6, 5), 4)
    compiled = torch.compile(layer, backend=note, fullgraph=True)
    inner = use_backend("reference")(torch.compile(layer, backend=note, fullgraph=True))
    x = torch.randn(3, 6, requires_grad=True)

    def call(name, function=compiled):
        ran.clear()
        with use_backend(name):
            function(x)
        return ran.copy()

    def in_a_thread(name):
        thread = threading.Thread(target=lambda: call(name))
        thread.start()
        thread.join()
        return ran.copy()

    second = {"cpu": "reference", "reference": "cpu"}[first]
    for name in (first, second, first):
        assert in_a_thread(name) == [name]
        assert call(name) == [name]
    assert call(None) == ["cpu"]
    assert call("cpu", inner) == ["reference"]
    with use_backend("reference"):
        assert in_a_thread(None) == ["cpu"]
    set_default_backend("reference")
    compiled(x)
    assert ran[-1] == "reference"


def test_available_says_why_not(not_built):
    why = dict(backends.available())
    assert why.keys() == {"cpu", "cuda", "triton", "reference"}
    assert why["cpu"] == "the compiled extension is not built"
    assert why["reference"] == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_back_end_without_its_device_is_not_available(monkeypatch):
    table = tuple(row._replace(missing=lambda: "") for row in backends.BACKENDS)
    monkeypatch.setattr(backends, "BACKENDS", table)
    assert dict(backends.available())["triton"] == "there is no cuda device"


# New processes: what happens at import.


def run_python(code, **env):
    """Runs `code` in a new process; returns what it left in ``result``."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {k: v for k, v in os.environ.items() if k != "MOELORA_BACKEND"}
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport json; print(json.dumps(result))"],
        env={**environment, "PYTHONPATH": path, **env}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


ENVIRONMENT = """
import torch
from moelora_ops import backends, use_backend
def choose():
    try:
        return backends.choose(torch.device("cpu"), torch.float32)
    except ValueError as error:
        return str(error)
result = [choose()]
with use_backend("reference"):
    result.append(choose())
"""


def test_environment_names_the_default():
    assert run_python(ENVIRONMENT, MOELORA_BACKEND="reference") == ["reference", "reference"]


def test_environment_with_an_unknown_name():
    said, inside = run_python(ENVIRONMENT, MOELORA_BACKEND="fast")
    assert said.startswith("backend: wanted one of") and said.endswith("got 'fast'")
    assert inside == "reference"


WITHOUT_EXTENSION = """
import importlib.abc, sys, warnings
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "moelora_ops._C":
            raise ImportError({error!r})
sys.meta_path.insert(0, Block())
import torch
import moelora_ops
torch.manual_seed(0)
truth = moelora_ops.reference.MoLALinear(torch.nn.Linear(6, 5), 4)
torch.nn.init.normal_(truth.lora_up)
layer = moelora_ops.nn.MoLALinear.from_reference(truth)
x = torch.randn(7, 6, requires_grad=True)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    y = layer(x)
    layer(x)
y.sum().backward()
try:
    with moelora_ops.use_backend("cpu"):
        layer(x)
    refused = ""
except RuntimeError as error:
    refused = str(error)
result = {{
    "said": [str(w.message) for w in said],
    "equal": torch.equal(y, truth(x)),
    "trains": all(p.grad is not None for p in (x, layer.lora_down, layer.lora_up, layer.router)),
    "refused": refused,
}}
"""


@pytest.mark.parametrize(
    "error, why",
    [
        ("No module named 'moelora_ops._C'", "the compiled extension is not built"),
        ("undefined symbol: abc", "the compiled extension does not load: undefined symbol: abc"),
    ],
    ids=["not built", "broken"],
)
def test_without_the_extension_the_package_runs_and_says_so_once(error, why):
    result = run_python(WITHOUT_EXTENSION.format(error=error))
    assert len(result["said"]) == 1 and why in result["said"][0]
    assert result["equal"] and result["trains"]
    assert result["refused"].startswith(f"backend 'cpu' was asked for, but {why}")


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # what an import finds where it is not installed
import torch
import moelora_ops
from moelora_ops import backends, info
torch.manual_seed(0)
truth = moelora_ops.reference.MoLALinear(torch.nn.Linear(6, 5), 4)
layer = moelora_ops.nn.MoLALinear.from_reference(truth)
x = torch.randn(7, 6)
try:
    with moelora_ops.use_backend("triton"):
        layer(x)
    refused = ""
except RuntimeError as error:
    refused = str(error)
facts = info.collect()
result = {
    "why": dict(backends.available())["triton"],
    "close": torch.allclose(layer(x), truth(x), atol=1e-6),
    "refused": refused,
    "info": info.format_info(facts),
    "paths": list(facts["paths"]),
}
"""


def test_without_triton_the_package_runs_and_says_so():
    result = run_python(WITHOUT_TRITON)
    assert result["why"] == "triton is not installed"
    assert result["close"] and "triton" not in result["paths"]
    assert "'triton' was asked for, but" in result["refused"]
    assert "no: triton is not installed" in result["info"]


IMPORTS = """
import sys
import moelora_ops
from moelora_ops import info
info.collect()
result = "triton" in sys.modules
"""


def test_importing_the_package_does_not_import_triton():
    """It would take longer than all of the package."""
    assert run_python(IMPORTS) is False
