"""Three LoRAs of SmolLM2-135M, each trained on one task, composed with MoLE; on a CPU, in minutes.

1. PEFT trains a LoRA per reasoning task and saves it: three adapters that know nothing of another.
2. `MoLEConfig` puts all three into one model, frozen, with a gate per linear.  Only the gates are
   trained, on a few questions of every task mixed.
3. Held-out questions of the mix, for the frozen model, each LoRA alone, the LoRAs' average and sum
   (compositions that need no training) and MoLE; and which expert the gates prefer on which task.

    python examples/mole_compose.py

Tables and plots go to the folder of --output.
"""

# ruff: noqa: E402  (the environment is set before the imports that read it)
import argparse
import contextlib
import json
import os
import platform
import time
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # the weights come in a package, nothing is downloaded
os.environ["TQDM_DISABLE"] = "1"  # transformers' progress bars
warnings.filterwarnings("ignore", category=FutureWarning)

import report
import tasks
import torch
from matplotlib import pyplot as plt
from matplotlib.ticker import PercentFormatter
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import nn
from variants import load_model, load_tokenizer, make_optimizer, share

import moelora_ops
from moelora_ops import MoLEConfig
from moelora_ops.integrations.peft import read_loras
from moelora_ops.nn import LoRA

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MOLE, AVERAGE, SUM, MERGED = "MoLE", "average", "sum", "merged factors"

console = Console()


