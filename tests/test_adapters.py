"""Adapters on disk: round trips, interrupted saves, damaged files, foreign models."""

import builtins
import json
import os

import pytest
import torch
from torch import nn

import moelora_ops
from moelora_ops import MoLAConfig, models, reference
from moelora_ops.nn import MoLALinear

pytest.importorskip("safetensors")

CONFIG = MoLAConfig([2, 3], rank=2, alpha=3.0, top_k=1, dropout=0.25, renormalize=False)


class Toy(nn.Module):
    def __init__(self, width=4, depth=2):
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(depth):
            block = nn.Module()
            block.q_proj, block.o_proj = nn.Linear(width, width + 1), nn.Linear(width + 1, width)
            self.layers.append(block)

    def forward(self, x):
        for block in self.layers:
            x = x + block.o_proj(torch.tanh(block.q_proj(x)))
        return x


def bare(**kwargs):
    torch.manual_seed(0)
    return Toy(**kwargs)


def adapted(seed=1, config=CONFIG, implementation="fused", **kwargs):
    """The same base for every seed, other adapters."""
    config = MoLAConfig(**{**vars(config), "target_modules": ("q_proj", "o_proj")})
    model = moelora_ops.apply(bare(**kwargs), config, implementation=implementation)
    torch.manual_seed(seed)
    for parameter in models.adapter_parameters(model):
        nn.init.normal_(parameter)
    return model


def values(model):
    return {name: p for name, p in model.state_dict().items() if ".base." not in name}


def assert_bitwise(model, wanted):
    got, wanted = values(model), values(wanted)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype and torch.equal(got[name], value), name


def snapshot(model):
    return (
        [(name, id(module)) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters()],
    )


def index(path):
    return json.loads((path / "adapter.json").read_text())


def edit_index(path, change):
    content = index(path)
    change(content)
    (path / "adapter.json").write_text(json.dumps(content))


def weights_file(path):
    return path / index(path)["weights"]["file"]


@pytest.fixture
def saved(tmp_path):
    moelora_ops.save_adapter(adapted(), tmp_path)
    return tmp_path


