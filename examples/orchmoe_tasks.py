"""OrchMoE on eight reasoning tasks without task ids: which skills does which task use?

SmolLM2-135M learns the mixture three times, from the same start on the same batches, with as many
trained parameters each:

    OrchMoE      a router per layer sorts tokens into abstract tasks; these share skills
    Polytropon   the same skills, but every example comes with the id of its task
    LoRA         one LoRA with the rank of all the skills together

Then a table of what each learned, and a heat map of the skills that OrchMoE and Polytropon use.

    python examples/orchmoe_tasks.py --steps 60

Seen with that (one seed, 16 held-out questions per task): no winner.  From a mean held-out loss of
5.61 and no right answer Polytropon got to 1.42, the others to 1.43, and all three to 27 % right:
ids did not help here, and neither did skills.  Polytropon's tasks differed in a fifth of their
skill weights.  OrchMoE's differed in half a percent, too little to matter, though in a telling
order: the five number tasks within 0.3 % of each other, the three string tasks up to 0.9 % away
from them.  60 steps hardly move a router.
"""

import argparse
import contextlib
import json
import os
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # the weights come in a package, nothing is downloaded
os.environ["TQDM_DISABLE"] = "1"

import report
import tasks
import torch
from matplotlib import pyplot as plt
from rich.console import Console
from torch import Tensor, nn
from variants import load_model, load_tokenizer, make_optimizer, share

import moelora_ops

# Three kinds: arithmetic, divisibility, strings.  None is solved by always giving one answer.
TASKS: dict[str, dict] = {
    "chain_sum": tasks.TASKS["chain_sum"],
    "products": tasks.TASKS["products"],
    "simple_equations": {"min_terms": 2, "max_terms": 2, "min_value": 1, "max_value": 9},
    "gcd": tasks.TASKS["gcd"],
    "lcm": {"min_value": 1, "max_value": 12},
    "letter_counting": {"min_words": 3, "max_words": 5},
    "spell_backward": {"min_word_len": 3, "max_word_len": 5},
    "word_sequence_reversal": tasks.TASKS["word_sequence_reversal"],
}
SKILLS, RANK, ALPHA = 8, 4, 16.0
ORCHMOE, POLYTROPON, LORA = "OrchMoE", "Polytropon (given ids)", "LoRA"

