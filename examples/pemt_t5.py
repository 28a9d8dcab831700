"""PEMT on a small T5: what three source tasks are worth to a fourth with a few examples, on a CPU.

The world: 64 words, each with a colour, a shape and a size (four of each).  There are no T5 weights
in a package, so a T5 of random weights first learns this world's text by filling in missing words:
words stand together that share a shape, a size or, half as often, a colour.  Then:

1. Stage 1: three source tasks, to name the commonest colour, shape or size of six words.  For each
   an expert and a prompt, on the frozen model, saved and read again.
2. Stage 2: the target task, whether the commonest colour is a warm one: other answers, and few
   examples.  PEMT has to find out which source helps.
3. The same examples for PEMT with the related source alone, which nobody would know beforehand, for
   a fresh LoRA with a prompt, and for fine-tuning all weights.

Tables, the learned weights and a plot go to the output folder.

What was seen with the defaults (means of three draws; two draws of one method differ by as much as
the methods do): with 32 examples PEMT was best, 84 % beside 81 % for a fresh LoRA and 79 % for full
fine-tuning, and the first layer of the decoder gave the colour source 95 %.  With 16 it was level
with the LoRA (77 and 76 %).  With 8 it was worst, 53 %, as its gates settled on the wrong sources,
while the related source alone reached 74 %: the transfer works, choosing needs examples.
"""

import argparse
import copy
import json
import os
import random
import statistics
import time
from pathlib import Path
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded
os.environ["TQDM_DISABLE"] = "1"

import report
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

import moelora_ops

plt = report.plt

PROPERTIES = {
    "colour": ("red", "orange", "blue", "green"),
    "shape": ("round", "square", "long", "flat"),
    "size": ("tiny", "small", "large", "huge"),
}
IN_TEXT = ("colour", "shape", "shape", "size", "size")  # what words that stand together share
WARM = ("red", "orange")
WORDS = 64
SPECIAL = (
    "<pad>",
    "</s>",
    "<mask>",
    "?",
    "name",
    "is",
    "the",
    "commonest",
    "it",
    "warm",
    "yes",
    "no",
)
VOCABULARY = {
    word: i
    for i, word in enumerate(
        (*SPECIAL, *PROPERTIES, *sum(PROPERTIES.values(), ()), *(f"w{i}" for i in range(WORDS)))
    )
}
DESCRIPTIONS = {name: f"name the commonest {name}" for name in PROPERTIES}
TARGET = "is the commonest colour warm"
LENGTH = 6  # words of a text
HELD_OUT = 10_000  # seed of the examples that nobody trains on
PEMT, ORACLE, LORA, FULL = "PEMT", "PEMT, related source alone", "fresh LoRA", "full fine-tuning"
LEARNING_RATES = {
    "pretraining": 2e-3, "source": 5e-3, PEMT: 5e-3, ORACLE: 5e-3, LORA: 3e-3, FULL: 3e-4,
}  # fmt: skip

console = Console()


class Example(NamedTuple):
    """Token ids of a text and of what is to be answered, each with its end."""

    text: list[int]
    answer: list[int]


def tokens(text: str) -> list[int]:
    return [VOCABULARY[word] for word in text.split()]