@pytest.mark.parametrize("present", [False, True])
@pytest.mark.parametrize("load_by", ["fused", "reference"])
@pytest.mark.parametrize("save_by", ["fused", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_round_trip_is_bitwise(tmp_path, save_by, load_by, present, dtype):
    wanted = adapted(implementation=save_by).to(dtype)
    moelora_ops.save_adapter(wanted, tmp_path / "new" / "directory")
    model = (adapted(2, implementation=load_by) if present else bare()).to(dtype)
    kwargs = {} if present else {"implementation": load_by}
    assert moelora_ops.load_adapter(model, tmp_path / "new" / "directory", **kwargs) is model
    assert_bitwise(model, wanted)
    layer = model.layers[1].q_proj
    assert type(layer) is {"fused": MoLALinear, "reference": reference.MoLALinear}[load_by]
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(values(model))
    if dtype == torch.float64:
        x = torch.randn(5, 4, dtype=dtype)
        torch.testing.assert_close(model.eval()(x), wanted.eval()(x))


def test_settings_come_back(saved):
    layer = moelora_ops.load_adapter(bare(), saved).layers[1].q_proj
    assert (layer.num_experts, layer.rank, layer.alpha, layer.top_k) == (3, 2, 3.0, 1)
    assert (layer.dropout, layer.dropout_mode, layer.renormalize) == (0.25, "token", False)


def test_the_two_implementations_write_the_same_bytes(tmp_path):
    for implementation in ("fused", "reference"):
        moelora_ops.save_adapter(adapted(implementation=implementation), tmp_path / implementation)
    for name in os.listdir(tmp_path / "fused"):
        read = [(tmp_path / i / name).read_bytes() for i in ("fused", "reference")]
        assert read[0] == read[1]


def test_values_are_cast_to_the_model(saved):
    wanted = adapted()
    for model, dtype in (
        (moelora_ops.load_adapter(bare().bfloat16(), saved), torch.bfloat16),
        (moelora_ops.load_adapter(bare().bfloat16(), saved, dtype=torch.float32), torch.float32),
        (moelora_ops.load_adapter(adapted(2).double(), saved), torch.float64),
    ):
        for name, value in values(model).items():
            assert torch.equal(value, values(wanted)[name].to(dtype)), name
    assert model.layers[0].q_proj.base.weight.dtype == torch.float64


def test_compiled_and_tied_models(tmp_path):
    model = adapted(config=MoLAConfig(2, rank=2))
    model.layers[1].q_proj.router = model.layers[0].q_proj.router
    moelora_ops.save_adapter(torch.compile(model), tmp_path)
    assert_bitwise(moelora_ops.load_adapter(bare(), tmp_path), model)
    compiled = torch.compile(bare())
    moelora_ops.load_adapter(compiled, tmp_path)
    assert_bitwise(compiled._orig_mod, model)


def test_training_settings_may_differ_in_an_adapted_model(saved):
    other = MoLAConfig(**{**vars(CONFIG), "dropout": 0.5, "dropout_mode": "expert"})
    model = moelora_ops.load_adapter(adapted(2, other), saved)
    assert_bitwise(model, adapted())
    assert model.layers[0].q_proj.dropout == 0.5


def test_a_second_save_replaces_the_first(saved):
    old = weights_file(saved)
    (saved / ".adapter-0.safetensors.7.tmp").write_text("left by a crash")
    (saved / "notes.txt").write_text("not ours")
    moelora_ops.save_adapter(adapted(2), saved)
    assert not old.exists()
    names = {"adapter.json", weights_file(saved).name, "notes.txt"}
    assert set(os.listdir(saved)) == names
    assert_bitwise(moelora_ops.load_adapter(bare(), saved), adapted(2))

    moelora_ops.save_adapter(adapted(2), saved)  # the same content keeps its name
    assert set(os.listdir(saved)) == names


@pytest.mark.parametrize("function", ["replace", "fsync"])
@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_an_interrupted_save_leaves_the_old_adapter_or_the_new(saved, monkeypatch, function, step):
    """Two renames, and an fsync of file and directory each, for the weights and for the index."""
    calls, real = [], getattr(os, function)

    def fail(*args):
        calls.append(args)
        if len(calls) == step:
            raise OSError("no space left")
        return real(*args)

    monkeypatch.setattr(os, function, fail)
    interrupted = step <= {"replace": 2, "fsync": 4}[function]
    if interrupted:
        with pytest.raises(OSError, match="no space left"):
            moelora_ops.save_adapter(adapted(2), saved)
    else:
        moelora_ops.save_adapter(adapted(2), saved)
    monkeypatch.undo()

    committed = step == 4 or not interrupted  # the last fsync is after the commit
    assert_bitwise(moelora_ops.load_adapter(bare(), saved), adapted(2 if committed else 1))
    assert not [name for name in os.listdir(saved) if name.endswith(".tmp")]
    moelora_ops.save_adapter(adapted(3), saved)
    assert_bitwise(moelora_ops.load_adapter(bare(), saved), adapted(3))
    assert len(os.listdir(saved)) == 2


def test_a_first_save_that_fails_leaves_no_adapter(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        moelora_ops.save_adapter(adapted(), tmp_path / "new")
    with pytest.raises(FileNotFoundError, match=r"has no adapter\.json"):
        moelora_ops.load_adapter(bare(), tmp_path / "new")


def refused(path, error, message, model=None, **kwargs):
    """Loading raises and changes nothing, in a bare model or the given one."""
    for target in (bare(), adapted(2)) if model is None else (model,):
        before = snapshot(target)
        with pytest.raises(error, match=message):
            moelora_ops.load_adapter(target, path, **kwargs)
        assert snapshot(target) == before


def test_missing_files(saved):
    refused(saved / "none", FileNotFoundError, "dir: wanted a directory with an adapter")
    refused(saved / "adapter.json", FileNotFoundError, "dir: wanted a directory with an adapter")
    weights_file(saved).unlink()
    refused(saved, FileNotFoundError, "the weights file that .* names is missing")
    (saved / "adapter.json").unlink()
    refused(saved, FileNotFoundError, r"dir: .* has no adapter\.json")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.7, 0.999])
def test_truncated_weights(saved, share):
    path = weights_file(saved)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    refused(saved, ValueError, f"wanted {len(data)} bytes, got {int(share * len(data))}")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.999])
def test_corrupted_weights(saved, share):
    path = weights_file(saved)
    data = bytearray(path.read_bytes())
    data[int(share * len(data))] ^= 1
    path.write_bytes(data)
    refused(saved, ValueError, "does not match its sha256; the file is corrupted")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.7, 0.999])
def test_truncated_index(saved, share):
    path = saved / "adapter.json"
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    refused(saved, ValueError, "adapter.json: is no json")


def _set(*path_and_value):
    *path, last, value = path_and_value

    def change(content):
        for key in path:
            content = content[key]
        content[last] = value

    return change


