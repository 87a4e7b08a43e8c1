"""Figures of docs/merge.md from results of alignment_tax.py: the line from base to model, task vectors.

python benchmarks/merge_plots.py
"""

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent


def draw_sweep(points: list[dict], path: Path):
    """Perplexity and accuracy along t, and one against the other, which is the alignment tax."""
    figure = Figure(figsize=(11, 3.4), layout="tight")
    pairs = (("t", "perplexity"), ("t", "accuracy"), ("perplexity", "accuracy"))
    for axis, (x, y) in zip(figure.subplots(1, 3), pairs):
        axis.plot([point[x] for point in points], [point[y] for point in points], "o-", markersize=4)
        axis.set(xlabel=x, ylabel=y)
        for name, scale in ((x, axis.set_xscale), (y, axis.set_yscale)):
            if name == "perplexity":
                scale("log")
        for point in points if x != "t" else ():
            axis.annotate(f" {point['t']:g}", (point[x], point[y]), fontsize=7)
    figure.suptitle("wise_ft, along t", fontsize=10)
    figure.savefig(path, dpi=120)


def draw_report(kinds: dict[str, dict], path: Path):
    """Norms of two task vectors over that of the base, and their cosine, by kind of tensor."""
    names = list(kinds)
    changes = [[kinds[name]["relative_norm"][i] for i in ("1", "2")] for name in names]
    cosines = [[kinds[name]["cosine"]["1-2"]] for name in names]
    figure = Figure(figsize=(9, 1.5 + 0.28 * len(names)), layout="tight")
    panels = (
        ("norm over that of the base", changes, "viridis", 0, None),
        ("cosine", cosines, "coolwarm", -1, 1),
    )
    for axis, (title, rows, colours, lowest, highest) in zip(figure.subplots(1, 2, sharey=True), panels):
        image = axis.imshow(rows, aspect="auto", cmap=colours, vmin=lowest, vmax=highest, alpha=0.6)
        for (row, column), value in np.ndenumerate(np.array(rows)):
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7)
        axis.set_title(title, fontsize=9)
        axis.set_xticks(range(len(rows[0])), ["tiny/sft", "stories"] if len(rows[0]) == 2 else ["of the two"])
        axis.set_yticks(range(len(names)), names, fontsize=7)
        figure.colorbar(image, ax=axis)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    results, images = ROOT / "benchmarks" / "results", ROOT / "docs" / "img"
    draw_sweep(json.loads((results / "merge_sweep.json").read_text())["points"], images / "merge_sweep.png")
    report = json.loads((results / "merge_methods.json").read_text())["report"]
    draw_report(report["kinds"], images / "merge_methods.png")
