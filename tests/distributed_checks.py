"""What two processes check together; test_distributed.py starts them and reports.

A check is a function of the rank that raises where something is wrong.  Its model is the same in
both processes and in the single one that it is compared with; rank r trains on half r of a batch.
"""

import contextlib
import datetime
import json
import re
import sys
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import moelora_ops
from moelora_ops.companions import plain_name
from moelora_ops.models import adapted_layers
from moelora_ops.nn import LoRA, MoLALinear
from moelora_ops.sharded import is_sharded

PAGE = Path(__file__).parent.parent / "docs" / "distributed.md"
DTYPE = torch.float64
VOCABULARY = 24


def random(*shape, seed, dtype=DTYPE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


IDS = torch.randint(VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(1))
SCORES = random(4, 4, seed=2)
TASKS = torch.tensor([0, 1, 1, 0])
BOTH = slice(0, 4)


def half(rank):
    return slice(2 * rank, 2 * rank + 2)


# ---------------------------------------------------------------- models


def llama(config=None, dtype=DTYPE):
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    return adapt(transformers.LlamaForCausalLM(shape).to(dtype).train(), config)


def adapt(model, config):
    """With adapters that do something."""
    if config is not None:
        moelora_ops.apply(model, config)
        for i, parameter in enumerate(moelora_ops.adapter_parameters(model)):
            value = random(*parameter.shape, seed=100 + i)
            with torch.no_grad():
                parameter.copy_(0.3 * value)
    return model


def mole(gates):
    modules = llama().model.named_modules(prefix="model")
    linears = [(name, module) for name, module in modules if isinstance(module, nn.Linear)]
    adapters = [
        {
            name: LoRA(
                0.3 * random(rank, m.in_features, seed=10 * i + rank),
                0.3 * random(m.out_features, rank, seed=10 * i + rank + 5), 1.0,
            )
            for i, (name, m) in enumerate(linears)
        }
        for rank in (1, 2)
    ]  # fmt: skip
    return moelora_ops.MoLEConfig(adapters, gates)


MOLA = moelora_ops.MoLAConfig(num_experts=3, rank=2, top_k=2)
CONFIGS = {
    "mola": lambda: MOLA,
    "lora": lambda: moelora_ops.LoRAConfig(rank=2),
    "mor1e": lambda: moelora_ops.MoR1EConfig(rank_down=2, rank_up=2),
    "mole": lambda: mole("matrix"),
    "mole, shared": lambda: mole("layer"),
    "orchmoe": lambda: moelora_ops.OrchMoEConfig(num_skills=3, num_tasks=2, rank=2),
    "polytropon": lambda: moelora_ops.PolytroponConfig(num_skills=3, num_tasks=2, rank=2),
}


def make(method, dtype=DTYPE):
    return llama(CONFIGS[method](), dtype)


def backward(model, method, part, auxiliary=0.1):
    """The loss of a part of the batch, and its gradients in `model`."""
    torch.manual_seed(part.start)  # of the noise of tasks
    context = contextlib.nullcontext()
    if method == "mor1e":
        context = moelora_ops.intuition(model, SCORES[part])
    elif method == "polytropon":
        context = moelora_ops.task_ids(model, TASKS[part])
    ids = IDS[part]
    with context:
        logits = model(input_ids=ids).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    if method == "mola" and auxiliary:
        loss = loss + moelora_ops.aux_loss(model, auxiliary)
    elif method.startswith("mole"):
        loss = loss + moelora_ops.gating_balance_loss(model, auxiliary)
    loss.backward()
    return loss.detach()


def of(method):
    """What :func:`mean_of_halves` takes."""
    return lambda: make(method), lambda model, part: backward(model, method, part)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(model):
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    missing = [n for n, p in trained.items() if p.grad is None]
    assert not missing, f"without gradients: {missing}"
    return {plain_name(n): whole(p.grad) for n, p in trained.items()}


def values(model):
    return {n: whole(p).detach() for n, p in model.named_parameters()}


def assert_equal(got, want, **tolerance):
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    for name in want:
        torch.testing.assert_close(
            got[name], want[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )


def mean_of_halves(build, run):
    """The loss of each half and the mean of its gradients, in single processes."""
    losses, means = [], {}
    for rank in (0, 1):
        model = build()
        losses.append(run(model, half(rank)))
        for name, gradient in gradients(model).items():
            wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            means[name] = means.get(name, 0) + wide / 2
    return losses, means


def shard(model, **options):
    for block in model.model.layers:
        fully_shard(block, reshard_after_forward=True, **options)
    return fully_shard(model, **options)


def checkpointed(model, reentrant):
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
    return model


def raises(kind, message, function):
    try:
        function()
    except kind as error:
        assert re.search(message, str(error)), f"wanted {message!r}, got {error}"
    else:
        raise AssertionError(f"wanted {kind.__name__}: {message}")


@contextlib.contextmanager
def shared_directory(rank):
    """A directory of both processes; each waits for the other when it enters and leaves."""
    with tempfile.TemporaryDirectory() as own:
        name = [own]
        dist.broadcast_object_list(name)
        yield Path(name[0])
        dist.barrier()


def run_snippet(title, model, part, **names):
    """The code under a heading of docs/distributed.md; returns what it knows by name."""
    section = PAGE.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.S)
    batch = {"input_ids": IDS[part], "labels": IDS[part]}
    torch.manual_seed(3)  # of the new parameters
    names |= {"torch": torch, "moelora_ops": moelora_ops, "model": model}
    names |= {"config": MOLA, "batch": batch}
    exec(code, names)
    return names


def step_of_the_page(build):
    """The adapter after the step that the page makes, in single processes."""

    def run(model, part):
        loss = model(input_ids=IDS[part], labels=IDS[part]).loss + moelora_ops.aux_loss(model)
        loss.backward()

    def initial():
        model = build()
        torch.manual_seed(3)
        return moelora_ops.apply(model, MOLA)

    _, means = mean_of_halves(lambda: to_low(initial()), run)
    model = initial()
    for name, parameter in model.named_parameters():
        parameter.grad = means.get(name)
    torch.optim.AdamW(moelora_ops.adapter_parameters(model), lr=3e-4).step()
    return values(model)


def to_low(model):
    """Float32 parameters in bfloat16, as a mixed precision policy has them; buffers stay."""
    for parameter in model.parameters():
        if parameter.dtype == torch.float32:
            parameter.data = parameter.data.bfloat16()
    return model


# ---------------------------------------------------------------- data parallel


def check_data_parallel(rank):
    for method in CONFIGS:
        losses, want = mean_of_halves(
            lambda m=method: make(m), lambda x, p, m=method: backward(x, m, p)
        )
        modes = [(True, {})]  # reentrant checkpointing, the hardest
        if method == "mola":
            modes += [(None, {}), (False, {}), (True, {"static_graph": True})]
        for reentrant, options in modes:
            model = checkpointed(make(method), reentrant)
            parallel = DistributedDataParallel(model, **options)
            for _ in range(2):  # the first iteration builds buckets
                parallel.zero_grad()
                loss = backward(parallel, method, half(rank))
                torch.testing.assert_close(loss, losses[rank])
                assert_equal(gradients(model), want)


def check_halves_are_the_whole_batch(rank):
    single = make("mola")
    want = backward(single, "mola", BOTH, auxiliary=0)
    for wrap in (DistributedDataParallel, shard):
        model = make("mola")
        loss = backward(wrap(model), "mola", half(rank), auxiliary=0)
        dist.all_reduce(loss)
        torch.testing.assert_close(loss / 2, want)
        assert_equal(gradients(model), gradients(single))


def check_accumulated_gradients(rank):
    def run(model, part, first=contextlib.nullcontext):
        with first():
            backward(model, "mola", slice(part.start, part.start + 1))
        return backward(model, "mola", slice(part.start + 1, part.stop))

    @contextlib.contextmanager
    def without_reducing():
        sharded.set_requires_gradient_sync(False)
        yield
        sharded.set_requires_gradient_sync(True)

    losses, want = mean_of_halves(lambda: make("mola"), run)
    parallel, sharded = DistributedDataParallel(make("mola")), shard(make("mola"))
    for model, first in ((parallel, parallel.no_sync), (sharded, without_reducing)):
        torch.testing.assert_close(run(model, half(rank), first), losses[rank])
        assert_equal(gradients(getattr(model, "module", model)), want)


def check_fused_before_it_is_wrapped(rank):
    losses, want = mean_of_halves(*of("mola"))
    for wrap in (DistributedDataParallel, shard):
        model = llama()
        moelora_ops.apply(model, MOLA, implementation="reference")
        model.load_state_dict(make("mola").state_dict())
        wrapped = wrap(moelora_ops.fuse(model))
        torch.testing.assert_close(backward(wrapped, "mola", half(rank)), losses[rank])
        assert_equal(gradients(model), want)


def check_experts_that_no_token_chose(rank):
    """Their gradients are zeros and not missing, so that DDP's reducer finds all it waits for."""
    model = llama(moelora_ops.MoLAConfig(num_experts=8, rank=2, top_k=1))
    parallel = DistributedDataParallel(model)
    for _ in range(2):
        parallel.zero_grad()
        loss = parallel(input_ids=IDS[:1, :2]).logits.square().sum()
        loss.backward()
    for layer in adapted_layers(model):
        unused = layer.module.routing.counts == 0
        assert unused.any()
        assert layer.module.lora_up.grad[~unused].any()
        assert not layer.module.lora_up.grad[unused].any()


def check_buffers_that_are_broadcast_between_two_forward_calls(rank):
    """DDP overwrites buffers by rank 0's before a call; backward may still need the old ones."""
    single, model = make("mole"), make("mole")
    parallel = DistributedDataParallel(model)
    for m in (single, parallel):
        torch.stack([m(input_ids=IDS[half(i)]).logits for i in (0, 1)]).sin().sum().backward()
    assert_equal(gradients(model), gradients(single))


def check_dropout_masks_differ_by_seed(rank):
    layer = MoLALinear(nn.Linear(8, 8), 2, rank=2, dropout=0.5)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(random(*parameter.shape, seed=parameter.dim(), dtype=torch.float32))
    x = random(5, 8, seed=4, dtype=torch.float32)
    for offset, alike in ((0, True), (rank, False)):
        torch.manual_seed(7 + offset)
        y = layer(x).detach()
        of_rank_0 = y.clone()
        dist.broadcast(of_rank_0, 0)
        assert torch.equal(y, of_rank_0) == (alike or rank == 0)


# ---------------------------------------------------------------- FSDP2


def check_sharded(rank):
    for method in CONFIGS:
        losses, want = mean_of_halves(
            lambda m=method: make(m), lambda x, p, m=method: backward(x, m, p)
        )
        single = make(method)
        for name, parameter in single.named_parameters():
            parameter.grad = want.get(name)
        torch.optim.SGD(moelora_ops.adapter_parameters(single), lr=1.0).step()
        for reentrant in (None, False, True) if method == "mola" else (True,):
            model = shard(checkpointed(make(method), reentrant))
            optimizer = torch.optim.SGD(moelora_ops.adapter_parameters(model), lr=1.0)
            for _ in range(2):
                optimizer.zero_grad()
                torch.testing.assert_close(backward(model, method, half(rank)), losses[rank])
                assert_equal(gradients(model), want)
            optimizer.step()
            assert_equal(values(model), values(single))


def check_every_linear_a_unit(rank):
    losses, want = mean_of_halves(*of("mola"))
    model = make("mola")
    for layer in list(adapted_layers(model)):
        fully_shard(layer.module.base)
        fully_shard(layer.module)
    shard(model)
    torch.testing.assert_close(backward(model, "mola", half(rank)), losses[rank])
    assert_equal(gradients(model), want)


def check_sharded_in_bfloat16(rank):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for method in ("mola", "lora", "mor1e", "orchmoe", "polytropon"):
        losses, want = mean_of_halves(
            lambda m=method: to_low(make(m, torch.float32)), of(method)[1]
        )
        model = shard(make(method, torch.float32), mp_policy=policy)
        torch.testing.assert_close(backward(model, method, half(rank)), losses[rank])
        got = gradients(model)
        assert all(g.dtype == torch.float32 for g in got.values())
        assert_equal(got, want)


def check_mole_in_bfloat16(rank):
    """A base of 16 bits and gates of 32 in one unit."""
    losses, want = mean_of_halves(lambda: make("mole", torch.bfloat16), of("mole")[1])
    model = shard(make("mole", torch.bfloat16))
    torch.testing.assert_close(backward(model, "mole", half(rank)), losses[rank])
    assert_equal(gradients(model), want)


def check_what_mole_keeps(rank):
    """P is made anew after a step, what follows from the experts is not."""
    model, single = shard(make("mole")), make("mole")
    known = {}
    for m in (model, single):
        with torch.no_grad():
            m(input_ids=IDS)
        known[m] = [layer.module.derived() for layer in adapted_layers(m)]
        backward(m, "mole", BOTH)
        torch.optim.SGD(moelora_ops.adapter_parameters(m), lr=5.0).step()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, single(input_ids=IDS).logits)
    for m, before in known.items():
        assert all(x.module.derived() is b for x, b in zip(adapted_layers(m), before, strict=True))