def main() -> None:
    begin = time.perf_counter()
    args = parse_arguments()
    torch.manual_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)

    model, tokenizer = load_model(getattr(torch, args.dtype)), load_tokenizer()
    pad = tokenizer.pad_token_id
    chosen = {task: tasks.TASKS[task] for task in args.tasks}
    training, held_out = tasks.make_mixture(
        tokenizer, args.train_per_task, args.held_out_per_task, args.length, args.seed, chosen
    )
    folders = []
    for task in chosen:
        examples = [e for e in training if e.task == task]
        folders.append(args.output / "adapters" / task)
        losses = train_lora(model, examples, folders[-1], args, pad)
        console.print(f"LoRA for {task}: training loss {losses[0]:.2f} -> {losses[-1]:.2f}")

    loras = [read_loras(folder) for folder in folders]
    scores = {"frozen model": tasks.evaluate(model, held_out, args.batch, pad)}
    for name, adapters in compositions(loras, list(chosen)).items():
        composed = moelora_ops.apply(share(model), MoLEConfig(adapters)).eval()
        scores[name] = tasks.evaluate(composed, held_out, args.batch, pad)
        console.print(f"{name}: mean held-out loss {mean(scores[name]).loss:.2f}")

    few = [e for task in chosen for e in [e for e in training if e.task == task][: args.few]]
    config = MoLEConfig(folders, args.gates, args.granularity)
    composed = moelora_ops.apply(share(model), config)
    losses = train_gates(composed, few, args, pad)
    console.print(f"gates: training loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    scores[MOLE] = tasks.evaluate(composed.eval(), held_out, args.batch, pad)
    use = expert_use(composed, held_out, pad)
    write_report(args, scores, use, losses, composed, few)
    console.print(f"All of it took {time.perf_counter() - begin:.0f} s; see {args.output}/")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train LoRAs of SmolLM2-135M on different tasks and compose them with MoLE."
    )
    parser.add_argument(
        "--tasks", nargs="+", choices=tasks.TASKS, metavar="TASK",
        default=["family_relationships", "word_sequence_reversal", "number_filtering"],
    )  # fmt: skip
    parser.add_argument("--lora-steps", type=int, default=30, help="training steps of each LoRA")
    parser.add_argument("--steps", type=int, default=30, help="training steps of the gates")
    parser.add_argument("--batch", type=int, default=8, help="questions per step")
    parser.add_argument(
        "--length", type=int, default=80, help="most tokens of a question with its answer"
    )
    parser.add_argument("--rank", type=int, default=8, help="of the LoRAs")
    parser.add_argument("--lora-lr", type=float, default=1e-3, help="peak learning rate, LoRAs")
    parser.add_argument("--lr", type=float, default=1e-2, help="peak learning rate, gates")
    parser.add_argument("--balance", type=float, default=0.5, help="gating balance loss (0.5)")
    parser.add_argument(
        "--gates", choices=("matrix", "layer", "block", "network"), default="matrix"
    )
    parser.add_argument("--granularity", choices=("token", "sequence"), default="token")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--train-per-task", type=int, default=120, help="questions for each LoRA")
    parser.add_argument("--few", type=int, default=24, help="of these, for the gates")
    parser.add_argument("--held-out-per-task", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("mole_output"))
    args = parser.parse_args()
    for name in ("lora_steps", "steps", "few"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: wanted at least 1")
    if len(args.tasks) != len(set(args.tasks)):
        parser.error(f"--tasks: wanted different ones, got {args.tasks}")
    return args


def train_lora(
    model: nn.Module, examples: list[tasks.Example], folder: Path, args, pad: int
) -> list[float]:
    """Train a LoRA on `examples` with PEFT and save it as PEFT does."""
    config = LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(share(model), config)
    batches = tasks.batches(examples, args.batch, args.lora_steps, pad, args.seed)
    losses = train(adapted.get_base_model(), batches, args.lora_lr)
    adapted.save_pretrained(folder)
    return losses


def train_gates(model: nn.Module, examples: list[tasks.Example], args, pad: int) -> list[float]:
    """Train the gates of a composed model on `examples`, with the gating balance loss."""
    groups = tasks.draw(examples, args.batch, args.steps, args.seed)
    batches = [tasks.collate(group, pad) for group in groups]
    return train(model, batches, args.lr, args.balance)


def train(
    model: nn.Module, batches: list[tasks.Batch], lr: float, balance: float | None = None
) -> list[float]:
    """A step per batch; returns the losses of the answers."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, schedule = make_optimizer(parameters, lr, len(batches))
    losses = []
    for batch in batches:
        masked = contextlib.nullcontext()  # a LoRA has no gates
        if balance is not None:
            masked = moelora_ops.sequence_mask(model, batch.mask)
        with masked:
            loss = tasks.answer_loss(model, batch)
            total = loss
            if balance is not None:
                total = total + moelora_ops.gating_balance_loss(model, balance)
            total.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return losses


def compositions(loras: list[dict[str, LoRA]], names: list[str]) -> dict[str, list[dict]]:
    """What needs no training, each as a single LoRA per linear: MoLE with one expert is that."""
    share_of_each = 1 / len(loras)
    weighted = {
        AVERAGE: combine(loras, share_of_each),
        SUM: combine(loras, 1.0),
        # As in LoRAHub, which merges the factors before they are multiplied.
        MERGED: merge_factors(loras, share_of_each),
    }
    alone = {f"LoRA {name}": lora for name, lora in zip(names, loras, strict=True)}
    return {name: [lora] for name, lora in (alone | weighted).items()}


def combine(loras: list[dict[str, LoRA]], weight: float) -> dict[str, LoRA]:
    """``weight Σ_i s_i B_i A_i`` of every linear: the factors side by side."""
    return {
        name: LoRA(
            torch.cat([lora[name].A for lora in loras]),
            torch.cat([weight * lora[name].scale * lora[name].B for lora in loras], 1),
            1.0,
        )
        for name in loras[0]
    }


def merge_factors(loras: list[dict[str, LoRA]], weight: float) -> dict[str, LoRA]:
    """``s (weight Σ_i B_i)(weight Σ_i A_i)`` of every linear."""
    return {
        name: LoRA(
            weight * sum(lora[name].A for lora in loras),
            weight * sum(lora[name].B for lora in loras),
            loras[0][name].scale,
        )
        for name in loras[0]
    }


@torch.no_grad()
def expert_use(model: nn.Module, examples: list[tasks.Example], pad: int) -> dict[str, list[float]]:
    """Per task, the mean weight of each expert over all gates and tokens."""
    use = {}
    for task in dict.fromkeys(e.task for e in examples):
        batch = tasks.collate([e for e in examples if e.task == task], pad)
        with moelora_ops.sequence_mask(model, batch.mask):
            tasks.answer_loss(model, batch)
        gates = [m.routing for m in model.modules() if getattr(m, "routing", None) is not None]
        use[task] = torch.stack([g.prob_sums / g.rows for g in gates]).mean(0).tolist()
    return use


def mean(scores: dict[str, tasks.Score]) -> tasks.Score:
    """Mean over the tasks."""
    return tasks.Score(
        *(sum(values) / len(scores) for values in zip(*scores.values(), strict=True))
    )


def write_report(args, scores, use, losses, model, few) -> None:
    """Print the table; write it as markdown and json, and the plot, into the output folder."""
    header = ["held-out loss (right)", *args.tasks, "mean"]
    rows = [
        [name, *(f"{s.loss:.2f} ({s.accuracy:.0%})" for s in (*by_task.values(), mean(by_task)))]
        for name, by_task in scores.items()
    ]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    untrained = {name: mean(s) for name, s in scores.items() if name != MOLE}
    best = min(untrained, key=lambda name: untrained[name].loss)
    mole = mean(scores[MOLE])
    findings = [
        "Loss per answer token, and share of the answers of which every token is right.",
        f"Gates: {args.gates}-wise, per {args.granularity}, {trained / 1e6:.2f} M numbers, "
        f"{args.steps} steps on {len(few)} questions (loss {losses[0]:.2f} to {losses[-1]:.2f}).",
        f"Mean loss: {MOLE} {mole.loss:.2f}, {AVERAGE} {untrained[AVERAGE].loss:.2f}; the best of "
        f"what is not trained on the mix is {best!r} with {untrained[best].loss:.2f}.",
    ]
    machine = (
        f"{args.dtype}, {torch.get_num_threads()} threads, {platform.machine()}, "
        f"torch {torch.__version__}, moelora_ops {moelora_ops.__version__}"
    )
    console.print(report.rich_table("", header, rows), *findings, sep="\n", highlight=False)
    lines = ["# LoRAs of SmolLM2-135M composed with MoLE", "", report.markdown_table(header, rows)]
    lines += [*(f"* {finding}" for finding in findings), "", f"({machine})", ""]
    (args.output / "report.md").write_text("\n".join(lines), encoding="utf-8")
    results = {
        "settings": {name: str(value) for name, value in vars(args).items()},
        "machine": machine,
        "scores": {
            name: {task: score._asdict() for task, score in by_task.items()}
            for name, by_task in scores.items()
        },
        "gate_losses": losses,
        "expert_use": use,
    }
    (args.output / "report.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    plot(args.output / "compose.png", scores, use)


def plot(
    path: Path, scores: dict[str, dict[str, tasks.Score]], use: dict[str, list[float]]
) -> None:
    """Mean held-out loss and accuracy of every composition; weight of each expert on each task."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    names = list(scores)
    colors = ["tab:orange" if name == MOLE else "tab:blue" for name in names]
    for axis, field, label, style in (
        (left, "loss", "mean held-out loss per answer token", "{:.2f}"),
        (middle, "accuracy", "mean share of answers right in full", "{:.0%}"),
    ):
        values = [getattr(mean(scores[name]), field) for name in names]
        axis.bar_label(axis.barh(names, values, color=colors), fmt=style, padding=3, fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set(xlabel=label)
    middle.set(yticklabels=[])
    middle.xaxis.set_major_formatter(PercentFormatter(1))
    even = 1 / len(use)
    span = max(0.01, max(abs(weight - even) for row in use.values() for weight in row))
    image = right.imshow(
        list(use.values()), cmap="PuOr_r", vmin=even - 1.5 * span, vmax=even + 1.5 * span
    )
    for y, weights in enumerate(use.values()):
        for x, weight in enumerate(weights):
            right.text(x, y, f"{weight:.1%}", ha="center", va="center", fontsize=9)
    right.set(xticks=range(len(use)), yticks=range(len(use)), yticklabels=list(use))
    right.set_xticklabels([f"LoRA {task}" for task in use], rotation=25, ha="right")
    right.set(title="mean weight, by task")
    figure.colorbar(image, format=PercentFormatter(1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