def value_of(word: int, name: str) -> str:
    """A word's colour, shape or size: its digits in base 4."""
    place = list(PROPERTIES).index(name)
    return PROPERTIES[name][word // 4**place % 4]


def sharing_text(rng: random.Random, name: str, value: str, count: int) -> list[int]:
    """LENGTH words, `count` or more of which have this value of the property."""
    with_it = [word for word in range(WORDS) if value_of(word, name) == value]
    words = rng.sample(with_it, count) + rng.sample(range(WORDS), LENGTH - count)
    rng.shuffle(words)
    return words


def make_example(rng: random.Random, task: str) -> Example:
    """One example of ``"text"`` (fill in a word), of a property's name, or of ``"target"``."""
    name = rng.choice(IN_TEXT) if task == "text" else task
    name = "colour" if task == "target" else name
    value = rng.choice(PROPERTIES[name])
    while True:
        words = sharing_text(rng, name, value, LENGTH if task == "text" else LENGTH // 2)
        counts = [sum(value_of(w, name) == v for w in words) for v in PROPERTIES[name]]
        if counts.count(max(counts)) == 1 and max(counts) == counts[PROPERTIES[name].index(value)]:
            break
    text = [f"w{word}" for word in words]
    if task == "text":
        hidden = rng.randrange(LENGTH)
        answer, text[hidden] = text[hidden], "<mask>"
    elif task == "target":
        answer = "yes" if value in WARM else "no"
    else:
        answer = value
    return Example(tokens(" ".join([*text, "</s>"])), tokens(f"{answer} </s>"))


def make_examples(task: str, count: int, seed: int) -> list[Example]:
    rng = random.Random(f"{task} {seed}")
    return [make_example(rng, task) for _ in range(count)]


def batch_of(examples: list[Example]) -> dict[str, Tensor]:
    """All texts are of one length, and so are all answers."""
    return {
        "input_ids": torch.tensor([e.text for e in examples]),
        "labels": torch.tensor([e.answer for e in examples]),
    }


def make_model(width: int, layers: int) -> nn.Module:
    config = T5Config(
        vocab_size=len(VOCABULARY), d_model=width, d_ff=4 * width, d_kv=32,
        num_heads=max(1, width // 32), num_layers=layers, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def train(model: nn.Module, batches, steps: int, lr: float, sparsity: float = 0.0) -> list[float]:
    """AdamW on what requires a gradient; the learning rate rises over a tenth, then falls."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / max(1, steps // 10), (steps - i) / steps)
    )
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(**next(batches), use_cache=False).loss
        losses.append(loss.item())
        if sparsity:
            loss = loss + moelora_ops.task_sparsity_loss(model, sparsity)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    return losses


def fresh_batches(task: str, size: int, seed: int):
    """New examples forever."""
    rng = random.Random(f"{task} {seed}")
    while True:
        yield batch_of([make_example(rng, task) for _ in range(size)])


def repeated_batches(examples: list[Example], size: int, seed: int):
    """The same few examples, in a new order every time."""
    rng = random.Random(seed)
    while True:
        yield batch_of(rng.sample(examples, min(size, len(examples))))


@torch.no_grad()
def accuracy(model: nn.Module, examples: list[Example]) -> float:
    """Share of the answers that greedy decoding writes in full."""
    right = 0
    for start in range(0, len(examples), 256):
        batch = batch_of(examples[start : start + 256])
        choices = model(**batch, use_cache=False).logits.argmax(-1)
        right += int((choices == batch["labels"]).all(1).sum())
    return right / len(examples)


def train_sources(
    model: nn.Module, args: argparse.Namespace
) -> tuple[dict[str, moelora_ops.PEMTSource], dict[str, float]]:
    """Stage 1: what each source task taught, through files, and its accuracy."""
    sources, scores = {}, {}
    for name, description in DESCRIPTIONS.items():
        torch.manual_seed(args.seed)
        # B from zero: the experts are then what they have learned and no more.
        config = moelora_ops.PEMTSourceConfig(
            tokens(description), rank=args.rank, alpha=args.rank, init="zero"
        )
        adapted = moelora_ops.apply(copy.deepcopy(model), config)
        batches = fresh_batches(name, args.batch, args.seed)
        train(adapted, batches, args.source_steps, LEARNING_RATES["source"])
        scores[name] = accuracy(adapted, make_examples(name, args.held_out, HELD_OUT))
        moelora_ops.save_adapter(adapted, args.output / "sources" / name)
        sources[name] = moelora_ops.pemt_source(args.output / "sources" / name)
        console.print(f"source task {name}: {scores[name]:.0%} right")
    return sources, scores


def with_pemt(model: nn.Module, sources: list[moelora_ops.PEMTSource]) -> nn.Module:
    return moelora_ops.apply(model, moelora_ops.PEMTConfig(sources, tokens(TARGET)))


def target_models(model: nn.Module, sources: dict, rank: int) -> dict[str, nn.Module]:
    """One model per competitor, all from the same weights."""
    lora = moelora_ops.PEMTSourceConfig(tokens(TARGET), rank=rank, alpha=rank, init="zero")
    return {
        PEMT: with_pemt(copy.deepcopy(model), list(sources.values())),
        ORACLE: with_pemt(copy.deepcopy(model), [sources["colour"]]),
        LORA: moelora_ops.apply(copy.deepcopy(model), lora),
        FULL: copy.deepcopy(model),
    }


def run_targets(
    model: nn.Module, sources: dict, args: argparse.Namespace
) -> tuple[dict[str, dict[int, list[float]]], dict[str, int], dict[str, list[float]]]:
    """Stage 2 and its rivals, for every number of examples and every seed.

    Returns:
        Accuracies by competitor and number of examples, one per seed; trained parameters; PEMT's
        weight of each source per layer, averaged over seeds, at the largest number of examples.
    """
    held_out = make_examples("target", args.held_out, HELD_OUT)
    results: dict[str, dict[int, list[float]]] = {}
    trained: dict[str, int] = {}
    weights: dict[str, list[Tensor]] = {}
    for shots in args.shots:
        for seed in range(args.seeds):
            examples = make_examples("target", shots, seed)
            torch.manual_seed(seed)
            for name, rival in target_models(model, sources, args.rank).items():
                trained[name] = sum(p.numel() for p in rival.parameters() if p.requires_grad)
                batches = repeated_batches(examples, args.batch, seed)
                is_pemt = name in (PEMT, ORACLE)
                train(rival, batches, args.steps, LEARNING_RATES[name], 0.1 if is_pemt else 0.0)
                score = accuracy(rival, held_out)
                results.setdefault(name, {}).setdefault(shots, []).append(score)
                if name == PEMT and shots == args.shots[-1]:
                    for layer, of_layer in moelora_ops.source_weights(rival).items():
                        weights.setdefault(layer, []).append(of_layer)
        shown = ", ".join(f"{n} {statistics.mean(r[shots]):.0%}" for n, r in results.items())
        console.print(f"{shots} examples: {shown}")
    means = {layer: torch.stack(of).mean(0).tolist() for layer, of in weights.items()}
    return results, trained, means


def plot(path: Path, results: dict, weights: dict[str, list[float]], sources: list[str]) -> None:
    """Accuracy against the number of examples; and each layer's weights of the sources."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for name, scores in results.items():
        shots = list(scores)
        (line,) = left.plot(shots, [statistics.mean(scores[n]) for n in shots], "o-", label=name)
        for n in shots:
            left.plot([n] * len(scores[n]), scores[n], ".", color=line.get_color(), alpha=0.4)
    left.axhline(0.5, color="black", linestyle=":", linewidth=1, label="guessing")
    left.set(xlabel="examples of the target task", ylabel="accuracy", xticks=shots)
    left.set_title("target task; dots are seeds", fontsize=10)
    left.legend(fontsize=8)
    image = right.imshow(list(weights.values()), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(weights.values()):
        for x, weight in enumerate(row):
            color = "white" if weight > 0.6 else "black"
            right.text(x, y, f"{weight:.2f}", ha="center", va="center", color=color)
    names = [short_name(layer) for layer in weights]
    right.set(xticks=range(len(sources)), xticklabels=sources, yticks=range(len(names)))
    right.set_yticklabels(names)
    right.set_title(f"PEMT's weight of each source, {shots[-1]} examples", fontsize=10)
    figure.colorbar(image)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def short_name(layer: str) -> str:
    """``encoder 0`` for ``encoder.block.0.layer.1.DenseReluDense.wo``."""
    stack, _, index, *_ = layer.split(".")
    return f"{stack} {index}"


def write_report(args, scores, results, trained, weights, seconds) -> None:
    """Tables for the terminal and for a file, json, and the plot."""
    header = ["target task", "trained", *(f"{n} examples" for n in args.shots)]
    rows = [
        [name, f"{trained[name]:,}"]
        + [
            f"{statistics.mean(values):.1%} ± {statistics.pstdev(values):.1%}"
            for values in by_shots.values()
        ]
        for name, by_shots in results.items()
    ]
    gate_header = [f"weight at {args.shots[-1]} examples", *scores]
    gate_rows = [[short_name(layer), *(f"{w:.2f}" for w in row)] for layer, row in weights.items()]
    last = {name: statistics.mean(r[args.shots[-1]]) for name, r in results.items()}
    favourite = max(
        scores, key=lambda n: sum(row[list(scores).index(n)] for row in weights.values())
    )
    findings = [
        f"Source tasks, right: {', '.join(f'{n} {s:.0%}' for n, s in scores.items())}.",
        f"At {args.shots[-1]} examples {max(last, key=last.get)} is best; PEMT's points above: "
        + ", ".join(f"{100 * (last[PEMT] - last[n]):+.1f} {n}" for n in (LORA, FULL, ORACLE))
        + ".",
        f"Over all layers PEMT gives most weight to the source {favourite}; related is colour.",
        f"Mean and standard deviation over {args.seeds} draws of the examples; guessing is 50%. "
        f"All of it took {seconds:.0f} s.",
    ]
    console.print(
        report.rich_table("", header, rows), report.rich_table("", gate_header, gate_rows)
    )
    console.print(*findings, sep="\n", highlight=False)
    tables = [report.markdown_table(header, rows), report.markdown_table(gate_header, gate_rows)]
    lines = ["# PEMT on a small T5", "", *tables, *(f"* {line}" for line in findings), ""]
    (args.output / "report.md").write_text("\n".join(lines), encoding="utf-8")
    facts = {
        "settings": {name: str(value) for name, value in vars(args).items()},
        "sources": scores, "target": results, "trained": trained, "weights": weights,
    }  # fmt: skip
    (args.output / "report.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    plot(args.output / "pemt.png", results, weights, list(scores))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="PEMT: source tasks, then a target with few examples."
    )
    parser.add_argument("--width", type=int, default=128, help="d_model of the T5")
    parser.add_argument("--layers", type=int, default=2, help="of encoder and decoder each")
    parser.add_argument("--pretrain-steps", type=int, default=600, help="on text, 64 a step")
    parser.add_argument("--source-steps", type=int, default=250, help="of each source task")
    parser.add_argument("--steps", type=int, default=80, help="on the target task")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16, help="of each source's LoRA")
    parser.add_argument("--shots", type=int, nargs="+", default=[8, 16, 32], help="target examples")
    parser.add_argument("--seeds", type=int, default=3, help="draws of the target's examples")
    parser.add_argument("--held-out", type=int, default=500, help="examples to be judged by")
    parser.add_argument("--seed", type=int, default=0, help="of the model and the source tasks")
    parser.add_argument("--output", type=Path, default=Path("pemt_output"))
    args = parser.parse_args()
    for name in ("width", "layers", "pretrain_steps", "source_steps", "steps", "seeds", "rank"):
        if getattr(args, name) < 1:
            parser.error(
                f"--{name.replace('_', '-')}: wanted at least 1, got {getattr(args, name)}"
            )
    if min(args.shots) < 1:
        parser.error(f"--shots: wanted at least 1, got {min(args.shots)}")
    return args


def main() -> None:
    begin = time.perf_counter()
    args = parse_arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    model = make_model(args.width, args.layers)
    batches = fresh_batches("text", 64, args.seed)
    losses = train(model, batches, args.pretrain_steps, LEARNING_RATES["pretraining"])
    size = sum(p.numel() for p in model.parameters()) / 1e6
    console.print(f"T5 with {size:.1f} M weights: loss {losses[0]:.2f} to {losses[-1]:.2f} on text")
    sources, scores = train_sources(model, args)
    results, trained, weights = run_targets(model, sources, args)
    write_report(args, scores, results, trained, weights, time.perf_counter() - begin)


if __name__ == "__main__":
    main()