def check_files_of_sharded_models(rank):
    for method in CONFIGS:
        single = make(method)
        model, other = shard(make(method)), make(method)
        with torch.no_grad():
            for parameter in moelora_ops.adapter_parameters(other):
                parameter.add_(1)
        shard(other)
        if method == "orchmoe":
            # After a forward pass alone the root, with the task routers, has its parameters whole.
            for m in (model, other):
                with torch.no_grad():
                    m(input_ids=IDS)
                assert not is_sharded(m.moelora_companions["task_routers"].routers[0].weight)
        with shared_directory(rank) as directory, tempfile.TemporaryDirectory() as own:
            moelora_ops.save_adapter(model, directory / str(rank))
            moelora_ops.save_adapter(single, own)
            dist.barrier()
            assert [path.name for path in directory.iterdir()] == ["0"]  # the first one writes
            files = {path.name: path.read_bytes() for path in (directory / "0").iterdir()}
            assert files == {path.name: path.read_bytes() for path in Path(own).iterdir()}
            assert moelora_ops.load_adapter(other, directory / "0") is other
            other.reshard()  # as the next backward pass will do
            assert_equal(values(other), values(single), rtol=0, atol=0)


def check_wrapped_blocks(rank):
    """Wrappers of checkpoints show in the names of modules, and not in files."""
    losses, want = mean_of_halves(*of("mola"))
    model = make("mola")
    for i, block in enumerate(model.model.layers):
        model.model.layers[i] = checkpoint_wrapper(block)
    shard(model)
    torch.testing.assert_close(backward(model, "mola", half(rank)), losses[rank])
    assert_equal(gradients(model), want)
    with shared_directory(rank) as directory:
        moelora_ops.save_adapter(model, directory)
        dist.barrier()
        got = moelora_ops.load_adapter(llama(), directory)
        assert_equal(values(got), values(make("mola")), rtol=0, atol=0)


