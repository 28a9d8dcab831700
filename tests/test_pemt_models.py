"""PEMT on T5-type models: against plain T5, both stages, files, checkpoints, generation."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moelora_ops
from moelora_ops import reference
from moelora_ops.nn import PEMTLinear

transformers = pytest.importorskip("transformers")
PROMPTS = ([5, 6], [7, 8, 9], [10])
TARGET = [11, 12, 13, 14]
KINDS = ["lora", "adapter"]


def tiny_t5(**options):
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, **options,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


def batch():
    random = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 40, (3, 7), generator=random)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    labels = torch.randint(2, 40, (3, 5), generator=random)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def source_model(e, kind="lora", implementation="fused", **options):
    model = tiny_t5(**options)
    config = moelora_ops.PEMTSourceConfig(PROMPTS[e], rank=2 + e, alpha=3.0, kind=kind)
    return moelora_ops.apply(model, config, implementation=implementation)


def sources(kind="lora", **options):
    found = []
    for e in range(len(PROMPTS)):
        model = source_model(e, kind, **options)
        torch.manual_seed(20 + e)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.normal_(std=0.3)
        found.append(moelora_ops.pemt_source(model))
    return found


def target_model(kind="lora", implementation="fused", gates=True, t5=None, **options):
    """Stage 2 with gates and adapters that do something."""
    model = tiny_t5(**(t5 or {}))
    config = moelora_ops.PEMTConfig(sources(kind, **(t5 or {})), TARGET, dropout=0.0, **options)
    model = moelora_ops.apply(model, config, implementation=implementation)
    torch.manual_seed(9)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if ".adapter." in name or (gates and name.endswith(".gate")):
                p.normal_(std=0.3)
    return model.train()


def gradients(model, **kwargs):
    """Loss with the task sparsity loss, and every gradient by name."""
    model.zero_grad()
    output = model(**batch(), **kwargs)
    loss = output.loss + moelora_ops.task_sparsity_loss(model, 1.0)
    loss.backward()
    named = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), "logits": output.logits.detach(), **named}


def assert_all_close(got, want, **tolerances):
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(
            got[name], want[name], msg=lambda m, n=name: f"{n}: {m}", **tolerances
        )


def feed_forward_linears(model):
    return {n: m for n, m in model.named_modules() if n.endswith("DenseReluDense.wo")}


@torch.no_grad()
def plain_logits(model, merged, prompt):
    """Of an untouched T5 whose W_o are `merged` and whose input has `prompt` before it."""
    for name, weight in merged.items():
        model.get_submodule(name).weight.copy_(weight)
    inputs = batch()
    ids, mask, labels = inputs["input_ids"], inputs["attention_mask"], inputs["labels"]
    embeds = torch.cat([prompt.expand(len(ids), -1, -1), model.shared(ids)], 1)
    mask = torch.cat([torch.ones(len(ids), len(prompt), dtype=mask.dtype), mask], 1)
    return model(inputs_embeds=embeds, attention_mask=mask, labels=labels).logits


def test_stage_1_is_plain_t5_with_merged_weights_and_a_prompt():
    model = source_model(1)
    start = tiny_t5().shared.weight[torch.tensor(PROMPTS[1])]
    assert torch.equal(model.moelora_companions["prompt"].target, start)
    merged = {
        name: layer.base.weight + 3.0 / 3 * layer.lora_up[0].T @ layer.lora_down[0]
        for name, layer in feed_forward_linears(model).items()
    }
    assert len(merged) == 4
    want = plain_logits(tiny_t5(), merged, start)
    torch.testing.assert_close(model(**batch()).logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("t5", [{}, {"feed_forward_proj": "gated-gelu"}], ids=["t5", "v1.1"])
def test_at_the_start_stage_2_is_plain_t5_with_the_uniform_average(t5):
    """Gates start at zero: every source has weight 1/3, so the experts merge into W_o."""
    model = target_model(gates=False, reduction=None, t5=t5)
    given = sources(**t5)
    merged = {
        name: layer.base.weight
        + sum(s.experts[name].scale * s.experts[name].up @ s.experts[name].down for s in given) / 3
        for name, layer in feed_forward_linears(model).items()
    }
    target = tiny_t5(**t5).shared.weight[torch.tensor(TARGET)]
    prompt = reference.combine_prompts(target, [s.prompt for s in given])
    want = plain_logits(tiny_t5(**t5), merged, prompt)
    torch.testing.assert_close(model(**batch()).logits, want, rtol=1e-4, atol=1e-4)
    weights = moelora_ops.source_weights(model)
    assert list(weights) == list(merged)
    for of_layer in weights.values():
        torch.testing.assert_close(of_layer, torch.full((3,), 1 / 3))


@pytest.mark.parametrize("kind", KINDS)
def test_gates_see_the_prompt_in_the_activation_and_in_the_encoders_output(kind):
    model = target_model(kind)
    seen = {}
    handles = [
        layer.register_forward_pre_hook(lambda m, args, n=name: seen.setdefault(n, args[0]))
        for name, layer in feed_forward_linears(model).items()
    ]
    output = model(**batch())
    for handle in handles:
        handle.remove()
    assert output.encoder_last_hidden_state.shape[1] == len(TARGET) + 7
    for name, layer in feed_forward_linears(model).items():
        states = seen[name] if "encoder" in name else output.encoder_last_hidden_state
        query = states[:, : len(TARGET)].mean(1)
        want = (query @ layer.gate.T).softmax(-1)
        torch.testing.assert_close(layer.agreement.weights, want)
        assert want.std(0).max() > 0  # from sequence to sequence, not from task to task


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_model_is_the_literal_one_and_fuse_makes_it(kind):
    want = gradients(target_model(kind, "reference"))
    assert_all_close(gradients(target_model(kind)), want, rtol=1e-3, atol=1e-4)
    fused = moelora_ops.fuse(target_model(kind, "reference"))
    assert all(type(m) is PEMTLinear for m in feed_forward_linears(fused).values())
    assert_all_close(gradients(fused), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing(kind):
    model = target_model(kind)
    want = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_all_close(gradients(model, use_cache=False), want)
    # A recomputed layer has left nothing behind.
    for layer in feed_forward_linears(model).values():
        assert layer.encoder_states is None and layer.ffn_input is None


@pytest.mark.parametrize("kind", KINDS)
def test_reentrant_checkpointing_without_the_sparsity_loss(kind):
    def gradients(model):
        model.zero_grad()
        model(**batch(), use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    model = target_model(kind)
    want = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    assert_all_close(gradients(model), want)
    with pytest.raises(RuntimeError, match=r"ran without a graph in training mode\. Checkpoint"):
        moelora_ops.task_sparsity_loss(model)
    with torch.no_grad():
        assert moelora_ops.task_sparsity_loss(model) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_a_cache(kind):
    model = target_model(kind).eval()
    inputs = {name: batch()[name] for name in ("input_ids", "attention_mask")}
    want = inputs | {"max_new_tokens": 6, "num_beams": 2, "do_sample": False}
    cached = model.generate(**want, use_cache=True)
    assert torch.equal(cached, model.generate(**want, use_cache=False))
    # And by hand, from an encoder output that is made once.
    encoded = model.encoder(**inputs)
    first = model(
        encoder_outputs=encoded, attention_mask=inputs["attention_mask"],
        decoder_input_ids=torch.zeros(3, 1, dtype=torch.long),
    )  # fmt: skip
    direct = model(**inputs, decoder_input_ids=torch.zeros(3, 1, dtype=torch.long))
    torch.testing.assert_close(first.logits, direct.logits)


def test_padding_changes_nothing_that_a_mask_keeps():
    model = target_model()
    short = {name: t[1:2, :4] for name, t in batch().items()}
    padded = {name: t.clone() for name, t in short.items()}
    padded["input_ids"] = F.pad(short["input_ids"], (0, 3), value=17)
    padded["attention_mask"] = F.pad(short["attention_mask"], (0, 3))
    values = []
    for inputs in (short, padded):
        loss = model(**inputs).loss
        sparsity = moelora_ops.task_sparsity_loss(model, attention_mask=inputs["attention_mask"])
        values.append((loss, sparsity))
    torch.testing.assert_close(values[1], values[0])
    everywhere = moelora_ops.task_sparsity_loss(model)
    assert abs(everywhere - values[1][1]) > 1e-4  # as the authors' code: padding included


def test_the_sparsity_loss_is_the_mean_over_layers():
    model = target_model()
    model(**batch())
    decoder_mask = torch.tensor([[1, 1, 1, 0, 0]] * 3)
    encoder_mask = F.pad(batch()["attention_mask"], (len(TARGET), 0), value=1).bool()
    terms = []
    for name, layer in feed_forward_linears(model).items():
        mask = encoder_mask if "encoder" in name else decoder_mask.bool()
        terms.append(reference.task_sparsity(layer.agreement, mask))
    got = moelora_ops.task_sparsity_loss(
        model, 0.1, attention_mask=batch()["attention_mask"], decoder_attention_mask=decoder_mask
    )
    torch.testing.assert_close(got, 0.1 * sum(terms) / 4)


def test_the_papers_parameter_counts():
    """T5-base, six sources of rank 64, bottleneck 48: what the authors' code trains and freezes."""
    config = transformers.T5Config(
        d_model=768, d_ff=3072, d_kv=64, num_layers=12, num_heads=12, vocab_size=32128
    )

    def t5_base():
        with torch.device("meta"):
            return transformers.T5ForConditionalGeneration(config)

    def trained(model, *parts):
        return sum(
            p.numel() for n, p in model.named_parameters()
            if p.requires_grad and any(part in n for part in parts)
        )  # fmt: skip

    length = 33
    model = moelora_ops.apply(t5_base(), moelora_ops.PEMTSourceConfig(list(range(length))))
    assert trained(model, ".lora_") == 5_898_240
    assert trained(model, "") == 5_898_240 + 768 * length
    source = moelora_ops.pemt_source(model)
    model = moelora_ops.apply(t5_base(), moelora_ops.PEMTConfig([source] * 6, list(range(length))))
    assert trained(model, ".gate") == 276_480
    assert trained(model, ".adapter.") == 1_789_056
    assert trained(model, "layer_norm") == 47_616
    assert trained(model, "") == 276_480 + 1_789_056 + 47_616 + 768 * length
    assert trained(model, ".lora_") == 0


