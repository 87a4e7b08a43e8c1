"""Lays the curves of several runs over each other, one panel a metric.

python benchmarks/curves.py runs/a runs/b                          # every metric that both have
python benchmarks/curves.py runs/a runs/b --metrics loss eval/reward --output both.png
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import tyro

HIDDEN = {"step", "epoch", "num_tokens", "episode", "step_time"}  # these grow with time, whatever is learnt


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]  # folders of runs, each with its metrics.jsonl
    metrics: tuple[str, ...] = ()  # keys to draw; by default all that every run has
    output: Path = Path("curves.png")  # the picture


def read(run: Path) -> dict[str, list[tuple[float, float]]]:
    """The points (step, value) of every metric of a run."""
    points = {}
    with open(run / "metrics.jsonl") as file:
        for line in map(json.loads, file):
            for key, value in line.items():
                if isinstance(value, int | float):
                    points.setdefault(key, []).append((line["step"], value))
    return points


def main(args: Args):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    missing = [str(run) for run in args.runs if not (run / "metrics.jsonl").exists()]
    if missing or not args.runs:
        raise SystemExit(f"error: no metrics.jsonl in {', '.join(missing) or 'no runs'}")
    curves = {str(run): read(run) for run in args.runs}
    known = [list(points) for points in curves.values()]
    keys = args.metrics or [key for key in known[0] if all(key in one for one in known) and key not in HIDDEN]
    if not keys:
        raise SystemExit("error: the runs have no metric in common")
    columns = min(4, len(keys))
    rows = math.ceil(len(keys) / columns)
    size = (4 * columns, 2.6 * rows + 0.4)  # at 100 dots an inch at most 1,600 pixels wide
    figure, panels = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for panel in panels.flat[len(keys) :]:
        panel.axis("off")
    for panel, key in zip(panels.flat, keys, strict=False):
        for color, points in zip(plt.cm.tab10.colors * len(curves), curves.values(), strict=False):
            steps, values = zip(*points.get(key, [(math.nan, math.nan)]), strict=True)
            marker = "o" if len(steps) < 30 else ""  # evaluations, which are few
            panel.plot(steps, values, color=color, marker=marker, markersize=3)
        panel.set_title(key, fontsize=10)
        panel.grid(alpha=0.3)
    names = [plt.Line2D([], [], color=color) for color in (plt.cm.tab10.colors * len(curves))[: len(curves)]]
    figure.legend(names, list(curves), loc="outside upper center", ncols=4, fontsize=9, frameon=False)
    figure.savefig(args.output, dpi=100)
    print(f"{len(keys)} metrics of {len(curves)} runs: {args.output}")


if __name__ == "__main__":
    main(tyro.cli(Args))