def check_an_encoder_outside_of_the_units(rank):
    """MoR1E's, which is called before the model, and FSDP2 wants the root to be first."""
    centroids = random(3, 5, seed=6, dtype=torch.float32)
    config = moelora_ops.MoR1EConfig(2, 2, centroids=centroids, learned_map=True)

    def run(model, part, encode=None):
        encode = encode or model.moelora_companions["encoder"]
        with moelora_ops.intuition(model, encode(random(4, 5, seed=8)[part])):
            loss = model(input_ids=IDS[part]).logits.sin().mean()
        loss.backward()
        return loss.detach()

    losses, want = mean_of_halves(lambda: llama(config), run)
    model = llama(config)
    encoder = model.moelora_companions["encoder"]
    encode = DistributedDataParallel(encoder)
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model, ignored_params=set(encoder.parameters()))
    torch.testing.assert_close(run(model, half(rank), encode), losses[rank])
    assert_equal(gradients(model), want)
    with shared_directory(rank) as directory:
        moelora_ops.save_adapter(model, directory)
        dist.barrier()
        assert_equal(values(moelora_ops.load_adapter(llama(), directory)), values(llama(config)))


def check_new_values_of_sharded_layers(rank):
    """reset_parameters writes to the parameters, and not to copies of their slices."""
    layer = fully_shard(MoLALinear(nn.Linear(8, 8, device="meta"), 3, rank=2))
    layer.to_empty(device="cpu")
    with torch.no_grad():
        layer.lora_down.fill_(7)
        layer.lora_up.fill_(7)
    layer.reset_parameters()
    down = layer.lora_down.full_tensor()
    assert 0.5 * 8**-0.5 < down.abs().max() <= 8**-0.5
    assert not layer.lora_up.full_tensor().any()