def test_what_trains_in_which_stage():
    model = source_model(0)
    kinds = {n.split(".")[-1] for n, p in model.named_parameters() if p.requires_grad}
    assert kinds == {"lora_down", "lora_up", "target"}
    model = target_model()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    norms = [n for n in names if "layer_norm" in n]
    assert len(norms) == 2 * 2 + 2 * 3 + 2
    rest = {n.split("wo.")[-1] for n in names} - set(norms)
    adapter = {f"adapter.{n}" for n in ("down", "up", "down_bias", "up_bias")}
    assert rest == {"gate", *adapter, "moelora_companions.prompt.target"}
    frozen = moelora_ops.apply(
        tiny_t5(), moelora_ops.PEMTConfig(sources(), 2, train_norms=False, reduction=None)
    )
    rest = {n.split("wo.")[-1] for n, p in frozen.named_parameters() if p.requires_grad}
    assert rest == {"gate", "moelora_companions.prompt.target"}


def test_a_number_of_positions_starts_from_random_rows_of_the_vocabulary():
    model = moelora_ops.apply(tiny_t5(), moelora_ops.PEMTSourceConfig(5, rank=2))
    target, table = model.moelora_companions["prompt"].target, model.shared.weight
    assert target.shape == (5, 16)
    assert all((table == row).all(1).any() for row in target)