console = Console()


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    tokenizer, model = load_tokenizer(), load_model(torch.float32)
    pad = tokenizer.pad_token_id
    training, held_out = tasks.make_mixture(
        tokenizer, args.train_per_task, args.held_out_per_task, args.length, args.seed, TASKS
    )
    batches = tasks.batches(training, args.batch, args.steps, pad, args.seed)
    scores = {"before": evaluate(model.eval(), held_out, pad)}
    trained, losses, sizes = {}, {}, {}
    for name, config in configurations(model, args.layers).items():
        torch.manual_seed(args.seed)
        learner = moelora_ops.apply(share(model), config)
        sizes[name] = sum(p.numel() for p in learner.parameters() if p.requires_grad)
        losses[name] = train(name, learner.train(), batches, args)
        trained[name] = learner.eval()
        scores[name] = evaluate(learner, held_out, pad)
    use = {name: skill_use(trained[name], held_out, pad) for name in trained if name != LORA}
    constant = tasks.constant_accuracy(training, held_out)
    write_report(args, scores, losses, sizes, constant, use)
    console.print(f"All of it took {time.perf_counter() - begin:.0f} s; see {args.output}/")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="OrchMoE on eight tasks without task ids.")
    parser.add_argument("--steps", type=int, default=40, help="training steps of each method")
    parser.add_argument("--batch", type=int, default=8, help="questions per step")
    parser.add_argument("--layers", type=int, default=10, help="adapt so many of the last layers")
    parser.add_argument("--length", type=int, default=80, help="most tokens of an example")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument(
        "--logits-lr", type=float, default=0.1, help="peak, of the task-skill matrices"
    )
    parser.add_argument("--train-per-task", type=int, default=80, help="questions to learn from")
    parser.add_argument("--held-out-per-task", type=int, default=16, help="to be judged by")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("demo_output/orchmoe"))
    args = parser.parse_args()
    for name in ("steps", "batch", "layers", "train_per_task", "held_out_per_task"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: wanted at least 1")
    return args


def configurations(model: nn.Module, layers: int) -> dict[str, moelora_ops.configs.AdapterConfig]:
    """Each method on all linears of the last `layers` layers, with as many parameters."""
    depth = len(model.model.layers)
    names = moelora_ops.MoLAConfig().target_modules
    last = [f"layers.{i}.{kind}.{n}" for i in range(max(0, depth - layers), depth) for n in names
            for kind in ("self_attn", "mlp")]  # fmt: skip
    where = {"target_modules": last}
    return {
        ORCHMOE: moelora_ops.OrchMoEConfig(SKILLS, len(TASKS), RANK, ALPHA, **where),
        POLYTROPON: moelora_ops.PolytroponConfig(len(TASKS), SKILLS, RANK, ALPHA, **where),
        # As long as all weights are equal, OrchMoE is exactly this LoRA.
        LORA: moelora_ops.LoRAConfig(SKILLS * RANK, ALPHA, **where),
    }


def told(model: nn.Module, names: tuple[str, ...]) -> contextlib.AbstractContextManager:
    """Tell `model` the tasks of a batch, if it wants to know them."""
    if not any(isinstance(m, moelora_ops.nn.PolytroponLinear) for m in model.modules()):
        return contextlib.nullcontext()
    order = list(TASKS)
    return moelora_ops.task_ids(model, torch.tensor([order.index(name) for name in names]))


def train(name: str, model: nn.Module, batches: list[tasks.Batch], args) -> list[float]:
    """Train on the answers; returns the loss of every step."""
    fast, slow = [], []
    for key, p in model.named_parameters():
        if p.requires_grad:
            (fast if key.endswith("skill_logits") else slow).append(p)
    groups = [{"params": slow}] + ([{"params": fast, "lr": args.logits_lr}] if fast else [])
    optimizer, schedule = make_optimizer(groups, args.lr, args.steps)
    losses = []
    for batch in batches:
        with told(model, batch.tasks):
            loss = tasks.answer_loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        console.print(f"{name}: step {len(losses)}/{args.steps}, loss {losses[-1]:.3f}", end="\r")
    console.print()
    return losses


def evaluate(model: nn.Module, examples: list[tasks.Example], pad: int) -> dict[str, tasks.Score]:
    """Held-out scores per task."""
    scores = {}
    for task in TASKS:
        own = [e for e in examples if e.task == task]
        with told(model, (task,) * len(own)):
            scores |= tasks.evaluate(model, own, len(own), pad)
    return scores


@torch.no_grad()
def skill_use(model: nn.Module, examples: list[tasks.Example], pad: int) -> dict[str, Tensor]:
    """Mean weights ``[tasks, skills]`` at the answers' tokens, for every adapted linear."""
    kinds = (moelora_ops.nn.OrchMoELinear, moelora_ops.nn.PolytroponLinear)
    seen: dict[str, Tensor] = {}

    def watch(name: str):
        return lambda layer, _: seen.update({name: layer.skill_weights(layer.tasks_from())})

    handles = [m.register_forward_pre_hook(watch(name)) for name, m in model.named_modules()
               if isinstance(m, kinds)]  # fmt: skip
    rows: dict[str, list[Tensor]] = {}
    for task in TASKS:
        batch = tasks.collate([e for e in examples if e.task == task], pad)
        with told(model, batch.tasks):
            tasks.answer_loss(model, batch)
        wanted = batch.labels != tasks.IGNORED
        for name, weights in seen.items():
            mean = weights[wanted].mean(0) if weights.dim() == 3 else weights.mean(0)
            rows.setdefault(name, []).append(mean)
    for handle in handles:
        handle.remove()
    return {name: torch.stack(means) for name, means in rows.items()}


def distances(use: dict[str, Tensor]) -> Tensor:
    """``[tasks, tasks]``: share of the skill weights that differs, mean over the linears."""
    return torch.stack([(w[:, None] - w[None]).abs().sum(-1) / 2 for w in use.values()]).mean(0)


def write_report(args, scores, losses, sizes, constant, use) -> None:
    """Table on the terminal; the same with settings as json and markdown; the heat map as PNG."""
    methods = [name for name in scores if name != "before"]
    header = ["held-out loss (answers right)", "constant", "before", *methods]
    rows = [
        [
            task,
            f"{constant[task]:.0%}",
            *(f"{s[task].loss:.2f} ({s[task].accuracy:.0%})" for s in scores.values()),
        ]
        for task in TASKS
    ]
    means = {
        name: [sum(getattr(x, field) for x in s.values()) / len(s) for field in tasks.Score._fields]
        for name, s in scores.items()
    }
    rows.append(
        ["mean", f"{sum(constant.values()) / len(constant):.0%}"]
        + [f"{loss:.2f} ({accuracy:.0%})" for loss, accuracy in means.values()]
    )
    rows.append(["trained parameters", "", "", *(f"{sizes[name] / 1e6:.2f} M" for name in methods)])
    best = min(methods, key=lambda name: means[name][0])
    findings = [f"Lowest mean held-out loss: {best}."]
    for name, weights in use.items():
        apart = distances(weights)
        off = apart[~torch.eye(len(apart), dtype=torch.bool)]
        order = list(TASKS)
        far = divmod(int(apart.argmax()), len(apart))
        near = divmod(int((apart + 2 * torch.eye(len(apart))).argmin()), len(apart))
        findings.append(
            f"{name}: two tasks differ in {off.mean():.1%} of their skill weights on average; "
            f"least {order[near[0]]} and {order[near[1]]} ({apart[near]:.1%}), "
            f"most {order[far[0]]} and {order[far[1]]} ({apart[far]:.1%})."
        )
    console.print(report.rich_table("", header, rows), *findings, sep="\n", highlight=False)
    text = "# Eight tasks, with and without ids\n\n" + report.markdown_table(header, rows) + "\n"
    text += "".join(f"* {finding}\n" for finding in findings)
    (args.output / "report.md").write_text(text, encoding="utf-8")
    results = {
        "settings": {name: str(value) for name, value in vars(args).items()},
        "scores": {n: {t: s._asdict() for t, s in by.items()} for n, by in scores.items()},
        "losses": losses,
        "trained_parameters": sizes,
        "constant_accuracy": constant,
        "skill_use": {n: {k: w.tolist() for k, w in by.items()} for n, by in use.items()},
    }
    (args.output / "report.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    plot(args.output / "skills.png", use)


def plot(path: Path, use: dict[str, dict[str, Tensor]]) -> None:
    """Per method: tasks by skills in the linear where tasks differ most; tasks by tasks overall."""
    figure, axes = plt.subplots(len(use), 2, figsize=(12, 5 * len(use)), layout="constrained")
    names = list(TASKS)
    for (method, weights), (left, right) in zip(use.items(), axes, strict=True):
        linear = max(weights, key=lambda name: distances({name: weights[name]}).sum())
        title = f"{method}: skill weights\n{linear}"
        for axis, grid, head in (
            (left, weights[linear], title),
            (right, distances(weights), f"{method}:\nshare of weights that differs, all linears"),
        ):
            image = axis.imshow(grid.numpy(), aspect="auto", cmap="viridis")
            for y, row in enumerate(grid.tolist()):
                for x, value in enumerate(row):
                    color = "k" if image.norm(value) > 0.6 else "w"
                    axis.text(
                        x, y, f"{value:.1%}", ha="center", va="center", fontsize=7, color=color
                    )
            axis.set(title=head, yticks=range(len(names)), yticklabels=names)
            figure.colorbar(image, ax=axis)
        left.set(xlabel="skill", xticks=range(weights[linear].shape[1]))
        right.set_xticks(range(len(names)), names, rotation=40, ha="right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
