"""SmolLM2-135M learns a mixture of reasoning tasks with MoLA 2-4-6-8, on a CPU, in a few minutes.

1. Fused and reference layers (MoLA's formula in plain PyTorch) start from the same weights and see
   the same batches: their losses lie on each other.
2. What it learned: held-out loss and accuracy per task, before and after; which experts it uses.
3. What a training step costs: fused, reference, stacked plain PyTorch, PEFT's LoRA, frozen model.

`make demo` runs it from nothing; tables and plots go to demo_output/.
"""

# ruff: noqa: E402  (the environment is set before the imports that read it)
import argparse
import json
import os
import platform
import statistics
import time
import warnings
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # the weights come in a package, nothing is downloaded
os.environ["TQDM_DISABLE"] = "1"  # transformers' progress bars
os.environ["KINETO_LOG_LEVEL"] = "99"  # messages of the profiler, which counts memory
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
warnings.filterwarnings("ignore", category=FutureWarning)

import report
import tasks
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn
from variants import (
    FROZEN,
    FUSED,
    LORA,
    REFERENCE,
    VARIANTS,
    Trainer,
    load_model,
    load_tokenizer,
    share,
)

import moelora_ops
from moelora_ops.backends.extension import isa_level
from moelora_ops.bench.devices import Cpu
from moelora_ops.bench.runner import Settings, time_rounds

console = Console()