ARGUMENTS = ("modules", "layers.0.q_proj", "arguments")


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("wanted format version 1 to 2, got 3, written by moelora_ops", _set("format_version", 3)),
        ("wanted format version 1 to 2, got '2'", _set("format_version", "2")),
        ("is no index of an adapter", _set("format", "peft")),
        ("wanted modules to be of type dict", _set("modules", None)),
        ("modules is empty", _set("modules", {})),
        ("wanted weights to be of type dict", _set("weights", "adapter.safetensors")),
        ("wanted a weights file of this directory, got '../x'", _set("weights", "file", "../x")),
        ("wanted bytes to be of type int", _set("weights", "bytes", None)),
        ("wanted a method of .*'mola'.*, got 'unheard-of'",
         _set("modules", "layers.0.q_proj", "method", "unheard-of")),
        ("arguments of layers.0.q_proj: rank: wanted an int of at least 1, got 0",
         _set(*ARGUMENTS, "rank", 0)),
        ("arguments of layers.0.q_proj: top_k: wanted an int in 1..num_experts=2, got 3",
         _set(*ARGUMENTS, "top_k", 3)),
        ("arguments of layers.0.q_proj: num_experts: wanted one int",
         _set(*ARGUMENTS, "num_experts", "24")),
        ("arguments of layers.0.q_proj: heads is unknown", _set(*ARGUMENTS, "heads", 1)),
        ("arguments of layers.0.q_proj: alpha is missing",
         lambda content: content["modules"]["layers.0.q_proj"]["arguments"].pop("alpha")),
        ("does not describe its weights file: layers.0.q_proj.router: wanted .*5.*, got .*2, 4",
         _set("modules", "layers.0.q_proj", "tensors", "router", [2, 5])),
    ],
)  # fmt: skip
def test_a_bad_index(saved, message, change):
    edit_index(saved, change)
    refused(saved, ValueError, message)


def test_an_index_that_is_a_list(saved):
    (saved / "adapter.json").write_text("[1]")
    refused(saved, ValueError, "is no index of an adapter")


@pytest.mark.parametrize(
    ("message", "build"),
    [
        (r"layers.0.o_proj: wanted .*'lora_down': \[2, 2, 5\].*, got .*'lora_down': \[2, 2, 7\]",
         lambda: bare(width=6)),
        ("layers.1.o_proj is missing; layers.1.q_proj is missing", lambda: bare(depth=1)),
        ("layers.2.o_proj is not in the file",
         lambda: adapted(config=MoLAConfig([2, 3, 3], rank=2), depth=3)),
        ("layers.0.q_proj: wanted .*'alpha': 3.0.*, got .*'alpha': 4.0",
         lambda: adapted(config=MoLAConfig(**{**vars(CONFIG), "alpha": 4.0}))),
        (r"'num_experts': 2.* got .*'num_experts': 3",
         lambda: adapted(config=MoLAConfig(**{**vars(CONFIG), "num_experts": [3, 3]}))),
    ],
)  # fmt: skip
def test_an_adapter_of_another_model(saved, message, build):
    refused(
        saved, ValueError, f"model: the adapter in .* is of another model: .*{message}", build()
    )


def test_a_few_of_many_differences_are_shown(tmp_path):
    moelora_ops.save_adapter(adapted(config=MoLAConfig(2), depth=5), tmp_path)
    refused(tmp_path, ValueError, "layers.2.o_proj is missing; and 5 more$", Toy(depth=0))


def test_models_without_values(saved):
    with pytest.raises(ValueError, match="model: has no adapters to save"):
        moelora_ops.save_adapter(bare(), saved)
    meta = adapted().to("meta")
    with pytest.raises(ValueError, match=r"model: layers.0.q_proj.lora_down is on the meta device"):
        moelora_ops.save_adapter(meta, saved)
    assert_bitwise(moelora_ops.load_adapter(bare(), saved), adapted())  # still the first
    refused(saved, ValueError, r"model: layers.0.q_proj is on the meta device", meta)
    refused(saved, ValueError, r"model: layers.0.q_proj is on the meta device", bare().to("meta"))


def test_bad_arguments(saved):
    refused(saved, ValueError, "implementation: wanted one of", bare(), implementation="quick")
    refused(saved, ValueError, "dtype: wanted None or one of", bare(), dtype=torch.int8)


@pytest.mark.parametrize("function", [moelora_ops.save_adapter, moelora_ops.load_adapter])
def test_without_safetensors_the_message_says_what_to_install(tmp_path, monkeypatch, function):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("safetensors"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'moelora-ops\[adapters\]'"):
        function(adapted(), tmp_path)