@pytest.mark.parametrize("kind", KINDS)
def test_both_stages_are_saved_and_loaded(kind, tmp_path):
    pytest.importorskip("safetensors")
    stage_1 = source_model(2, kind)
    moelora_ops.save_adapter(stage_1, tmp_path / "source")
    loaded = moelora_ops.load_adapter(tiny_t5(), tmp_path / "source").eval()
    assert torch.equal(loaded(**batch()).logits, stage_1(**batch()).logits)
    from_file, from_model = (moelora_ops.pemt_source(s) for s in (tmp_path / "source", stage_1))
    assert torch.equal(from_file.prompt, from_model.prompt)
    assert from_file.experts.keys() == from_model.experts.keys()
    for name, expert in from_file.experts.items():
        for got, want in zip(expert, from_model.experts[name], strict=True):
            assert torch.equal(got, want) if isinstance(got, torch.Tensor) else got == want

    model = target_model(kind)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    gradients(model)
    optimizer.step()  # moves the LayerNorms too
    moelora_ops.save_adapter(model, tmp_path / "target")
    for implementation in ("fused", "reference"):
        fresh = moelora_ops.load_adapter(
            tiny_t5(), tmp_path / "target", implementation=implementation
        )
        trained = {n for n, p in fresh.named_parameters() if p.requires_grad}
        assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
        difference = fresh.eval()(**batch()).logits - model.eval()(**batch()).logits
        assert difference.abs().max() < (1e-12 if implementation == "fused" else 1e-4)
    # Into a model that has the adapters already; what matters in training only may differ.
    other = target_model(kind, sparsity=False)
    other.moelora_companions["prompt"].dropout = 0.5
    moelora_ops.load_adapter(other, tmp_path / "target")
    assert torch.equal(other.eval()(**batch()).logits, model(**batch()).logits)