# ---------------------------------------------------------------- PEMT, on T5


def t5():
    torch.manual_seed(0)
    shape = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=8, d_ff=12, d_kv=4, num_layers=1, num_heads=2,
        dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(shape).to(DTYPE).train()


def pemt_sources(wrap=lambda model: model):
    configs = [moelora_ops.PEMTSourceConfig([5, 6 + i], rank=1 + i, alpha=2.0) for i in (0, 1)]
    return [moelora_ops.pemt_source(wrap(adapt(t5(), config))) for config in configs]


def pemt(sources):
    return adapt(t5(), moelora_ops.PEMTConfig(sources, [7, 8], dropout=0.0))


def pemt_backward(model, part):
    labels = IDS[part].flip(1)
    logits = model(input_ids=IDS[part], labels=labels).logits
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss = loss + moelora_ops.task_sparsity_loss(model, 1.0)
    loss.backward()
    return loss.detach()


def shard_t5(model):
    for stack in (model.encoder, model.decoder):
        for block in stack.block:
            fully_shard(block, reshard_after_forward=True)
    return fully_shard(model)


def check_pemt(rank):
    given = pemt_sources()
    for source, other in zip(given, pemt_sources(shard_t5), strict=True):
        assert torch.equal(source.prompt, other.prompt)
        for name, expert in source.experts.items():
            for one, two in zip(expert, other.experts[name], strict=True):
                assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two
    losses, want = mean_of_halves(lambda: pemt(given), pemt_backward)
    single = pemt(given)
    for name, parameter in single.named_parameters():
        parameter.grad = want.get(name)
    torch.optim.SGD(moelora_ops.adapter_parameters(single), lr=0.1).step()
    with tempfile.TemporaryDirectory() as own:
        moelora_ops.save_adapter(single, own)
        model = shard_t5(pemt(given))
        with torch.no_grad():
            model(input_ids=IDS, labels=IDS)
        moelora_ops.load_adapter(model, own)
        model.reshard()  # as the next backward pass will do
        assert_equal(values(model), values(single), rtol=0, atol=0)
    for wrap in (DistributedDataParallel, shard_t5):
        model = pemt(given)
        wrapped = wrap(model)
        torch.testing.assert_close(pemt_backward(wrapped, half(rank)), losses[rank])
        assert_equal(gradients(model), want)
        torch.optim.SGD(moelora_ops.adapter_parameters(wrapped), lr=0.1).step()
        with shared_directory(rank) as directory:
            if wrap is shard_t5 or rank == 0:
                moelora_ops.save_adapter(wrapped, directory)
            dist.barrier()
            # The norms that are trained are the model's own.
            assert_equal(values(moelora_ops.load_adapter(t5(), directory)), values(single))


