"""What the demo shows at the end: tables for the terminal and for a file, and three plots."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich import box
from rich.table import Table

Rows = list[list[str]]


def rich_table(title: str, header: list[str], rows: Rows) -> Table:
    """A table for the terminal: names on the left, figures on the right."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", no_wrap=not i)
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(header: list[str], rows: Rows) -> str:
    """The same as markdown."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plot_losses(path: Path, losses: dict[str, list[float]]) -> None:
    """Training losses on each other, and below them how far the second is from the first."""
    (first, a), (second, b) = losses.items()
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    steps = range(1, len(a) + 1)
    above.plot(steps, a, linewidth=5, alpha=0.35, label=first)
    above.plot(steps, b, color="black", linewidth=1, label=second)
    above.set(ylabel="training loss", title=f"{first} and {second}: same start, same batches")
    above.legend()
    below.semilogy(steps, [max(abs(x - y), 1e-8) for x, y in zip(a, b, strict=True)], color="black")
    below.set(xlabel="step", ylabel="|difference|")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    _save(figure, path)


def plot_tasks(path: Path, before: dict, after: dict) -> None:
    """Held-out loss and accuracy per task, before and after, as bars."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    places = range(len(before))
    for axis, field, label in zip(
        axes, ("loss", "accuracy"), ("loss per answer token", "answers right in full"), strict=True
    ):
        for offset, name, scores in ((-0.2, "before", before), (0.2, "after", after)):
            values = [getattr(score, field) for score in scores.values()]
            bars = axis.barh([place + offset for place in places], values, 0.38, label=name)
            axis.bar_label(
                bars, fmt="{:.2f}" if field == "loss" else "{:.0%}", padding=3, fontsize=8
            )
        axis.set(yticks=places, yticklabels=list(before), xlabel=f"held-out {label}")
        axis.margins(x=0.15)
    axes[0].invert_yaxis()
    axes[1].set(xlim=(0, 1.15), xticks=(0, 0.25, 0.5, 0.75, 1))
    axes[1].xaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    _save(figure, path)


def plot_experts(path: Path, shares: list[list[float]]) -> None:
    """Heat map of how much each expert (column) of each layer (row) is used.

    The colour is its share of the layer's selections, times the number of experts: 1 is balanced.
    """
    most = max(map(len, shares))
    grid = [
        [share * len(layer) for share in layer] + [float("nan")] * (most - len(layer))
        for layer in shares
    ]
    figure, axis = plt.subplots(figsize=(6, 8), layout="constrained")
    image = axis.imshow(grid, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2)
    for y, layer in enumerate(shares):
        for x, share in enumerate(layer):
            axis.text(x, y, f"{share:.0%}", ha="center", va="center", fontsize=7)
    axis.set(xlabel="expert", ylabel="layer", title="Share of the selections that each expert gets")
    axis.set(xticks=range(most), yticks=range(len(shares)))
    figure.colorbar(image, label="use relative to balance (1 = balanced)", extend="max")
    _save(figure, path)


def _save(figure, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)