def test_a_copy_of_the_model_stands_alone():
    model = target_model()
    want = model(**batch()).logits
    copied = copy.deepcopy(model)
    with torch.no_grad():
        model.moelora_companions["prompt"].target.zero_()
        model.encoder.final_layer_norm.weight.zero_()
    assert torch.equal(copied(**batch()).logits, want)
    copied.encoder.final_layer_norm.weight.data.mul_(2)
    norms = copied.moelora_companions["norms"]
    index = norms.names.index("encoder.final_layer_norm.weight")
    own = norms.state_dict(keep_vars=True)[f"weights.{index}"]
    assert own is copied.encoder.final_layer_norm.weight


def test_stage_1_models_without_the_hooks_of_the_other_stage():
    """fuse attaches anew: prompts come once, not twice."""
    model = moelora_ops.fuse(source_model(1, implementation="reference"))
    assert model(**batch()).encoder_last_hidden_state.shape[1] == len(PROMPTS[1]) + 7


def test_positional_arguments_and_embeddings_reach_the_encoder():
    model = target_model().eval()
    ids, mask = batch()["input_ids"], batch()["attention_mask"]
    want = model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.equal(model.encoder(ids, mask).last_hidden_state, want)
    embeds = model.shared(ids)
    got = model.encoder(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    assert torch.equal(got, want)
    encoder_only = transformers.T5EncoderModel(model.config)
    one = moelora_ops.PEMTSourceConfig(2, rank=2)
    states = moelora_ops.apply(encoder_only, one)(ids).last_hidden_state
    assert states.shape[1] == 2 + ids.shape[1]


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("sources: wanted at least one", lambda: moelora_ops.PEMTConfig([], 2)),
        (r"sources\[0\]: wanted a PEMTSource", lambda: moelora_ops.PEMTConfig([3], 2)),
        ("prompt: wanted token ids or a number", lambda: moelora_ops.PEMTSourceConfig([])),
        ("prompt: wanted token ids or a number", lambda: moelora_ops.PEMTSourceConfig(0)),
        ("prompt: wanted token ids or a number", lambda: moelora_ops.PEMTSourceConfig("cola")),
        ("prompt: wanted token ids or a number", lambda: moelora_ops.PEMTSourceConfig([-1])),
        ("reduction: wanted", lambda: moelora_ops.PEMTConfig(sources(), 2, reduction=0)),
        ("dropout: wanted", lambda: moelora_ops.PEMTConfig(sources(), 2, dropout=1.0)),
        ("train_norms: wanted", lambda: moelora_ops.PEMTConfig(sources(), 2, train_norms=1)),
        ("sparsity: wanted", lambda: moelora_ops.PEMTConfig(sources(), 2, sparsity="no")),
    ],
)
def test_bad_configurations_are_refused(message, make):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_models_that_do_not_fit_are_refused_and_left_as_they_were():
    good = sources()
    some = dict(list(good[1].experts.items())[:2])
    with pytest.raises(ValueError, match=r"sources\[1\]: wanted experts for the linears of sourc"):
        moelora_ops.PEMTConfig([good[0], moelora_ops.PEMTSource(good[1].prompt, some)], 2)
    narrow = moelora_ops.PEMTSource(good[1].prompt[:, :8], good[1].experts)
    mixed = [good[0], sources("adapter")[1]]
    model = tiny_t5()
    for config, message in (
        (moelora_ops.PEMTSourceConfig([3, 40]), "prompt: wanted token ids below 40"),
        (moelora_ops.PEMTConfig([good[0], narrow], 2), r"sources\[1\]: wanted a prompt of shape"),
        (moelora_ops.PEMTConfig(mixed, 2), r"loras\[1\]: wanted biases for all experts"),
        (
            moelora_ops.PEMTSourceConfig(2, target_modules=("wi",)),
            "target_modules: wanted the second linear of T5 feed-forwards",
        ),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            moelora_ops.apply(model, config)
        assert all(p.requires_grad for p in model.parameters())
        assert not hasattr(model, "moelora_companions")
        assert all(type(m) is nn.Linear for m in feed_forward_linears(model).values())
    with pytest.raises(ValueError, match="model: wanted a T5-type model, got Sequential"):
        moelora_ops.apply(
            nn.Sequential(nn.Linear(2, 2)), moelora_ops.PEMTSourceConfig(2, target_modules=("0",))
        )
    deeper = tiny_t5(num_decoder_layers=1)
    with pytest.raises(ValueError, match=r"but the model has none called decoder\.block\.1"):
        moelora_ops.apply(deeper, moelora_ops.PEMTConfig(good, 2))


def without(path):
    def change(model):
        parent, _, name = path.rpartition(".")
        delattr(model.get_submodule(parent), name)

    return change


def with_wider_norm(model):
    model.encoder.final_layer_norm.weight = nn.Parameter(torch.ones(17))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (
            r"wanted a parameter encoder\.final_layer_norm\.weight of shape \[16\], got None",
            without("encoder.final_layer_norm"),
        ),
        (r"final_layer_norm\.weight of shape \[16\], got \[17\]", with_wider_norm),
        ("model: wanted a T5-type model", without("encoder.is_decoder")),
        (
            "model: wanted embeddings of width 16, got 8",
            lambda model: model.encoder.set_input_embeddings(nn.Embedding(40, 8)),
        ),
    ],
    ids=["missing norm", "wider norm", "no encoder", "narrow embeddings"],
)
def test_a_model_that_a_file_does_not_suit_is_left_as_it_was(message, change, tmp_path):
    pytest.importorskip("safetensors")
    moelora_ops.save_adapter(target_model(), tmp_path)
    model = tiny_t5()
    change(model)
    modules = dict(model.named_modules())
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        moelora_ops.load_adapter(model, tmp_path)
    assert dict(model.named_modules()) == modules
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in modules.values())
    for name, p in model.named_parameters():
        assert p.requires_grad and torch.equal(p, values[name])