# ---------------------------------------------------------------- tensor parallel


def check_the_page_on_tensor_parallel(rank):
    mesh = init_device_mesh("cpu", (2,))
    names = run_snippet("Tensor parallel", llama(), BOTH, mesh=mesh)
    for method in ("mola", "mor1e", "mole", "mole, shared", "orchmoe"):
        single, model = make(method), make(method)
        for block in model.model.layers:
            parallelize_module(block, mesh, names["plan"])
        shapes = []
        block = model.model.layers[0]
        block.self_attn.q_proj.register_forward_hook(lambda m, x, y, s=shapes: s.append(y.shape))
        block.mlp.down_proj.base.register_forward_hook(lambda m, x, y, s=shapes: s.append(y.shape))
        want = backward(single, method, BOTH)
        torch.testing.assert_close(backward(model, method, BOTH), want)
        assert shapes == [(4, 6, 8), (4, 6, 16)]  # two heads of four, all features
        got, want = gradients(model), gradients(single)
        assert_equal(got, want)
        for gradient in got.values():
            of_rank_0 = gradient.clone()
            dist.broadcast(of_rank_0, 0)
            assert torch.equal(gradient, of_rank_0)
    with shared_directory(rank) as directory:
        if rank == 0:
            moelora_ops.save_adapter(names["model"], directory)
        dist.barrier()
        assert moelora_ops.load_adapter(llama(), directory)