def main() -> None:
    begin = time.perf_counter()
    args = parse_arguments()
    torch.manual_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)

    with stage("Loading SmolLM2-135M-Instruct"):
        tokenizer = load_tokenizer()
        model = load_model(getattr(torch, args.dtype))
    pad = tokenizer.pad_token_id
    with stage(f"Making questions: {', '.join(tasks.TASKS)}"):
        training, held_out = tasks.make_mixture(
            tokenizer, args.train_per_task, args.held_out_per_task, args.length, args.seed
        )
    with stage(f"Answering {len(held_out)} held-out questions before training"):
        before = tasks.evaluate(model, held_out, args.batch, pad)

    trainers = {name: Trainer(name, model, args.lr, args.steps) for name in (FUSED, REFERENCE)}
    trainers[REFERENCE].model.load_state_dict(trainers[FUSED].model.state_dict())
    losses = train(trainers, tasks.batches(training, args.batch, args.steps, pad, args.seed))
    fused = trainers[FUSED].model.eval()
    difference = max(abs(a - b) for a, b in zip(losses[FUSED], losses[REFERENCE], strict=True))

    with stage("Answering them after training"):
        after = tasks.evaluate(fused, held_out, args.batch, pad)
    with stage("Counting the choices of the routers"):
        use = expert_use(fused, held_out[:: max(1, len(held_out) // 12)], pad)
    with stage("Saving the adapter and loading it into a fresh model"):
        check_adapter(
            fused, share(model), args.output / "adapter", tasks.collate(held_out[: args.batch], pad)
        )
    costs = measure(model, tasks.collate(training[: args.batch], pad), args)

    constant = tasks.constant_accuracy(training, held_out)
    write_report(args, costs, losses, difference, before, after, constant, use)
    console.print(f"All of it took {time.perf_counter() - begin:.0f} s; see {args.output}/")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Fine-tune SmolLM2-135M with MoLA 2-4-6-8 on the CPU."
    )
    parser.add_argument("--steps", type=int, default=30, help="training steps")
    parser.add_argument("--batch", type=int, default=8, help="questions per step")
    parser.add_argument(
        "--length", type=int, default=80, help="most tokens of a question with its answer"
    )
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of the step time measurement")
    parser.add_argument("--train-per-task", type=int, default=80, help="questions to learn from")
    parser.add_argument(
        "--held-out-per-task", type=int, default=16, help="questions to be judged by"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    parser.add_argument(
        "--quick", action="store_true", help="a few steps only: does everything run?"
    )
    args = parser.parse_args()
    if args.quick:
        args.steps, args.batch, args.rounds, args.train_per_task, args.held_out_per_task = (
            3,
            4,
            1,
            4,
            2,
        )
    if args.steps < 1:
        parser.error(f"--steps: wanted at least 1, got {args.steps}")
    return args


class stage:
    """Prints what is being done, then how long it took."""

    def __init__(self, text: str):
        self.text = text

    def __enter__(self):
        console.print(f"{self.text} ...", end=" ")
        self.start = time.perf_counter()

    def __exit__(self, error, *_):
        console.print(
            "failed" if error else f"{time.perf_counter() - self.start:.1f} s", style="dim"
        )


def train(trainers: dict[str, Trainer], batches: list[tasks.Batch]) -> dict[str, list[float]]:
    """Train each model on the same batches, in step with each other; returns their losses."""
    losses = {name: [] for name in trainers}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("Training", total=len(batches))
        for batch in batches:
            for name, trainer in trainers.items():
                losses[name].append(trainer.step(batch))
            shown = ", ".join(f"{name} {values[-1]:.4f}" for name, values in losses.items())
            progress.update(bar, advance=1, description=f"Training; loss: {shown}")
    return losses


@torch.no_grad()
def expert_use(model: nn.Module, examples: list[tasks.Example], pad: int) -> list[list[float]]:
    """Share of each layer's selections, over its seven linears, that went to each expert."""
    chosen: dict[int, torch.Tensor] = {}
    for example in examples:  # one at a time, so that no padding is counted
        tasks.answer_loss(model, tasks.collate([example], pad))
        for name, stats in moelora_ops.routing_stats(model).items():
            layer = int(name.split("layers.")[1].split(".")[0])
            chosen[layer] = chosen.get(layer, 0) + stats.share * stats.tokens
    return [(chosen[layer] / chosen[layer].sum()).tolist() for layer in sorted(chosen)]


@torch.no_grad()
def check_adapter(trained: nn.Module, fresh: nn.Module, folder: Path, batch: tasks.Batch) -> None:
    """Save `trained`'s adapter, load it into `fresh` and compare what the two say, bit by bit."""
    moelora_ops.save_adapter(trained, folder)
    moelora_ops.load_adapter(fresh, folder)
    wanted, _ = tasks.answer_logits(trained, batch)
    got, _ = tasks.answer_logits(fresh.eval(), batch)
    if not torch.equal(wanted, got):
        raise AssertionError(
            f"the loaded adapter answers differently, by up to {(wanted - got).abs().max():.2e}"
        )


def measure(
    model: nn.Module, batch: tasks.Batch, args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Time and memory of a training step of every variant on the same batch."""
    trainers = {name: Trainer(name, model, args.lr, args.steps) for name in VARIANTS}
    calls = {name: partial(trainer.step, batch) for name, trainer in trainers.items()}
    costs = {}
    with stage("Measuring the memory of a training step"):
        for name, call in calls.items():
            call()  # the optimizer makes its state in the first step
            costs[name] = {
                "trainable": sum(p.numel() for p in trainers[name].parameters),
                "peak_mib": Cpu().peak_bytes(call) / 2**20,
            }
    with stage("Measuring the time of a training step, in rounds of all variants"):
        samples, _ = time_rounds(
            calls, Settings(rounds=args.rounds, seconds=float("inf"), seed=args.seed)
        )
    for name, seconds in samples.items():
        costs[name]["step_ms"] = statistics.median(seconds) * 1e3
        # Inside a round, as neighbours in time share the machine's mood.
        ratios = [t / frozen for t, frozen in zip(seconds, samples[FROZEN], strict=True)]
        costs[name]["of_frozen"] = statistics.median(ratios)
    return costs


def write_report(args, costs, losses, difference, before, after, constant, use) -> None:
    """Print the tables; write them as markdown and json, and the plots, into the output folder."""
    cost_header = [
        "one training step",
        "trained",
        "median",
        "of frozen",
        "peak memory",
    ]
    cost_rows = [
        [
            name,
            f"{cost['trainable'] / 1e6:.1f} M",
            f"{cost['step_ms']:.0f} ms",
            f"{cost['of_frozen']:.2f}x",
            f"{cost['peak_mib']:.0f} MiB",
        ]
        for name, cost in costs.items()
    ]
    task_header = ["held-out", "loss before", "after", "right before", "after", "constant"]
    task_rows = [
        [
            task,
            f"{before[task].loss:.2f}",
            f"{after[task].loss:.2f}",
            f"{before[task].accuracy:.0%}",
            f"{after[task].accuracy:.0%}",
            f"{constant[task]:.0%}",
        ]
        for task in before
    ]
    used = sum(share > 0.25 / len(layer) for layer in use for share in layer)
    ratio = costs[FUSED]["of_frozen"] / costs[LORA]["of_frozen"]
    findings = [
        "Right: every token of the answer. Constant: if the commonest answer were always given.",
        f"Training losses of {FUSED} and {REFERENCE} over {args.steps} steps differ by at most "
        f"{difference:.1e} (first loss {losses[FUSED][0]:.3f}, last {losses[FUSED][-1]:.3f}).",
        f"{used} of {sum(map(len, use))} experts get at least a quarter of an even share of their "
        "layer's selections.",
        f"A step of {FUSED} takes {ratio:.2f} times that of {LORA}.",
        "The adapter, saved and loaded into a fresh model, gives the same bits.",
    ]
    note = (
        "A step is forward, backward and AdamW; fused and reference MoLA add the balance loss; the "
        "frozen model goes backward to its embeddings. Peak memory: tensors at the highest point "
        "of the step, beyond weights and optimizer state."
    )
    machine = (
        f"{args.dtype}, {args.batch} questions of up to {args.length} tokens, "
        f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}, "
        f"moelora_ops {moelora_ops.__version__}, kernels {isa_level()}"
    )

    console.print(
        report.rich_table("", cost_header, cost_rows),
        note,
        f"({machine})",
        sep="\n",
        highlight=False,
    )
    console.print(
        report.rich_table("", task_header, task_rows), *findings, sep="\n", highlight=False
    )

    markdown = "\n".join(
        [
            "# SmolLM2-135M with MoLA 2-4-6-8",
            "",
            report.markdown_table(cost_header, cost_rows),
            f"{note}\n\n{machine}\n",
            report.markdown_table(task_header, task_rows),
            *(f"* {finding}" for finding in findings),
            "",
        ]
    )
    (args.output / "report.md").write_text(markdown, encoding="utf-8")
    results = {
        "settings": {name: str(value) for name, value in vars(args).items()},
        "machine": machine,
        "costs": costs,
        "losses": losses,
        "largest_loss_difference": difference,
        "before": {task: score._asdict() for task, score in before.items()},
        "after": {task: score._asdict() for task, score in after.items()},
        "constant_accuracy": constant,
        "expert_use": use,
    }
    (args.output / "report.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    report.plot_losses(
        args.output / "losses.png", {name: losses[name] for name in (FUSED, REFERENCE)}
    )
    report.plot_tasks(args.output / "tasks.png", before, after)
    report.plot_experts(args.output / "experts.png", use)


if __name__ == "__main__":
    main()