def test_norms_of_compiled_blocks_are_found_by_their_plain_names(tmp_path):
    pytest.importorskip("safetensors")
    model = target_model()
    moelora_ops.save_adapter(model, tmp_path)
    wrapped = tiny_t5()
    wrapped.encoder.block[0] = torch.compile(wrapped.encoder.block[0], backend="eager")
    assert any("_orig_mod." in name for name, _ in wrapped.named_parameters())
    with torch.no_grad():
        wrapped.encoder.block[0].layer[0].layer_norm.weight.fill_(3)
    moelora_ops.load_adapter(wrapped, tmp_path)
    assert torch.equal(
        wrapped.encoder.block[0].layer[0].layer_norm.weight,
        model.encoder.block[0].layer[0].layer_norm.weight,
    )


def test_what_is_no_source_is_refused(tmp_path):
    with pytest.raises(ValueError, match="source: wanted PEMT's stage 1, got no adapters"):
        moelora_ops.pemt_source(tiny_t5())
    with pytest.raises(ValueError, match=r"source: wanted PEMT's stage 1, got \['pemt'\]"):
        moelora_ops.pemt_source(target_model())
    with pytest.raises(FileNotFoundError, match="dir: wanted a directory with an adapter"):
        moelora_ops.pemt_source(tmp_path / "none")


def test_losses_and_masks_that_do_not_fit_are_refused():
    model = target_model()
    with pytest.raises(RuntimeError, match="model: no PEMT layer has run yet"):
        moelora_ops.task_sparsity_loss(model)
    model.eval()(**batch())
    with pytest.raises(RuntimeError, match="with sparsity=True has run in training mode"):
        moelora_ops.task_sparsity_loss(model)
    model.train()(**batch())
    for value in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="coefficient: wanted a finite number of at least 0"):
            moelora_ops.task_sparsity_loss(model, value)
    with pytest.raises(ValueError, match=r"attention_mask: wanted shape \[3, 11\], got \[3, 6\]"):
        moelora_ops.task_sparsity_loss(model, attention_mask=torch.ones(3, 6))
    with pytest.raises(ValueError, match="decoder_attention_mask: wanted shape"):
        moelora_ops.task_sparsity_loss(model, decoder_attention_mask=torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"attention_mask: wanted shape \[batch, 7\], without the"):
        model(**{**batch(), "attention_mask": torch.ones(3, 9)})
    # An encoder's output that is shorter than the prompt: not one that this encoder made.
    with pytest.raises(ValueError, match="encoder_states: wanted at least the prompt's 4 pos"):
        model(encoder_outputs=(torch.randn(3, 3, 16),), labels=batch()["labels"])