def check_bases_that_were_split_before(rank):
    mesh = init_device_mesh("cpu", (2,))
    styles = {
        "self_attn.q_proj": ColwiseParallel(output_layouts=Replicate()),
        "mlp.down_proj": RowwiseParallel(input_layouts=Replicate()),
    }
    single, model = make("mola"), llama()
    for block in model.model.layers:
        parallelize_module(block, mesh, styles)
    adapt(model, MOLA)
    want = backward(single, "mola", BOTH)
    torch.testing.assert_close(backward(model, "mola", BOTH), want)
    assert_equal(gradients(model), gradients(single))


def check_parts_of_features_are_refused(rank):
    mesh = init_device_mesh("cpu", (2,))
    x = random(3, 8, seed=5, dtype=torch.float32)
    for style, given, message in (
        (ColwiseParallel(), x, "base: wanted an output of 6 features, got 3; if it is tensor"),
        (
            RowwiseParallel(),
            x[:, :4],
            "x: wanted last dimension 8, got 4; if it is tensor",
        ),
    ):
        layer = MoLALinear(nn.Linear(8, 6), 3, rank=2)
        parallelize_module(layer, mesh, {"base": style})
        raises(ValueError, message, lambda f=layer, x=given: f(x))


# ---------------------------------------------------------------- what is refused


def check_sharded_tensors_reach_no_kernel(rank):
    mesh = init_device_mesh("cpu", (2,))
    plain = MoLALinear(nn.Linear(8, 6), 3, rank=2)
    x = random(4, 8, seed=5, dtype=torch.float32)
    for placement in (Replicate(), Shard(0), Shard(1)):
        sharded = distribute_tensor(x, mesh, [placement])
        raises(TypeError, "x: wanted a plain tensor, got a DTensor", lambda s=sharded: plain(s))
    model = fully_shard(nn.Sequential(plain))
    raises(TypeError, "lora_down: wanted a plain tensor, got a DTensor", lambda: plain(x))
    model(x)


def check_wrapped_models_take_no_new_parameters(rank):
    functions = {
        "apply": lambda model: moelora_ops.apply(model, MOLA),
        "fuse": moelora_ops.fuse,
    }
    wrappers = {"DistributedDataParallel": DistributedDataParallel, "fully_shard": fully_shard}
    with shared_directory(rank) as directory:
        if rank == 0:
            moelora_ops.save_adapter(llama(MOLA), directory)
        dist.barrier()
        functions["load its adapter"] = lambda model: moelora_ops.load_adapter(model, directory)
        for wrapper, wrap in wrappers.items():
            model = wrap(llama())
            for what, function in functions.items():
                message = f"model: is under {wrapper}, .* new parameters; {what} before it"
                raises(ValueError, message, lambda f=function, m=model: f(m))
    flat = nn.Module()
    flat.inner = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(flat.inner)
    for function in (moelora_ops.save_adapter, moelora_ops.load_adapter):
        raises(ValueError, "inner is wrapped by FullyShardedDataParallel",
               lambda f=function: f(flat, "nowhere"))  # fmt: skip


# ---------------------------------------------------------------- the page


def check_the_page_on_data_parallel(rank):
    with shared_directory(rank) as directory:
        run_snippet("Data parallel", llama(), half(rank), directory=directory)
        dist.barrier()
        got = values(moelora_ops.load_adapter(llama(), directory))
    assert_equal(got, step_of_the_page(llama))


def check_the_page_on_sharding(rank):
    def build():
        return llama(dtype=torch.float32)

    with shared_directory(rank) as directory:
        run_snippet("Sharded: FSDP2", build(), half(rank), directory=directory)
        dist.barrier()
        got = values(moelora_ops.load_adapter(build(), directory))
    assert_equal(got, step_of_the_page(build))


CHECKS = {name.removeprefix("check_"): f for name, f in globals().items() if "check_" in name}


def main(rank, folder, names):
    """Runs checks until one fails; leaves their errors in folder/<rank>.json."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    errors = {}
    for name in names:
        try:
            CHECKS[name](rank)
            dist.barrier()
            errors[name] = ""
        except Exception:
            errors[name] = traceback.format_exc()
            break  # the processes no longer are at the same place
    (Path(folder) / f"{rank}.json").write_text(json.dumps(errors))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
